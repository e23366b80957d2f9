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
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

import luxtorch as lt
import luxtorch.random as lr
from luxtorch import training
from luxtorch.jit import jit
from luxtorch.jit._sizes import Sizes

MODEL = lt.Chain(lt.Dense(4, 8, "relu"), lt.Dense(8, 3))
PS, ST = lt.setup(0, MODEL)


def of(layer: Any) -> Callable[[Tensor], Any]:
    ps, st = lt.setup(0, layer)
    return lambda x: layer(x, ps, st)[0]


ENSEMBLE = of(lt.Ensemble(MODEL, 3))
TIME_FIRST = of(lt.Recurrence(lt.GRUCell(4, 8), batch_first=False, return_sequence=True))
BATCH_FIRST = of(lt.Recurrence(lt.LSTMCell(4, 8)))


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
    "centered": lambda x: x - x.mean(0),
    # models and their derivatives
    "model": lambda x: MODEL(x, PS, ST)[0],
    "vmap": torch.vmap(lambda x: MODEL(x, PS, ST)[0]),
    "ensemble": ENSEMBLE,
    "gradient": lambda x: lt.gradient(lambda ps: loss(ps, ST, x), PS),
    "per_sample_gradients": lambda x: lt.per_sample_gradients(loss, PS, ST, x),
    "batched_jacobian": lambda x: lt.batched_jacobian(lambda x: MODEL(x, PS, ST)[0], x),
    "jacobian": lambda x: lt.jacobian(lambda x: x.square().sum(1), x),
    "hessian": lambda x: lt.hessian(lambda x: x.pow(3).sum(), x),
    "time first": lambda x: TIME_FIRST(x[:, None].expand(-1, 2, -1)),
    "batch first": lambda x: BATCH_FIRST(x[:, None].expand(-1, 5, -1)),
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


@pytest.mark.parametrize("name", ["n", "n / 4", "n deep in a tree", "x / n", "model", "vmap", "centered", "repeat"])
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


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": rows,
    "transposed": lambda n, m: rows(m, n).T,
    "columns": lambda n, m: rows(n, m + 5)[:, 2 : m + 2],
    "rows": lambda n, m: rows(n + 4, m)[4:],
    "every second": lambda n, m: rows(2 * n, 2 * m)[::2, ::2],
    "expanded": lambda n, m: rows(1, m).expand(n, m),
    "expanded columns": lambda n, m: rows(n, 1).expand(n, m),
}


def of_two(x: Tensor) -> Any:
    numbers = x.shape, x.shape[0] * x.shape[1], x.shape[0] == x.shape[1], x.shape[0] / x.shape[1]
    strides = x.stride(), x.is_contiguous(), x.T.is_contiguous()
    square = x @ x if x.shape[0] == x.shape[1] else x + 1
    flat = x.view(-1) if x.is_contiguous() else 2 * x.reshape(-1)
    return numbers, strides, square, flat.cumsum(0), x.T @ x, x[:, :, None] * x[:, None, :]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dims", [0, pytest.param(-1, marks=pytest.mark.slow), (-2, 1)], ids=str)
def test_any_dimension_in_any_layout(dims):
    jitted = jit(of_two, dynamic={"x": dims}, backend="replay", maxsize=200)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jit.*compiled 16 times")
        # Both sizes are equal at the first call.
        for (n, m), layout in itertools.product(((5, 5), (5, 7), (4, 1)), LAYOUTS.values()):
            equal(jitted(layout(n, m)), of_two(layout(n, m)))
    if isinstance(dims, tuple):
        graphs = jitted.cache_info().misses
        for n, m in ((6, 6), (6, 8), (8, 6), (10, 11)):
            equal(jitted(rows(n, m)), of_two(rows(n, m)))
        assert jitted.cache_info().misses == graphs


def test_a_slice_of_the_data_is_a_batch_as_any():
    data, jitted = rows(40), jit(lambda x: x.sum(0) / x.shape[0], dynamic="x", backend="replay")
    for start, stop in ((5, 12), (0, 7), (12, 40), (1, 4), (38, 40)):
        equal(jitted(data[start:stop]), data[start:stop].mean(0))
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("dynamic", [True, ["x", "y"], {"x": 0, "y": 0}, {"x": -2, "y": (-2,)}], ids=str)
def test_equal_sizes_are_tied_only_where_the_function_ties_them(dynamic):
    apart = jit(lambda x, y: (x.sum(0) + y.sum(0), x.shape[0] - y.shape[0]), dynamic=dynamic, backend="replay")
    together = jit(lambda x, y: x * y, dynamic=dynamic, backend="replay")
    for n, m in ((5, 5), (5, 7), (3, 2)):
        equal(apart(rows(n), rows(m)), (rows(n).sum(0) + rows(m).sum(0), n - m))
        equal(together(rows(n), rows(n)), rows(n).square())
    assert apart.cache_info().misses == together.cache_info().misses == 1
    for n, m in ((5, 1), (1, 5), (1, 1)):
        equal(together(rows(n), rows(m)), rows(n) * rows(m))
    assert together.cache_info().misses == 4
    with pytest.raises(RuntimeError, match="(?s)7.*5"):
        together(rows(5), rows(7))


