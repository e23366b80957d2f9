"""Gradients: their values over every kind of tree, auxiliary outputs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from luxtorch.autodiff import gradient, hessian, jacobian, pullback, pushforward, withgradient
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, Static

REVERSE = {"mode": "reverse"}
FORWARD = {"mode": "forward"}
WAYS = [REVERSE, FORWARD, {**FORWARD, "chunk_size": 1}, {**FORWARD, "chunk_size": 4}, {**FORWARD, "chunk_size": 100}]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)

trees = some.recursive(
    some.builds(
        lambda shape, numbers: torch.tensor(numbers[:6], dtype=torch.float64)[: shape[0] * shape[1]].reshape(shape),
        some.sampled_from([(1, 1), (2, 3), (3, 1), (0, 2)]),
        some.lists(some.floats(-2, 2), min_size=6, max_size=6),
    )
    | some.just(Static("a")),
    lambda inner: (
        some.dictionaries(some.text("abc", max_size=2), inner, max_size=3)
        | some.lists(inner, max_size=3)
        | some.tuples(inner, inner)
    ),
    max_leaves=6,
)


def squares(tree: Any) -> Tensor:
    return sum((leaf**2).sum() for leaf in pytree.tree_leaves(tree)) + torch.zeros((), dtype=torch.float64)


@every_way
def test_against_autograd(problem, way) -> None:
    flat = problem.ravel(problem.ps).requires_grad_()
    (expected,) = torch.autograd.grad(problem.flat(problem.loss)(flat), flat)
    value, slope = withgradient(problem.loss, problem.ps, **way)
    assert pytree.tree_structure(slope) == pytree.tree_structure(problem.ps)
    assert type(slope) is type(problem.ps)
    torch.testing.assert_close(problem.ravel(slope), expected)
    torch.testing.assert_close(value, problem.loss(problem.ps))
    torch.testing.assert_close(problem.ravel(gradient(problem.loss, problem.ps, **way)), expected)


@every_way
@given(tree=trees)
def test_any_tree_comes_back_as_it_is(way, tree) -> None:
    slope = gradient(squares, tree, **way)
    assert pytree.tree_structure(slope) == pytree.tree_structure(tree)
    expected = [2 * leaf for leaf in pytree.tree_leaves(tree)]
    torch.testing.assert_close(pytree.tree_leaves(slope), expected)


@every_way
def test_several_arguments_give_a_tuple(way) -> None:
    a, b = torch.tensor([1.0, 2.0]), {"b": torch.tensor(3.0)}
    value, slopes = withgradient(lambda a, b: (a**2).sum() * b["b"], a, b, **way)
    torch.testing.assert_close((value, slopes), (torch.tensor(15.0), (6 * a, {"b": torch.tensor(5.0)})))


@every_way
def test_each_leaf_keeps_its_dtype(way) -> None:
    ps = {"half": torch.ones(2, dtype=torch.bfloat16), "double": torch.ones(1, dtype=torch.float64)}
    slope = gradient(lambda ps: (ps["half"].sum() * ps["double"]).float().sum(), ps, **way)
    torch.testing.assert_close(slope, {"half": torch.ones(2, dtype=torch.bfloat16), "double": 2 * ps["double"]})


@every_way
def test_without_parameters(way) -> None:
    assert gradient(lambda ps: torch.ones(()), {"layer": {}}, **way) == {"layer": {}}


@every_way
def test_unused_leaves_have_a_zero_gradient(way) -> None:
    slope = gradient(lambda ps: ps["used"].sum(), {"used": torch.ones(2), "unused": torch.ones(3)}, **way)
    torch.testing.assert_close(slope["unused"], torch.zeros(3))


def test_complex_leaves_follow_torch() -> None:
    z = torch.tensor([3 + 4j, 1j])
    torch.testing.assert_close(gradient(lambda z: (z.abs() ** 2).sum(), z), 2 * z)


def test_nothing_is_recorded_and_nothing_is_mutated(problem) -> None:
    before = problem.ravel(problem.ps).clone()
    value, slope = withgradient(problem.loss, problem.ps)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves((value, slope, problem.ps)))
    assert torch.equal(problem.ravel(problem.ps), before)


# Auxiliary outputs.

AUX = {
    "tensors": {"y": torch.ones(2), "vector": ComponentVector({"a": torch.ones(1)})},
    "bool": True,
    "int": 3,
    "str": "text",
    "none": None,
    "static": Static("b"),
    "empty": {},
    "unhashable": {1, 2},
}


def check_aux(aux: dict) -> None:
    torch.testing.assert_close(aux["tensors"]["y"], torch.ones(2))
    assert isinstance(aux["tensors"]["vector"], ComponentVector)
    assert {name: value for name, value in aux.items() if name != "tensors"} == {
        name: value for name, value in AUX.items() if name != "tensors"
    }


@every_way
@pytest.mark.parametrize("run", [lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)])
def test_auxiliary_outputs_need_not_be_tensors(way, run: Callable) -> None:
    def loss(x: Tensor) -> tuple[Tensor, dict]:
        return (x**2).sum(), {**AUX, "x": x}

    x = torch.tensor([1.0, 2.0])
    (value, aux), slope = run(lambda x: withgradient(loss, x, has_aux=True, **way))(x)
    torch.testing.assert_close((value, slope, aux.pop("x")), (torch.tensor(5.0), 2 * x, x))
    check_aux(aux)
    slope, aux = gradient(loss, x, has_aux=True, **way)
    torch.testing.assert_close((slope, aux.pop("x")), (2 * x, x))
    check_aux(aux)


@pytest.mark.parametrize("outer", WAYS[:2], ids=str)
@pytest.mark.parametrize("inner", WAYS[:2], ids=str)
@pytest.mark.parametrize("run", [lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)])
def test_auxiliary_outputs_nest(outer, inner, run: Callable) -> None:
    def loss(x: Tensor) -> tuple[Tensor, dict]:
        return (x**3).sum(), dict(AUX)

    def second(x: Tensor) -> tuple[Tensor, Any]:
        slope, aux = gradient(loss, x, has_aux=True, **inner)
        return slope.sum(), (aux, "outer")

    x = torch.tensor([1.0, 2.0])
    slope, (aux, name) = run(lambda x: gradient(second, x, has_aux=True, **outer))(x)
    torch.testing.assert_close(slope, 6 * x)
    check_aux(aux)
    assert name == "outer"


@every_way
def test_auxiliary_outputs_under_vmap(way) -> None:
    def loss(x: Tensor) -> tuple[Tensor, dict]:
        return (x**2).sum(), {"training": Static(True), "steps": 3, "y": 2 * x}

    def each(x: Tensor) -> tuple[Tensor, dict]:
        slope, aux = gradient(loss, x, has_aux=True, **way)
        assert aux.pop("steps") == 3  # vmap itself lets no number through
        return slope, aux

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    slope, aux = torch.func.vmap(each)(x)
    torch.testing.assert_close((slope, aux["y"]), (2 * x, 2 * x))
    assert aux["training"] == Static(True)


# Errors.


@every_way
@pytest.mark.parametrize(
    ("f", "got", "fix"),
    [
        (lambda x: x, r"float32 tensor of shape \(2,\)", "jacobian"),
        (lambda x: x.sum()[None], r"float32 tensor of shape \(1,\)", "jacobian"),
        (lambda x: 1.0, "float", "sum"),
        (lambda x: (x.sum(), {}), "tuple", "has_aux=True"),
    ],
)
def test_the_function_must_return_a_scalar(way, f: Callable, got: str, fix: str) -> None:
    with pytest.raises(InputError, match=f"must return a scalar to have a gradient(.|\n)*{got}(.|\n)*{fix}"):
        gradient(f, torch.ones(2), **way)


@every_way
@pytest.mark.parametrize(("cast", "got"), [(torch.Tensor.int, "int32"), (lambda y: y * 1j, "complex64")])
def test_the_scalar_must_be_real(way, cast: Callable, got: str) -> None:
    with pytest.raises(DTypeError, match=f"must return a real floating point scalar(.|\n)*{got}"):
        gradient(lambda x: cast(x.sum()), torch.ones(2), **way)


@every_way
@pytest.mark.parametrize(
    ("leaf", "got"),
    [
        (torch.arange(3), r"int64 tensor of shape \(3,\)"),
        (torch.tensor(True), "bool tensor"),
        (2.0, "float"),
        (None, "NoneType"),
    ],
)
def test_leaves_that_cannot_be_differentiated_are_named(way, leaf: Any, got: str) -> None:
    ps = {"dense": {"weight": torch.ones(2), "index": leaf}}
    for xs, name in [((ps,), "x.dense.index"), ((torch.ones(1), ps), "argument 1.dense.index"), ((leaf,), "x")]:
        with pytest.raises(DTypeError, match=f"'{name}' must be a.*tensor(.|\n)*{got}(.|\n)*Close over it"):
            gradient(lambda *xs: torch.ones(()), *xs, **way)


def test_forward_mode_refuses_complex_leaves() -> None:
    with pytest.raises(DTypeError, match="'x.z' must be a.*tensor(.|\n)*complex64(.|\n)*view_as_real"):
        gradient(lambda ps: ps["z"].abs(), {"z": torch.tensor(1j)}, mode="forward")


@every_way
@pytest.mark.parametrize(
    ("output", "got"), [(torch.ones(()), "float32"), ((torch.ones(()), 1, 2), "tuple of length 3")]
)
def test_has_aux_needs_a_pair(way, output: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"must return a pair(.|\n)*{got}"):
        gradient(lambda x: output, torch.ones(()), has_aux=True, **way)


def test_unknown_modes_and_chunk_sizes() -> None:
    with pytest.raises(InputError, match="mode must be 'reverse' or 'forward'(.|\n)*Did you mean 'forward'"):
        gradient(torch.sum, torch.ones(2), mode="foward")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk_size must be at least 1(.|\n)*0"):
        gradient(torch.sum, torch.ones(2), mode="forward", chunk_size=0)


@pytest.mark.parametrize(
    "function",
    [gradient, lambda f: gradient(f, mode="forward"), withgradient, jacobian, hessian, pullback, pushforward],
)
def test_the_arguments_come_with_the_function(function: Callable) -> None:
    with pytest.raises(InputError, match=r"nothing to differentiate by(.|\n)*gradient\(f, x\)"):
        function(torch.sum)


def test_errors_of_the_function_pass_through() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        gradient(broken, torch.ones(2))
