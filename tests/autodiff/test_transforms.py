"""Every function of the folder under every transform, and the transforms in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad

from luxtorch.autodiff import (
    GGNVec,
    HesVec,
    JacVec,
    batched_jacobian,
    gradient,
    hessian,
    hessian_diagonal,
    hvp,
    jacobian,
    jacobian_vector_product,
    linearize,
    pullback,
    pushforward,
    vector_jacobian_product,
    withgradient,
)

ONES = torch.ones(4, 2, dtype=torch.float64)


def cubes(outputs: Tensor) -> Tensor:
    return (outputs**3).sum()


# Each takes a problem to a function of its parameters.
FUNCTIONS: dict[str, Callable] = {
    "gradient": lambda p: lambda ps: gradient(p.loss, ps),
    "gradient forward": lambda p: lambda ps: gradient(p.loss, ps, mode="forward"),
    "gradient chunked": lambda p: lambda ps: gradient(p.loss, ps, mode="forward", chunk_size=4),
    "withgradient": lambda p: lambda ps: withgradient(p.loss, ps),
    "pullback": lambda p: lambda ps: pullback(p.net, ps)[1](ONES),
    "pushforward": lambda p: lambda ps: pushforward(p.net, ps)(ps),
    "jvp": lambda p: lambda ps: jacobian_vector_product(p.net, ps, ps),
    "vjp": lambda p: lambda ps: vector_jacobian_product(p.net, ps, ONES),
    "hvp": lambda p: lambda ps: hvp(p.loss, ps, ps),
    "hvp forward": lambda p: lambda ps: hvp(p.loss, ps, ps, mode="forward"),
    "jacobian": lambda p: lambda ps: jacobian(p.net, ps),
    "jacobian chunked": lambda p: lambda ps: jacobian(p.net, ps, chunk_size=1),
    "jacobian forward": lambda p: lambda ps: jacobian(p.net, ps, mode="forward"),
    "hessian": lambda p: lambda ps: hessian(p.loss, ps),
    "hessian forward": lambda p: lambda ps: hessian(p.loss, ps, mode="forward"),
    "batched_jacobian": lambda p: lambda ps: batched_jacobian(lambda s: s * p.net(ps), ONES),
    "batched_jacobian forward": lambda p: lambda ps: batched_jacobian(lambda s: s * p.net(ps), ONES, mode="forward"),
    "JacVec": lambda p: lambda ps: JacVec(p.net, ps)(ps),
    "JacVec.T": lambda p: lambda ps: JacVec(p.net, ps).T(ONES),
    "HesVec": lambda p: lambda ps: HesVec(p.loss, ps)(ps),
    "HesVec forward": lambda p: lambda ps: HesVec(p.loss, ps, mode="forward")(ps),
    "linearize": lambda p: lambda ps: linearize(p.net, ps)[1](ps),
    "JacVec reverse": lambda p: lambda ps: JacVec(p.net, ps, mode="reverse")(ps),
    "GGNVec": lambda p: lambda ps: GGNVec(p.net, cubes, ps)(ps),
    "GGNVec forward": lambda p: lambda ps: GGNVec(p.net, cubes, ps, mode="forward")(ps),
    "GGNVec.diagonal": lambda p: lambda ps: GGNVec(p.net, cubes, ps).diagonal(chunk_size=3),
    "hessian_diagonal": lambda p: lambda ps: hessian_diagonal(p.loss, ps),
    "2 HesVec + 1": lambda p: lambda ps: (2 * HesVec(p.loss, ps) + 1)(ps),
}
WITH_JVP = {name for name in FUNCTIONS if "forward" in name or name in ("gradient chunked", "jvp", "JacVec")}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def leaves(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree)


@pytest.fixture
def case(problem, name: str) -> tuple[Any, Callable, Callable[[Tensor], Tensor]]:
    """The problem, the function of its parameters, and the same as a scalar function of a flat vector."""
    f = FUNCTIONS[name](problem)
    return problem, f, lambda flat: sum((leaf**2).sum() for leaf in leaves(f(problem.unravel(flat))))


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    step = 1e-5
    return (f(x + step * u) - f(x - step * u)) / (2 * step)


# A compilation takes seconds: the plain kinds of each idea run always, the rest when there is time.
ALWAYS = {
    "dict": {"gradient", "pushforward", "jacobian", "HesVec"},
    "ComponentVector": {"withgradient", "pullback", "hessian"},
    "tensor": {"hvp forward"},
}


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        pytest.param(kind, name, marks=() if name in ALWAYS[kind] else pytest.mark.slow)
        for kind in ALWAYS
        for name in FUNCTIONS
    ],
    indirect=["problem"],
)
def test_compile(case, name) -> None:
    problem, f, _ = case
    expected = f(problem.ps)
    found = torch.compile(f, backend="aot_eager", fullgraph=True)(problem.ps)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(leaves(found), leaves(expected))


@every_function
def test_vmap(case, name) -> None:
    problem, f, _ = case
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)
    ps = torch.func.vmap(lambda s: pytree.tree_map(lambda leaf: leaf * s, problem.ps))(scales)
    found = torch.func.vmap(f)(ps)
    for i, scale in enumerate(scales):
        one = f(pytree.tree_map(lambda leaf: leaf * scale, problem.ps))  # noqa: B023
        assert type(one) is type(found)
        torch.testing.assert_close([leaf[i] for leaf in leaves(found)], leaves(one))


@every_function
def test_an_outer_tape_sees_through(case, name) -> None:
    problem, _, scalar = case
    flat = problem.ravel(problem.ps).requires_grad_()
    (slope,) = torch.autograd.grad(scalar(flat), flat)
    u = problem.ravel(problem.direction)
    expected = finite_difference(scalar, flat.detach(), u)
    torch.testing.assert_close(slope @ u, expected, rtol=1e-6, atol=1e-6)


# torch has one level of plain forward mode: a torch.func.jvp within it raises.
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WITH_JVP])
def test_an_outer_dual_sees_through(case, name) -> None:
    problem, _, scalar = case
    flat, u = problem.ravel(problem.ps), problem.ravel(problem.direction)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(scalar(forward_ad.make_dual(flat, u))).tangent
    torch.testing.assert_close(tangent, finite_difference(scalar, flat, u), rtol=1e-6, atol=1e-6)


@every_function
@pytest.mark.parametrize("outer", ["gradient", "pushforward", "vmap of grad"])
def test_an_outer_level_sees_through(case, name, outer) -> None:
    problem, _, scalar = case
    flat, u = problem.ravel(problem.ps), problem.ravel(problem.direction)
    slope = {
        "gradient": lambda: gradient(scalar, flat) @ u,
        "pushforward": lambda: pushforward(scalar, flat)(u)[1],
        "vmap of grad": lambda: (torch.func.vmap(torch.func.grad(scalar))(flat[None]) @ u)[0],
    }[outer]()
    torch.testing.assert_close(slope, finite_difference(scalar, flat, u), rtol=1e-6, atol=1e-6)


@every_function
def test_no_grad_outside_changes_nothing(case, name) -> None:
    problem, f, _ = case
    with torch.no_grad():
        found = f(problem.ps)
    torch.testing.assert_close(leaves(found), leaves(f(problem.ps)))


# Three deep, in any order: each takes a scalar function to its derivative along the ones.
STEPS: dict[str, Callable] = {
    "gradient": lambda f: lambda x: gradient(f, x).sum(),
    "gradient forward": lambda f: lambda x: gradient(f, x, mode="forward").sum(),
    "jvp": lambda f: lambda x: jacobian_vector_product(f, x, torch.ones_like(x)),
    "vjp": lambda f: lambda x: vector_jacobian_product(f, x, torch.ones_like(f(x))).sum(),
    "jacobian": lambda f: lambda x: jacobian(lambda x: f(x)[None], x, mode="forward", chunk_size=1).sum(),
    "vmap": lambda f: lambda x: torch.func.vmap(lambda x: gradient(f, x))(x[None]).sum(),
    "JacVec": lambda f: lambda x: (JacVec(f, x).T @ torch.ones_like(f(x))).sum(),
    "linearize": lambda f: lambda x: linearize(f, x)[1](torch.ones_like(x)),
}


@pytest.mark.parametrize("third", STEPS)
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_any_order(first: str, second: str, third: str) -> None:
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    slope = STEPS[third](STEPS[second](STEPS[first](lambda x: (x**4).sum())))
    torch.testing.assert_close(slope(x), (24 * x).sum())


def test_hessians_through_other_products(problem) -> None:
    expected = leaves(hvp(problem.loss, problem.ps, problem.direction))
    by_pushforward = pushforward(lambda ps: gradient(problem.loss, ps), problem.ps)(problem.direction)[1]
    by_gradient = gradient(lambda ps: jacobian_vector_product(problem.loss, ps, problem.direction), problem.ps)
    by_operator = JacVec(lambda ps: gradient(problem.loss, ps), problem.ps) @ problem.direction
    for found in (by_pushforward, by_gradient, by_operator):
        torch.testing.assert_close(leaves(found), expected)


def test_the_gradient_of_a_loss_with_a_product_inside(problem) -> None:
    """A loss with a derivative in it, as of a physics-informed network, against finite differences."""

    def loss(flat: Tensor) -> Tensor:
        slope = gradient(problem.loss, problem.unravel(flat))
        return jacobian_vector_product(problem.net, problem.unravel(flat), slope).pow(2).sum()

    flat, u = problem.ravel(problem.ps), problem.ravel(problem.direction)
    torch.testing.assert_close(gradient(loss, flat) @ u, finite_difference(loss, flat, u), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: JacVec(lambda x: x**3, x),
        lambda x: JacVec(lambda x: x**3, x, mode="reverse"),
        lambda x: HesVec(lambda x: (x**4).sum() / 4, x),
        lambda x: GGNVec(lambda x: x**3, lambda y: (y**2 / x**2 / 6).sum(), x),
        lambda x: HesVec(lambda x: (x**4).sum() / 8, x) * 2,
    ],
    ids=["JacVec", "JacVec reverse", "HesVec", "GGNVec", "2 HesVec"],
)
def test_operators_made_outside_of_a_transform(operator: Any) -> None:
    x = torch.tensor([1.0, 2.0])
    made = operator(x)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    expected = vectors * 3 * x**2
    torch.testing.assert_close(torch.func.vmap(lambda v: made @ v)(vectors), expected)
    torch.testing.assert_close(torch.func.vmap(lambda v: made.T @ v)(vectors), expected)
    torch.testing.assert_close(torch.func.grad(lambda v: (made @ v).sum())(vectors[0]), 3 * x**2)
    compiled = torch.compile(lambda v: made.T(v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(vectors[2]), expected[2])
