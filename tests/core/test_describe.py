"""`describe`: the statistics are those of the numbers, and whatever is in a tree, it is shown."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import luxtorch as lt
from luxtorch import InputError
from luxtorch.core import describe, tree_map
from luxtorch.core._statistics import Statistics
from luxtorch.core._table import Line, runs, text

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
NUMBERS = st.floats(-100, 100, width=16)


class Pair(NamedTuple):
    """A node that trees may have."""

    first: torch.Tensor
    second: torch.Tensor


def row(description, name):
    """Return the cells of the line that begins with a name."""
    return next(line.split() for line in repr(description).splitlines() if line.split()[:1] == [name])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 2, 1, 4)])
def test_statistics_are_those_of_torch(rng, dtype, shape):
    x = (10 * torch.randn(shape, generator=rng)).abs().to(dtype)
    x = x * (1 - 2j) if dtype.is_complex else x
    numbers = x.abs().double() if dtype.is_complex else x.double()
    wanted = numbers.min(), numbers.max(), numbers.mean(), numbers.std(correction=0)
    got = row(describe({"other": torch.ones(2), "x": x}), "x")
    assert got[-4:] == [f"{value.item():.4g}" for value in wanted]
    assert " ".join(got[1:]).startswith(str(shape))


@given(
    st.lists(st.lists(NUMBERS | st.sampled_from([torch.nan, torch.inf, -torch.inf]), min_size=1), min_size=1),
    st.sampled_from(FLOATS),
)
def test_the_statistics_of_parts_are_those_of_the_whole(parts, dtype):
    tensors = [torch.tensor(part, dtype=dtype) for part in parts]
    got, wanted = (
        Statistics.pooled(list(map(Statistics.of, tensors))),
        Statistics.of(torch.cat([tensor.double() for tensor in tensors]).to(dtype)),
    )
    assert (got.shape, got.dtype, got.nan, got.inf) == (wanted.shape, wanted.dtype, wanted.nan, wanted.inf)
    for name in ("minimum", "maximum", "mean", "std"):
        assert getattr(got, name) == pytest.approx(getattr(wanted, name), abs=1e-6, nan_ok=True)


def test_lines_are_those_of_the_tree():
    tree = {"a": {"weight": torch.tensor([[1.0, torch.nan], [5.0, torch.inf]]), "empty": {}}, "rate": torch.tensor(0.5)}
    assert repr(describe(tree)).splitlines() == [
        "                                         shape   min  max   mean    std",
        "dict of 5 elements (torch.float32, cpu)          0.5    5  2.167  2.014  1 NaN, 1 Inf",
        "  a 4 elements                                     1    5      3      2  1 NaN, 1 Inf",
        "    weight                               (2, 2)    1    5      3      2  1 NaN, 1 Inf",
        "    empty (empty)",
        "  rate = 0.5                             ()",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1234567"), (True, "True"), (0.1, "0.1"), (-0.0, "0"), (1234567.0, "1.235e+06"), (3 + 4j, "3+4j")],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_number_is_shown_itself(value, shown, shape):
    tree = {"x": torch.tensor(value).reshape(shape)}
    assert repr(describe(tree)).splitlines()[-1].split() == ["x", "=", shown, *str(shape).split()]


def test_dtypes_and_devices_are_told_where_they_differ():
    same, other = {"a": torch.ones(2), "b": torch.zeros(3)}, {"a": torch.ones(2), "b": torch.empty(3, device="meta")}
    assert "(torch.float32, cpu)" in repr(describe(same)).splitlines()[1]
    assert " ".join(row(describe(other), "b")) == "b (3,) torch.float32, meta"
    assert repr(describe(other)).splitlines()[1].startswith("dict of 5 elements  ")


def test_integers_are_not_among_the_numbers_of_a_group():
    lines = repr(describe({"count": torch.tensor([900, 901]), "x": torch.tensor([1.0, 3.0])})).splitlines()
    assert lines[1].split()[-4:] == ["1", "3", "2", "1"]
    assert lines[2].split()[-4:] == ["900", "901", "900.5", "0.5"]


def test_depth_is_a_number_of_levels():
    ps = lt.initial_parameters(0, lt.Chain(lt.Dense(2, 3), lt.Chain(lt.Dense(3, 3), lt.Dense(3, 1))))
    everything = repr(describe(ps)).splitlines()
    assert len(everything) == 1 + 1 + 3 + (1 + 3 + 3)
    for depth in range(5):
        got = repr(describe(ps, depth=depth)).split("\n")[1:]
        levels = [(len(line) - len(line.lstrip())) // 2 for line in got]
        assert max(levels) == min(depth, 3)
        assert [line.split() for line in got] == [
            line.split() for line in everything[1:] if (len(line) - len(line.lstrip())) // 2 <= depth
        ]


def test_like_groups_of_a_big_tree_are_one_line_but_for_those_to_worry_about():
    def layer(value):
        return {"weight": torch.full((2, 2), value), "bias": torch.tensor([0.0, value])}

    def lines(layers):
        tree = {f"layer_{i}": layer for i, layer in enumerate(layers, 1)}
        return [line.split() for line in repr(describe(tree)).splitlines()[2:]]

    layers = [layer(float(i)) for i in range(40)]
    values = torch.tensor([number for i in range(40) for number in (i, i, i, i, 0, i)], dtype=torch.float64)
    wanted = f"layer_(1-40) 40 x 6 elements 0 39 {values.mean():.4g} {values.std(correction=0):.4g}"
    assert lines(layers) == [wanted.split()]
    layers[20]["bias"] = torch.tensor([torch.nan, 2.0])
    names = [line[0] for line in lines(layers)]
    assert names == ["layer_(1-40)", "layer_21", "weight", "bias"]
    layers[30] = {"weight": torch.ones(4)}
    assert [line[0] for line in lines(layers)] == [
        *("layer_(1-30)", "layer_21", "weight", "bias"),
        *("layer_31", "weight", "layer_(32-40)"),
    ]
    assert len(lines(layers[:20])) == 20 * 3


@given(st.lists(st.tuples(st.sampled_from(["a_1", "a_2", "a_3", "b", "2", "3"]), st.integers(0, 1)), max_size=9))
def test_runs_cover_everything_once_and_in_order(items):
    found = list(runs(items))
    covered = [items[start + i] for _, start, length in found for i in range(length)]
    assert covered == items
    for name, start, length in found:
        assert len({value for _, value in items[start : start + length]}) == 1
        assert name == items[start][0] if length == 1 else "-" in name


ODD = {
    "empty": lambda: torch.zeros(0, 3),
    "random key": lambda: torch.zeros(2, dtype=torch.uint64),
    "float4": lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "meta": lambda: torch.empty(3, device="meta"),
    "parameter of a lazy module": nn.UninitializedParameter,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "None": lambda: None,
    "string": lambda: "<b>",
    "layer": lambda: lt.Dense(1, 1),
    "vector of placeholders": lambda: tree_map(lambda leaf: None, lt.ComponentVector({"a": torch.ones(2)})),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_what_has_no_numbers_is_shown_without(name):
    tree = {"it": ODD[name](), "x": torch.ones(2)}
    line = repr(describe(tree)).splitlines()[2]
    assert line.split()[0] == "it"
    assert not line.endswith(("0", "NaN"))
    assert describe(tree)._repr_html_()


@pytest.mark.parametrize(
    "tree",
    [
        [torch.ones(2), torch.zeros(2)],
        (torch.ones(2), torch.zeros(2)),
        Pair(torch.ones(2), torch.zeros(2)),
        deque([torch.ones(2), torch.zeros(2)]),
        OrderedDict(first=torch.ones(2), second=torch.zeros(2)),
        lt.ComponentVector({"first": torch.ones(2), "second": torch.zeros(2)}),
        {1: nn.Parameter(torch.ones(2)), 2: torch.zeros(2)},
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_every_kind_of_tree_is_described(tree):
    lines = repr(describe(tree)).splitlines()
    assert f"{type(tree).__name__} of 4 elements" in lines[1]
    assert lines[1].split()[-4:] == ["0", "1", "0.5", "0.5"]
    assert [line.split()[-4:] for line in lines[2:]] == [["1", "1", "1", "0"], ["0", "0", "0", "0"]]


def test_a_tensor_alone_is_described():
    assert repr(describe(torch.tensor([1.0, 3.0]))).splitlines()[1].split()[-5:] == ["(2,)", "1", "3", "2", "1"]


WATCHED = {
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(x[None]),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx, symbolic": lambda f, x: make_fx(f, tracing_mode="symbolic")(x),
    "jit": lambda f, x: lt.jit(f)(x),
}


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_traced_shows_its_shape_and_nothing_is_recorded(name):
    seen = []

    def function(x):
        for tree in ({"x": x, "outside": outside}, lt.ComponentVector({"x": x})):
            seen.extend((repr(describe(tree)), describe(tree)._repr_html_()))
        return x.sum()

    outside, x = torch.tensor([7.5, 8.5]), torch.tensor([1.0, 2.0, 3.0])
    result = WATCHED[name](function, x)
    assert len(seen) >= 4 and all("x" in page for page in seen)
    shape = next(line for line in seen[0].splitlines() if line.split()[0] == "x")
    assert shape.rstrip()[-1] in "),utd" and "(" in shape  # no number after the shape and the dtype
    if isinstance(result, torch.fx.GraphModule):
        assert "min" not in result.code and "isnan" not in result.code


def test_fake_tensors_have_no_numbers():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(3))
        inside = repr(describe({"fake": fake}))
    assert "FakeTensor" in inside and "(3,)" in inside and "mean" not in inside
    assert "mean" not in repr(describe({"fake": fake}))


def test_tensors_that_left_their_transform_are_shown():
    left = []
    torch.vmap(lambda x: left.append(x) or x)(torch.ones(2, 3))
    assert "(3,)" in repr(describe(left)) and "traced" in repr(describe(left))


def test_numbers_are_read_when_they_are_shown_and_nothing_is_changed():
    x = torch.zeros(2, requires_grad=True)
    description = describe({"x": x})
    with torch.no_grad():
        x += 3
    version = x._version
    assert row(description, "x")[-4:] == ["3", "3", "3", "0"]
    assert x.grad is None and x._version == version


@pytest.mark.parametrize(
    "value", [3, None, "ps", lt.Dense(2, 2), nn.Linear(2, 2)], ids=lambda value: type(value).__name__
)
def test_what_is_no_tree_is_refused(value):
    with pytest.raises(InputError, match="tree must be a tree of tensors") as caught:
        describe(value)
    assert type(value).__name__ in str(caught.value) and "print(model)" in str(caught.value)


def test_a_negative_depth_is_refused():
    with pytest.raises(InputError, match="depth must be at least 0"):
        describe({}, depth=-1)


def test_a_table_without_columns_has_no_head():
    assert text(("a", "b"), Line("root", below=(Line("leaf", "it"),))) == "root\n  leaf it"
    assert repr(describe({})) == "dict of 0 elements"
