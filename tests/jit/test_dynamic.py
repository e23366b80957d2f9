"""Sizes that differ from call to call: the numbers are those of each call, and the graphs as many as promised."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import luxtorch as lt
import luxtorch.random as lr
from luxtorch import optim, training
from luxtorch.jit import jit

MODEL = lt.Chain(lt.Dense(4, 8, "relu"), lt.Dense(8, 3))
PS, ST = lt.setup(0, MODEL)
TIME_FIRST = lt.Recurrence(lt.GRUCell(4, 8), batch_first=False, return_sequence=True)
BATCH_FIRST = lt.Recurrence(lt.LSTMCell(4, 8))


def of(layer: Any) -> Callable[[Tensor], Any]:
    ps, st = lt.setup(0, layer)
    return lambda x: layer(x, ps, st)[0]


def loss(ps: Any, st: Any, x: Tensor) -> Tensor:
    return MODEL(x, ps, st)[0].square().sum()


def counted(x: Tensor) -> Tensor:
    total, i = x.sum(0), 0
    while i < x.shape[0]:
        total, i = total + i, i + 1
    return total


# What is made of x alone, with a symbol for its first dimension: one graph for all sizes from 2 on.
ONE_GRAPH: dict[str, Callable[[Tensor], Any]] = {
    # numbers
    "n": lambda x: x.shape[0],
    "2 * n": lambda x: 2 * x.shape[0],
    "n * n - n": lambda x: x.shape[0] * x.shape[0] - x.shape[0],
    "n // 2, n % 2": lambda x: (x.shape[0] // 2, x.shape[0] % 2),
    "n / 4": lambda x: x.shape[0] / 4,
    "1 / n": lambda x: 1 / x.shape[0],
    "n ** 2, n ** 0.5": lambda x: (x.shape[0] ** 2, x.shape[0] ** 0.5),
    "-n": lambda x: -x.shape[0],
    "ceil": lambda x: math.ceil(x.shape[0] / 2),
    "round": lambda x: round(x.shape[0] / 3),
    "sum": lambda x: sum([x.shape[0], 1.5]),
    "n > 10": lambda x: x.shape[0] > 10,
    "n == 7": lambda x: x.shape[0] == 7,
    "shape": lambda x: x.shape,
    "tuple(shape)": lambda x: tuple(x.shape),
    "numel": lambda x: x.numel(),
    "stride": lambda x: (x.stride(), x.T.stride(), (x @ x.T).stride()),
    "n of an intermediate": lambda x: torch.cat([x, x]).shape[0],
    "n deep in a tree": lambda x: {"sum": x.sum(), "of": (x.shape[0], [x.shape[0] + 1, "n"]), "x": x},
    # in tensors
    "full(n)": lambda x: torch.full((), x.shape[0]),
    "x * n": lambda x: x * x.shape[0],
    "x / n": lambda x: x.sum() / x.shape[0],
    "x * (1 / n)": lambda x: x * (1 / x.shape[0]),
    "arange": lambda x: torch.arange(x.shape[0]),
    "eye": lambda x: torch.eye(x.shape[0]),
    "of what is closed over": lambda x: PS["layer_1"]["bias"].new_zeros(x.shape[0]),
    "repeat": lambda x: x.repeat(2, 1),
    "reshape": lambda x: x.reshape(-1),
    "sort": lambda x: x.sort(0).values,
    "einsum": lambda x: torch.einsum("bi,bj->bij", x, x),
    "one_hot": lambda x: F.one_hot(torch.arange(x.shape[0]) % 3, 3),
    "centred": lambda x: x - x.mean(0),
    # models and their derivatives
    "model": lambda x: MODEL(x, PS, ST)[0],
    "vmap": torch.vmap(lambda x: MODEL(x, PS, ST)[0]),
    "ensemble": of(lt.Ensemble(MODEL, 3)),
    "gradient": lambda x: lt.gradient(lambda ps: loss(ps, ST, x), PS),
    "per_sample_gradients": lambda x: lt.per_sample_gradients(loss, PS, ST, x),
    "batched_jacobian": lambda x: lt.batched_jacobian(lambda x: MODEL(x, PS, ST)[0], x),
    "jacobian": lambda x: lt.jacobian(lambda x: x.square().sum(1), x),
    "hessian": lambda x: lt.hessian(lambda x: x.pow(3).sum(), x),
    "time first": lambda x: of(TIME_FIRST)(x[:, None].expand(-1, 2, -1)),
    "batch first": lambda x: of(BATCH_FIRST)(x[:, None].expand(-1, 5, -1)),
    # draws
    "split": lambda x: lr.split(lr.key(0), x.shape[0]),
    "fold_in": lambda x: lr.fold_in(lr.key(0), x.shape[0]),
    "fold_in of each": lambda x: torch.vmap(lambda i: lr.uniform(lr.fold_in(lr.key(0), i)))(torch.arange(x.shape[0])),
    "draws": lambda x: (lr.normal(lr.key(0), x.shape), lr.uniform(lr.key(0), (x.shape[0],))),
    "permutation": lambda x: x[lr.permutation(lr.key(0), x.shape[0])],
    "a key for each": lambda x: torch.vmap(lambda k, x: x + lr.normal(k, (4,)))(lr.split(lr.key(0), x.shape[0]), x),
}

# What needs the number itself: right, with a graph for each size and a warning.
EACH_SIZE: dict[str, Callable[[Tensor], Any]] = {
    "len": len,
    "int": lambda x: int(x.shape[0]),
    "float": lambda x: float(x.shape[0]),
    "sqrt": lambda x: x / math.sqrt(x.shape[0]),
    "range": lambda x: sum(x[i] * i for i in range(x.shape[0])),
    "while": counted,
    "iteration": lambda x: torch.stack([2 * row for row in x]),
    "unbind": lambda x: torch.stack(x.unbind()).sum(0),
    "list": lambda x: [1.0] * x.shape[0],
    "tensor(n)": lambda x: torch.tensor(x.shape[0]),
    "tensor([n])": lambda x: torch.tensor([x.shape[0], 1]),
    "text": lambda x: f"{x.shape[0]} rows",
    "text of a float": lambda x: f"{x.shape[0] / 4:.2f}",
    "text with a format": lambda x: f"{x.shape[0]:03d}",
    "text of a shape": lambda x: str(x.shape),
    "percent": lambda x: "%d" % x.shape[0],
    "text as a key": lambda x: lr.normal(lr.fold_in(lr.key(0), f"batch {x.shape[0]}"), (2,)),
    "key of a result": lambda x: {x.shape[0]: x + 1},
    "set": lambda x: sorted({x.shape[0], 3}),
    "Static": lambda x: lt.Static(x.shape[0]),
    "Static, deeper": lambda x: (x.sum(), lt.Static(("n", x.shape[0]))),
    "axes of a vector": lambda x: lt.ComponentVector({"a": x + 1, "b": torch.ones(2)}),
    "bytes": lambda x: x.nbytes,
    "product of sizes": lambda x: int(x.shape[0] * 2 + 1),
}

# What takes one way or the other.
BRANCHES: dict[str, Callable[[Tensor], Any]] = {
    "n > 5": lambda x: x + 1 if x.shape[0] > 5 else x - 1,
    "n > 2": lambda x: x + 1 if x.shape[0] > 2 else x - 1,
    "n == 3": lambda x: (x + 1, x.shape[0]) if x.shape[0] == 3 else (x - 1, -x.shape[0]),
    "even": lambda x: x + 1 if x.shape[0] % 2 == 0 else x - 1,
    "max": lambda x: max(x.shape[0], 5),
    "half": lambda x: x[: x.shape[0] // 2],
}

SIZES = (7, 12, 3, 2, 7)


def rows(n: int, m: int = 4) -> Tensor:
    return torch.sin(torch.arange(1.0, n * m + 1)).reshape(n, m)


def equal(got: Any, expected: Any) -> None:
    """Check that two results are of the same structure, types, shapes and numbers."""
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    assert repr(optree.tree_structure(got)) == repr(optree.tree_structure(expected))
    for one, other in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        assert type(one) is type(other)
        if isinstance(other, Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
            if other.dtype == torch.uint64:
                one, other = one.view(torch.int64), other.view(torch.int64)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert one == other and all(type(n) is int for n in (one if isinstance(one, torch.Size) else ()))


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_graph_for_all_sizes(name):
    function = ONE_GRAPH[name]
    jitted = jit(lambda x: function(x), dynamic="x", backend="replay")
    for n in SIZES:
        equal(jitted(rows(n)), function(rows(n)))
    assert jitted.cache_info().misses == 1
    equal(jitted(rows(1)), function(rows(1)))
    # Some refuse 0.
    if name not in ("per_sample_gradients", "split", "a key for each", "time first", "1 / n", "x * (1 / n)"):
        equal(jitted(rows(0)), function(rows(0)))


@pytest.mark.parametrize("name", EACH_SIZE)
def test_a_graph_for_each_size_with_one_warning(name):
    function = EACH_SIZE[name]
    jitted = jit(lambda x: function(x), dynamic="x", backend="replay")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for n in SIZES:
            equal(jitted(rows(n)), function(rows(n)))
    assert jitted.cache_info().misses == 4
    (warning,) = seen
    assert warning.category is RuntimeWarning and warning.filename == __file__
    assert f"{__file__}:" in str(warning.message) and "dimension 0 of x as a number" in str(warning.message)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_graph_for_each_branch(name):
    function = BRANCHES[name]
    jitted = jit(lambda x: function(x), dynamic="x", backend="replay")
    for n in (*SIZES, 4, 5, 6, 1):
        equal(jitted(rows(n)), function(rows(n)))
    assert jitted.cache_info().misses == 3  # with that of size 1


@pytest.mark.parametrize("name", ["n", "n / 4", "n deep in a tree", "x / n", "model", "vmap", "centred", "repeat"])
def test_recorded(name):
    function = ONE_GRAPH[name]
    jitted, ways = (
        jit(
            lambda x, w: (w * function(x)["sum"] if "tree" in name else w.sum(), function(x * w)),
            dynamic="x",
            backend="replay",
        ),
        [],
    )
    for n in (*SIZES, 1):
        ways.clear()
        for f in (jitted, jitted._fn):
            w, x = torch.full((4,), 0.5, requires_grad=True), rows(n)
            out = f(x, w)
            total = sum(leaf.sum() for leaf in optree.tree_leaves(out) if isinstance(leaf, Tensor))
            total.backward()
            ways.append(
                (optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, out), w.grad)
            )
        equal(*ways)
    assert jitted.cache_info().misses == 2
