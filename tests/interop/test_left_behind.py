"""What a call leaves behind, changes or draws: on the module, its classes and globals, its parameters; of numbers."""

from __future__ import annotations

import collections
import functools
import random
import types

import numpy as np
import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

import luxtorch as lt
from luxtorch.core import InputError, LuxtorchError, tree_map
from luxtorch.interop import from_torch


class Cell(nn.Module):
    """Have a weight, and be changed by a call in some way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3))
        self.inner = nn.Identity()
        self.prepare()

    def prepare(self):
        self.cache = {}


def kept_in(prepare, call):
    """Return a class of modules that keep something from call to call."""
    return type("Keeping", (Cell,), {"prepare": prepare, "forward": call})


def nothing(self):
    pass


def attribute(name, make):
    return lambda self: setattr(self, name, make())


def dict_cache(self, x):
    if "w" not in self.kept:
        self.kept["w"] = self.weight * 2
    return x * self.kept["w"]


def list_cache(self, x):
    self.kept.append(self.weight)
    return x * len(self.kept) * self.kept[0]


def namespace_cache(self, x):
    self.kept.count += 1
    return x * self.kept.count * self.weight


def array_cache(self, x):
    self.kept += 1
    return x * float(self.kept.sum()) * self.weight


def set_cache(self, x):
    self.kept.add(len(self.kept))
    return x * len(self.kept) * self.weight


def late_buffer(self, x):
    if not hasattr(self, "late"):
        self.register_buffer("late", self.weight.detach() * 2)
    return x * self.weight + self.late


def none_buffer(self, x):
    self.none = self.weight.detach().clone() if self.none is None else self.none + 1
    return x * self.none * self.weight


def late_module(self, x):
    if not hasattr(self, "late"):
        self.late = nn.Hardtanh()
        x = x + self.weight
    return self.late(x) * self.weight


def late_hook(self, x):
    if not self.kept:
        self.inner.register_forward_hook(lambda part, inputs, y: y * self.weight)
        self.kept.append(1)
    return self.inner(x) * self.weight


def hidden_module(self, x):
    self.kept[0](x * self.weight)
    return x * self.kept[0].running_mean * self.weight


def pointer(self, x):
    self.current = self.inner
    self.others = [self.inner, {"it": self.inner}]
    self.step = lambda x: self.inner(x)
    self.kept, self.swapped = self.inner, self.kept
    return self.step(self.current(x)) * self.weight


def cell_cache(self):
    count = 0

    def step(x):
        nonlocal count
        count += 1
        return x * count

    self.kept = step


def call_kept(self, x):
    return self.kept(x) * self.weight


class Memo(Cell):
    @functools.lru_cache(None)  # noqa: B019
    def twice(self):
        return self.weight * 2

    @functools.cached_property
    def thrice(self):
        return self.weight * 3

    def forward(self, x):
        return x * self.twice() + self.thrice


GLOBAL_CACHE = {}
COUNT = 0


def global_cache(self, x):
    if "w" not in GLOBAL_CACHE:
        GLOBAL_CACHE["w"] = self.weight * 2
    return x * GLOBAL_CACHE["w"]


def global_count(self, x):
    global COUNT
    COUNT += 1
    return x * self.weight * COUNT


class ClassCache(Cell):
    cache_of_all = {}
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        if "w" not in self.cache_of_all:
            ClassCache.cache_of_all["w"] = self.weight * 2
        return x * self.cache_of_all["w"] * self.calls


@functools.lru_cache(None)
def table(size):
    return torch.arange(size) * 2.0


def global_memo(self, x):
    return (x + table(x.shape[-1])) * self.weight


@pytest.fixture(autouse=True)
def forget():
    """Let no test see what a module, called as it is, has left in the caches of this file."""
    clear_caches()


def clear_caches():
    global COUNT
    COUNT, ClassCache.calls = 0, 0
    for cache in (GLOBAL_CACHE, ClassCache.cache_of_all):
        cache.clear()


KEEPING = {
    "global": kept_in(nothing, global_cache),
    "global count": kept_in(nothing, global_count),
    "class": ClassCache,
    "global memo": kept_in(nothing, global_memo),
    "dict": kept_in(attribute("kept", dict), dict_cache),
    "ordered dict": kept_in(attribute("kept", collections.OrderedDict), dict_cache),
    "list": kept_in(attribute("kept", list), list_cache),
    "set": kept_in(attribute("kept", set), set_cache),
    "namespace": kept_in(attribute("kept", lambda: types.SimpleNamespace(count=0)), namespace_cache),
    "array": kept_in(attribute("kept", lambda: np.zeros(2)), array_cache),
    "late buffer": kept_in(nothing, late_buffer),
    "none buffer": kept_in(lambda self: self.register_buffer("none", None), none_buffer),
    "late module": kept_in(nothing, late_module),
    "late hook": kept_in(attribute("kept", list), late_hook),
    "hidden module": kept_in(attribute("kept", lambda: [nn.BatchNorm1d(3)]), hidden_module),
    "cell": kept_in(cell_cache, call_kept),
    "pointers": kept_in(attribute("kept", list), pointer),
    "cached methods": Memo,
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_a_call_leaves_behind_does_not_reach_the_next(rng, name):
    x = torch.randn(4, 3, generator=rng)

    def run(trees):
        layer, ps, st = from_torch(KEEPING[name]())
        return [layer(x, tree_map(lambda leaf: factor * leaf, ps), st) for factor in trees]  # noqa: B023

    one, two, again = run([1, 3, 1])
    first = run([3])[0]
    torch.testing.assert_close(again[0], one[0])
    torch.testing.assert_close(two[0], first[0])
    torch.testing.assert_close(one[0], KEEPING[name]()(x))
    clear_caches()
    assert one[1].keys() == two[1].keys()
    layer, ps, st = from_torch(KEEPING[name]())
    jitted = lt.jit(lambda ps: layer(x, ps, st)[0], backend="replay")(tree_map(lambda leaf: 3 * leaf, ps))
    torch.testing.assert_close(jitted, first[0])
    assert lt.check_purity(layer, x, ps, st)
    assert (len(layer.skeleton._idle), layer.skeleton._in_use) == (1, [])  # nothing seems to be held
    for _ in range(2):
        slope = lt.gradient(lambda ps: layer(x, ps, st)[0].sum(), ps)
    clear_caches()
    module = KEEPING[name]()
    module(x).sum().backward()
    torch.testing.assert_close(slope["weight"], module.weight.grad)


def clamp(self, x):
    with torch.no_grad():
        self.weight.clamp_(-0.1, 0.1)
    return x * self.weight


def data(self, x):
    self.weight.data = self.weight.data / 2
    return x * self.weight


def view(self, x):
    self.weight.detach()[0] = 7.0
    return x * self.weight


def out(self, x):
    with torch.no_grad():
        torch.add(self.weight, 1, out=self.weight)
    return x * self.weight


def replaced(self, x):
    self.weight = nn.Parameter(self.weight * 2)
    return x * self.weight


def initialized(self, x):
    nn.init.ones_(self.weight)
    return x * self.weight


def inplace(self, x):
    with torch.no_grad():
        F.relu(self.weight, inplace=True)
    return x * self.weight


def augmented(self, x):
    with torch.no_grad():
        self.weight += 1
    return x * self.weight


def frozen(self, x):
    self.weight.requires_grad_(True).requires_grad_(False)
    return x * self.weight


def unset(self, x):
    self.weight.requires_grad = True
    self.weight.requires_grad = False
    return x * self.weight


WRITING = [frozen, unset, clamp, data, view, out, replaced, initialized, inplace, augmented]


@pytest.mark.parametrize("transform", ["plain", "grad", "vmap", "jit"])
@pytest.mark.parametrize("write", WRITING, ids=lambda function: function.__name__)
def test_a_forward_does_not_change_the_parameters_that_it_is_given(rng, write, transform):
    layer, ps, st = from_torch(kept_in(nothing, write)())
    x = torch.randn(4, 3, generator=rng)
    before = ps["weight"].clone()

    def call(ps):
        return layer(x, ps, st)[0].sum()

    calls = {
        "plain": lambda: call(ps),
        "grad": lambda: grad(call)(ps),
        "vmap": lambda: vmap(call)(tree_map(lambda leaf: leaf[None].expand(2, *leaf.shape), ps)),
        "jit": lambda: lt.jit(call, backend="replay")(ps),
    }
    refused = (
        (LuxtorchError, "not allowed")
        if (write, transform) == (data, "vmap")
        else (InputError, "must not change its parameter")
    )
    with pytest.raises(refused[0], match=refused[1]):
        calls[transform]()
    torch.testing.assert_close(ps["weight"], before, rtol=0, atol=0)
    with pytest.raises(InputError):
        call(ps)


@pytest.mark.parametrize("kind", ["constant in a list", "constant in a closure"])
def test_a_forward_does_not_change_a_tensor_of_its_own(rng, kind):
    def prepare(self):
        total = torch.zeros(3)
        self.kept = [total] if kind == "constant in a list" else lambda: total

    def call(self, x):
        total = self.kept[0] if isinstance(self.kept, list) else self.kept()
        total += 1
        return x * total * self.weight

    layer, ps, st = from_torch(kept_in(prepare, call)())
    with pytest.raises(InputError, match="neither its parameter nor its buffer"):
        layer(torch.ones(2, 3), ps, st)


def python_numbers(self, x):
    return x * random.random()


def numpy_numbers(self, x):
    return x * float(np.random.rand())


def reseeding(self, x):
    torch.manual_seed(3)  # noqa: TID251
    return x * torch.rand(3)


@torch.jit.script
def scripted(x):
    return torch.nn.functional.dropout(x, 0.5, True)


def scripted_numbers(self, x):
    return scripted(x)


def own_numbers(self, x):
    return x * self.kept.random()


def own_numpy_numbers(self, x):
    return x * float(self.kept.random())


DRAWING = {
    "Python": kept_in(nothing, python_numbers),
    "NumPy": kept_in(nothing, numpy_numbers),
    "seed": kept_in(nothing, reseeding),
    "script": kept_in(nothing, scripted_numbers),
    "own": kept_in(attribute("kept", lambda: random.Random(0)), own_numbers),
    "own of NumPy": kept_in(attribute("kept", lambda: np.random.default_rng(0)), own_numpy_numbers),
}


@pytest.mark.parametrize("name", DRAWING)
def test_numbers_that_no_key_decides_are_refused(name):
    layer, ps, st = from_torch(DRAWING[name]())
    for _ in range(2):
        with pytest.raises(InputError, match="draw from"):
            layer(torch.ones(4, 3), ps, st)
