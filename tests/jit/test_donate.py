"""Donated arguments: gone afterwards, and their memory is the results'."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import optim
from luxtorch.jit import DonatedError, jit
from luxtorch.jit._donate import AliasGuard, pairs
from luxtorch.jit._flatten import flatten
from luxtorch.jit._trace import trace

from .conftest import train

USES = {
    "add": lambda t: t + 1,
    "function": torch.sin,
    "shape": lambda t: t.shape,
    "print": repr,
    "method": lambda t: t.sum(),
    "other side": lambda t: torch.ones(3) * t,
    "in a list": lambda t: torch.stack([torch.ones(3), t]),
    "data": lambda t: t.data_ptr(),
    "jit": lambda t: jit(torch.sin, backend="replay")(t),
    "numpy": lambda t: t.numpy(),
    "truth": bool,
    "index": lambda t: t[0],
}


@pytest.mark.parametrize("name", USES)
def test_a_donated_tensor_is_gone(name):
    x = torch.ones(3)
    jit(lambda x: x + 1, donate="x", backend="replay")(x)
    with pytest.raises(DonatedError, match="donated tensor must not be used"):
        USES[name](x)


@pytest.mark.parametrize("tree", ["dict", "vector"])
@pytest.mark.parametrize(
    "rule", [optim.Descent(0.1), optim.Adam(0.1), optim.Lion(0.1)], ids=lambda rule: type(rule).__name__
)
def test_training(make_state, batch, same, rule, tree):
    jitted, ts = jit(train, donate="ts", backend="replay"), make_state(rule=rule, tree=tree)
    other = torch.utils._pytree.tree_map(torch.clone, ts)
    first = ts
    for _ in range(3):
        (got, ts), (expected, other) = jitted(ts, batch), train(other, batch)
        same(got, expected)
    same(ts, other, 1e-3)
    assert jitted.cache_info().misses == 1
    with pytest.raises(DonatedError):
        train(first, batch)


def test_other_arguments_stay():
    x, y = torch.ones(3), torch.ones(3)
    step = jit(lambda a, b: (a + b, b), donate=["a"], backend="replay")
    got, same = step(x, y)
    assert same is y and torch.equal(y, torch.ones(3)) and torch.equal(got, 2 * torch.ones(3))
    got, same = step(b=y, a=got)
    assert same is y and torch.equal(got, torch.full((3,), 3.0))


UNCHANGED = {
    "itself": lambda x: x,
    "in other words": lambda x: x + 0,  # a compiler finds out
    "a view": lambda x: x.view(x.shape),
    "contiguous": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("size", [3, 30000])
@pytest.mark.parametrize("backend", ["replay", "inductor"])
@pytest.mark.parametrize("name", UNCHANGED)
def test_a_donated_argument_that_comes_back(name, backend, size):
    x = torch.arange(float(size))
    got = jit(UNCHANGED[name], donate="x", backend=backend)(x)
    assert torch.equal(got, torch.arange(float(size))) and got is not x
    with pytest.raises(DonatedError):
        x.sum()


CHOICES = {
    # function of (ps, x), and for each leaf of ps the output that it takes
    "order": (lambda ps, x: [ps["a"] + 1, ps["b"] + 1], [(0, 0), (1, 1)]),
    "structure": (lambda ps, x: (ps["a"] * 2, {"a": ps["a"] - 1, "b": ps["b"] - 1}), [(0, 1), (1, 2)]),
    "nested structure": (lambda ps, x: (ps["a"] * 2, (3, {"a": ps["a"] - 1, "b": ps["b"]})), [(0, 1)]),
    "other shape": (lambda ps, x: ps["a"].sum(), []),
    "other dtype": (lambda ps, x: ps["a"].double(), []),
    "view": (lambda ps, x: (ps["a"].view(300, 200), ps["a"] + 1, ps["b"] + 1), [(1, 1)]),
    "exchange": (lambda ps, x: {"a": ps["b"], "b": ps["a"]}, []),
    "one memory": (lambda ps, x: (y := ps["a"] + 1, y.view(200, 300)), []),
    "view of another": (lambda ps, x: (x[0:200], ps["a"] + 1), [(0, 1)]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_which_output_takes_which_memory(name):
    function, expected = CHOICES[name]
    assert _pairs(function, 200, 300) == expected


def test_small_memory_is_not_worth_reusing():
    function, _ = CHOICES["order"]
    assert _pairs(function, 2, 3) == []


def _pairs(function, *shape):
    tree = ({"a": torch.ones(shape), "b": torch.ones(shape)}, torch.ones(2 * shape[0], shape[1])), {}
    leaves, spec = flatten(tree)
    return pairs(trace(lambda args, kwargs: function(*args), leaves, spec, {}), [0, 1])


def test_memory_that_is_shared_is_copied_first():
    x = torch.zeros(3)
    step = jit(lambda a, b: (a + 1, b + 1), donate="a", backend="replay")
    got, other = step(x.view(3), x)
    assert torch.equal(got, other) and torch.equal(x, torch.zeros(3))


def test_a_vector(same):
    ps = lt.ComponentVector({"a": torch.ones(2), "b": torch.zeros(3)})
    got = jit(lambda ps: ps * 2, donate="ps", backend="replay")(ps)
    same(got.to_dict(), {"a": 2 * torch.ones(2), "b": torch.zeros(3)})
    with pytest.raises(DonatedError):
        ps.flat.sum()


def test_parameters_of_modules():
    w = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        got = jit(lambda w: w - 1, donate="w", backend="replay")(w)
    assert torch.equal(got, torch.zeros(3))
    with pytest.raises(DonatedError):
        w.sum()


RANGES = {
    # Two arguments out of one memory; the first is donated.
    "views": lambda b: (b[1:], b[:-1]),
    "the same": lambda b: (b, b),
    "inside": lambda b: (b, b[5:7]),
    "in steps": lambda b: (b[: len(b) // 2 * 2], b[1 : len(b) // 2 * 2 : 2]),
    "numpy": lambda b: (torch.from_numpy(b.numpy()[1:]), torch.from_numpy(b.numpy()[:-1])),
    "other dtype": lambda b: (b, b.view(torch.int32)),
    "transposed": lambda b: (b[:20000].view(100, 200), b[1:20001].view(200, 100).T),
    "disjoint": lambda b: (b[:20000], b[20000:]),
    "empty": lambda b: (b, b[3:3]),
    "expanded": lambda b: (b[:20000], b[5:6].expand(20000)),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", RANGES)
def test_memory_that_overlaps_is_copied_before_it_is_written_into(name, order):
    new, old = RANGES[name](torch.arange(40002.0))
    kept = old.clone()
    tensors, place = [new, old][::order], 0 if order == 1 else 1
    owner = AliasGuard(tensors, [], [place])
    owner.copy_aliased(tensors)
    tensors[place].fill_(-1)
    assert torch.equal(old, kept)
    assert (tensors[place] is new) == (name in ("disjoint", "empty"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("dynamic", [(), "old"])
def test_a_compiled_call_with_memory_that_overlaps(name, dynamic):
    def function(new, old):
        return new + 1, old.flip(0).double().sum(), old * 2

    jitted = jit(function, donate="new", dynamic=dynamic, backend="inductor")
    for k in range(2):
        expected = function(*RANGES[name](torch.arange(40002.0) + k))
        got = jitted(*RANGES[name](torch.arange(40002.0) + k))
        assert all(map(torch.equal, got, expected))