def test_dimensions_in_a_tree():
    jitted = jit(lambda data: data["x"].sum(1) * data["y"] + data["n"], dynamic={"data": (0, 1)}, backend="replay")
    for n, m in ((3, 4), (5, 4), (5, 6)):
        data = {"x": rows(n, m), "y": torch.arange(1.0, n + 1), "n": torch.tensor(2.0)}
        equal(jitted(data), data["x"].sum(1) * data["y"] + 2)
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("dims", [2, -3, (0, 5)], ids=str)
def test_a_dimension_that_no_tensor_has(dims):
    jitted = jit(lambda x, y=None: x + 1, dynamic={"x": dims, "y": dims}, backend="replay")
    with pytest.raises(lt.InputError, match="(?s)'x' must have the dimension.*named dynamic.*shape \\(3, 4\\)"):
        jitted(rows(3))


@pytest.mark.parametrize("dims", ["0", 1.0, (0, True), [None]], ids=str)
def test_dimensions_that_are_no_numbers(dims):
    with pytest.raises(lt.InputError, match="dynamic dimensions of 'x' must be ints"):
        jit(lambda x: x, dynamic={"x": dims})


def test_a_name_that_the_function_lacks():
    with pytest.raises(lt.KeyNameError, match="no argument 'z'"):
        jit(lambda x: x, dynamic={"z": 0})


def objective(model: Any, ps: Any, st: Any, data: Any) -> Any:
    y, st = model(data[0], ps, st)
    return lt.MSELoss()(y, data[1]), st, {"count": data[0].shape[0], "seen": torch.full((), data[0].shape[0])}


@pytest.mark.parametrize("tree", ["dict", "vector"])
@pytest.mark.parametrize("donate", [(), "ts"], ids=str)
@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_steps(make_state, rng, same, backend, donate, tree):
    def step(ts, data, mode):
        _, value, stats, ts = training.single_train_step(objective, data, ts)
        return value, stats, ts

    model = lt.Chain(lt.Dense(3, 5, torch.tanh), lt.BatchNorm(5), lt.Dropout(0.3), lt.Dense(5, 2))
    jitted = jit(step, dynamic="data", donate=donate, backend=backend)
    ts, expected = make_state(model, tree=tree), make_state(model, tree=tree)
    ts = training.TrainState(
        model, *optree.tree_map(torch.clone, (expected.parameters, expected.states)), expected.rule
    )
    for n in (*SIZES, 1 + 1):
        data = torch.randn(n, 3, generator=rng), torch.randn(n, 2, generator=rng)
        got, other = jitted(ts, data, lt.Static("train")), step(expected, data, None)
        assert got[1]["count"] == n and type(got[1]["count"]) is int
        same(got[:2], other[:2], 1e-4)
        ts, expected = got[2], other[2]
    same(ts.parameters, expected.parameters, 1e-4)
    assert jitted.cache_info().misses == 1


@pytest.mark.slow
def test_a_donated_tensor_takes_no_output_of_another_size():
    jitted = jit(lambda state, x: (x + 1, state.sum()), donate="state", dynamic="x", backend="inductor")
    for n in (512, 600, 512, 300):
        state, x = torch.ones(512, 64), torch.ones(n, 64)
        y, total = jitted(state, x)
        assert y.shape == (n, 64) and bool((y == 2).all()) and total == 512 * 64
    # Inductor makes one loop of both where they are of one size.
    assert jitted.cache_info().misses == 2


def test_what_a_compiler_assumes_is_checked():
    def picky(graph, fakes):
        assert fakes[0].shape[0] < 10 or fakes[0].shape[0] >= 10
        return graph

    jitted = jit(lambda x: x + 1, dynamic="x", backend=picky)
    for n in (7, 12, 3, 20):
        equal(jitted(rows(n)), rows(n) + 1)
    assert jitted.cache_info().misses == 2


@pytest.mark.parametrize("size", [0, 1, 7])
def test_settings_and_kinds_of_tensors(size):
    jitted = jit(lambda x: (x * 2, x.shape[0]), dynamic="x", backend="replay")
    complex_rows = torch.complex(rows(size), rows(size))
    with torch.inference_mode():
        inside = rows(size)
        equal(jitted(inside)[0], inside * 2)
    for x in (complex_rows, complex_rows.conj(), rows(size).double(), inside):
        equal(jitted(x), (x * 2, size))
    with torch.no_grad(), torch.autocast("cpu"):
        equal(jitted(rows(size)), (rows(size) * 2, size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["n / 4", "n deep in a tree", "x * (1 / n)", "vmap", "per_sample_gradients", "time first"]
)
@pytest.mark.parametrize("recorded", [False, True])
def test_inductor(name, recorded):
    function = ONE_GRAPH[name]
    jitted = jit(lambda x, w: function(x * w), dynamic="x", backend="inductor")
    for n in SIZES:
        w, x = torch.full((4,), 0.5, requires_grad=recorded), rows(n)
        equal(jitted(x, w), function(x * w))
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("dynamic", [(), (0,)], ids=["fixed", "dynamic"])
def test_conditions_leave_out_the_symbols_of_a_compiler(dynamic):
    """Such as the step of a loop, of which torch 2.13 asks whether it is an index."""
    sizes = Sizes()
    fake = sizes.fake(torch.ones(5), 0, dynamic)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    (step,), _, _ = sizes._environment.create_symbolic_sizes_strides_storage_offset(
        torch.ones(9), ConstantSource("step"), symbolic_context=context
    )
    assert step % 4 == 1 and fake.shape[0] < 7
    condition = sizes.condition([fake])
    if dynamic:
        assert condition([torch.ones(6)]) and not condition([torch.ones(7)])
    else:
        assert condition is None
