"""When a call finds what was compiled, and when it has to compile."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import types
import weakref

import pytest
import torch

import luxtorch as lt
from luxtorch import optim
from luxtorch.jit import jit

from .conftest import train


def test_one_compilation_for_many_steps(make_state, batch):
    jitted, ts = jit(train, backend="replay"), make_state()
    for _ in range(10):
        _, ts = jitted(ts, batch)
    assert jitted.cache_info() == (9, 1, 64, 1)


@pytest.mark.parametrize(
    "change",
    {
        "shape": lambda x: torch.cat([x, x]),
        "dtype": lambda x: x.double(),
        "strides": lambda x: x.T.contiguous().T,
        "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
        "tree": lambda x: (x,),
        "requires_grad": lambda x: x.clone().requires_grad_(),
        "static": lambda x: {"x": x, "mode": lt.Static(1)},
    }.items(),
    ids=lambda item: item[0],
)
def test_other_arguments_are_compiled_anew(change):
    jitted, x = jit(lambda tree: torch.utils._pytree.tree_map(torch.sin, tree), backend="replay"), torch.ones(2, 3)
    for argument in (x, change[1](x), x, change[1](x)):
        jitted(argument)
    assert jitted.cache_info()[:2] == (2, 2)


@pytest.mark.parametrize(
    "setting",
    {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu"),
        "device": lambda: torch.device("meta"),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_settings_are_compiled_anew(setting):
    jitted, x = jit(lambda x: (x @ x.T, torch.zeros(2)), backend="replay"), torch.ones(2, 3)
    plain = jitted(x)
    with setting[1]():
        inside = jitted(x)
        jitted(x)
    again = jitted(x)
    assert jitted.cache_info()[:2] == (2, 2)
    assert inside[1].device.type == ("meta" if setting[0] == "device" else "cpu")
    assert again[0].dtype == plain[0].dtype == torch.float32 and not again[0].is_inference()


@pytest.mark.parametrize(
    "values", [(1, 2), (1, True), (1, 1.0), (0.0, -0.0), ("a", "b"), (None, 1), (torch.sin, torch.cos)]
)
def test_each_constant_is_compiled_for(values):
    seen = []
    jitted = jit(lambda x, n: (seen.append(n), x + 1)[1], backend="replay")
    for value in (*values, *values):
        jitted(torch.ones(2), value)
    assert [repr(value) for value in seen] == [repr(value) for value in values]


@pytest.mark.parametrize("by_name", [True, False])
def test_static_arguments(by_name):
    jitted = jit(lambda x, shape, *, k=1: x.reshape(shape) * k, static=("shape", "k"), backend="replay")
    x = torch.arange(6.0)
    for shape, k in (((2, 3), 1), ((3, 2), 1), ((2, 3), 1), ((2, 3), True)):
        got = jitted(x, shape=shape, k=k) if by_name else jitted(x, shape, k=k)
        assert torch.equal(got, x.reshape(shape))
    assert jitted.cache_info()[:2] == (1, 3)


def test_equal_models_share(make_state, batch):
    jitted = jit(train, backend="replay")
    for rate in (0.1, 0.2, 0.3):
        jitted(make_state(rule=optim.Adam(rate)), batch)
    assert jitted.cache_info()[:2] == (2, 1)
    jitted(make_state(lt.Dense(3, 2)), batch)
    assert jitted.cache_info().misses == 2


def test_the_cache_is_bounded_and_the_oldest_goes():
    jitted = jit(torch.sin, backend="replay", maxsize=3)
    for n in (1, 2, 3, 1, 4):
        jitted(torch.ones(n))
    assert jitted.cache_info() == (1, 4, 3, 3)
    jitted(torch.ones(1))
    assert jitted.cache_info().misses == 4
    jitted(torch.ones(2))
    assert jitted.cache_info().misses == 5
    jitted.cache_clear()
    assert jitted.cache_info() == (0, 0, 3, 0)


def test_many_compilations_are_warned_of():
    jitted = jit(lambda x, n: x * n, backend="replay")
    with pytest.warns(RuntimeWarning, match="compiled 16 times.*an argument that is not a tensor, 14 against 15"):
        for n in range(20):
            jitted(torch.ones(2), n)


@pytest.mark.parametrize("dynamic", [True, "x", ["x", "y"]])
def test_one_graph_for_all_batches(dynamic, rng, same):
    def function(x, y, w):
        return ((x @ w).relu() - y).square().mean(0), x.shape[0] * y

    jitted, w = jit(function, dynamic=dynamic, backend="replay"), torch.randn(4, 2, generator=rng)
    for n in (8, 9, 33, 64):
        x, y = torch.randn(n, 4, generator=rng), torch.randn(n, 2, generator=rng)
        if dynamic == "x":
            y = y[0].expand(8, 2)[:1].clone()
        same(jitted(x, y, w), function(x, y, w))
    assert jitted.cache_info().misses == 1
    x, y = torch.randn(1, 4, generator=rng), torch.randn(1, 2, generator=rng)
    same(jitted(x, y, w), function(x, y, w))
    assert jitted.cache_info().misses == 2


def test_what_a_trace_assumed_of_sizes_is_checked(rng, same):
    def function(x, y):
        return x + 1 if x.shape[0] > 10 else y - 1

    jitted = jit(function, dynamic=True, backend="replay")
    for n in (8, 9, 11, 10, 12):
        x, y = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
        same(jitted(x, y), function(x, y))
    assert jitted.cache_info()[:2] == (3, 2)


def test_one_tensor_twice(same):
    jitted, x = jit(lambda x, y: (x + y, y), backend="replay"), torch.ones(3)
    for _ in range(3):
        same(jitted(x, x), (x + x, x))
    assert jitted.cache_info()[:2] == (2, 1)
    assert "aten.add" in jitted.lower(x, x).graph


def test_arguments_are_not_kept():
    jitted, x = jit(lambda x: x + 1, backend="replay"), torch.ones(3)
    jitted(x)
    ref = weakref.ref(x)
    del x
    gc.collect()
    assert ref() is None and jitted.cache_info().currsize == 1


def test_threads(rng):
    jitted, wrong = jit(lambda x: (x * 2).sin(), backend="replay"), []
    inputs = [torch.randn(n, generator=rng) for n in (2, 3, 4)]

    def work():
        for _ in range(20):
            for x in inputs:
                if not torch.equal(jitted(x), (x * 2).sin()):
                    wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    info = jitted.cache_info()
    assert not wrong and info.misses == 3 and info.currsize == 3


@jit(backend="replay")
def tripled(x):
    return 3 * x


def test_copies_and_pickles_by_name(monkeypatch):
    assert copy.deepcopy({"f": tripled})["f"] is tripled
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.SimpleNamespace(tripled=tripled)))
    assert pickle.loads(pickle.dumps(tripled)) is tripled


def test_looks_like_the_function():
    @jit(backend="replay")
    def double(x):
        """Double it."""
        return 2 * x

    assert double.__name__ == "double" and double.__doc__ == "Double it." and "double" in repr(double)

    class Scaled:
        @jit(backend="replay")
        def apply(self, x):
            return double(x) + 1

    assert torch.equal(Scaled().apply(torch.ones(2)), torch.full((2,), 3.0))


def test_lower_shows_the_graph():
    jitted = jit(lambda x: x.sin() + 1, backend="replay")
    lowered = jitted.lower(torch.ones(2))
    assert "aten.sin" in lowered.graph and lowered.code == "" and str(lowered) == lowered.graph
    jitted(torch.ones(2))
    assert jitted.cache_info()[:2] == (1, 1)
