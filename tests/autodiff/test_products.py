"""Products with Jacobians and Hessians, against torch.autograd.functional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import functional

from luxtorch.autodiff import hvp, jacobian_vector_product, pullback, pushforward, vector_jacobian_product
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, Static


def test_forward_products(problem) -> None:
    value, expected = functional.jvp(
        problem.flat(problem.net), problem.ravel(problem.ps), problem.ravel(problem.direction)
    )
    torch.testing.assert_close(pushforward(problem.net, problem.ps)(problem.direction), (value, expected))
    torch.testing.assert_close(jacobian_vector_product(problem.net, problem.ps, problem.direction), expected)


def test_reverse_products(problem) -> None:
    u = torch.cos(torch.arange(8.0, dtype=torch.float64)).view(4, 2)
    value, expected = functional.vjp(problem.flat(problem.net), problem.ravel(problem.ps), u)
    mine, back = pullback(problem.net, problem.ps)
    torch.testing.assert_close(mine, value)
    for product in (back(u), back(u), vector_jacobian_product(problem.net, problem.ps, u)):
        assert type(product) is type(problem.ps)
        assert pytree.tree_structure(product) == pytree.tree_structure(problem.ps)
        torch.testing.assert_close(problem.ravel(product), expected)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves((mine, back(u))))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_hessian_products(problem, mode) -> None:
    _, expected = functional.hvp(
        problem.flat(problem.loss), problem.ravel(problem.ps), problem.ravel(problem.direction)
    )
    product = hvp(problem.loss, problem.ps, problem.direction, mode=mode)
    assert type(product) is type(problem.ps)
    torch.testing.assert_close(problem.ravel(product), expected)


def test_the_tutorial() -> None:
    x, v = torch.tensor([-0.5, 1.0, 2.0]), torch.ones(3)
    pf = pushforward(lambda x: x * x / 2, x)
    value, jvp = pf(v)
    torch.testing.assert_close((value, jvp), (x * x / 2, x))
    torch.testing.assert_close(pf(2 * v)[1], 2 * x)


def test_outputs_of_any_tree() -> None:
    def f(p: dict) -> dict:
        return {"sum": p["a"].sum(), "rest": (p["a"] * p["b"], ComponentVector({"c": p["b"]}))}

    p = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    value, back = pullback(f, p)
    torch.testing.assert_close(pytree.tree_leaves(value), pytree.tree_leaves(f(p)))
    torch.testing.assert_close(back(value), {"a": torch.tensor([12.0, 21.0]), "b": torch.tensor(18.0)})
    product = jacobian_vector_product(f, p, p)
    assert pytree.tree_structure(product) == pytree.tree_structure(value)
    torch.testing.assert_close(product["rest"][0], 2 * value["rest"][0])


def test_several_arguments() -> None:
    a, b = torch.tensor(2.0), {"b": torch.tensor(5.0)}
    value, back = pullback(lambda a, b: a * b["b"], a, b)
    torch.testing.assert_close((value, back(torch.ones(()))), (torch.tensor(10.0), (b["b"], {"b": a})))
    forward = pushforward(lambda a, b: a * b["b"], a, b)
    torch.testing.assert_close(forward(a, b), (torch.tensor(10.0), torch.tensor(20.0)))


def test_auxiliary_outputs() -> None:
    def f(x: Tensor) -> tuple[Tensor, Any]:
        return x**2, {"twice": 2 * x, "name": "f", "flag": Static(True), "none": None}

    x = torch.tensor([1.0, 2.0])
    (value, aux), back = pullback(f, x, has_aux=True)
    (other_value, other_aux), product = pushforward(f, x, has_aux=True)(x)
    torch.testing.assert_close((value, other_value, back(x), product), (x**2, x**2, 2 * x**2, 2 * x**2))
    for found in (aux, other_aux):
        torch.testing.assert_close(found.pop("twice"), 2 * x)
        assert found == {"name": "f", "flag": Static(True), "none": None}


def test_without_parameters() -> None:
    value, back = pullback(lambda ps: torch.ones(2), {})
    torch.testing.assert_close((value, back(value)), (torch.ones(2), {}))
    torch.testing.assert_close(pushforward(lambda ps: torch.ones(2), {})({}), (torch.ones(2), torch.zeros(2)))
    assert hvp(lambda ps: torch.ones(()), {}, {}) == hvp(lambda ps: torch.ones(()), {}, {}, mode="forward") == {}


@pytest.mark.parametrize("product", [jacobian_vector_product, vector_jacobian_product])
def test_products_are_differentiated_by_the_vector(product: Callable) -> None:
    x = torch.tensor([1.0, 2.0])
    slope = torch.func.grad(lambda u: product(torch.square, x, u).sum())(torch.ones(2))
    torch.testing.assert_close(slope, 2 * x)


def test_complex_products_follow_torch() -> None:
    z, u = torch.tensor([1 + 2j]), torch.tensor([3 - 1j])
    torch.testing.assert_close(jacobian_vector_product(torch.square, z, u), 2 * z * u)
    torch.testing.assert_close(vector_jacobian_product(torch.square, z, u), (2 * z).conj() * u)


# Errors.

ps = {"a": torch.ones(2), "b": torch.ones(())}
PRODUCTS = {
    "jvp": lambda u: jacobian_vector_product(lambda ps: ps["a"] * ps["b"], ps, u),
    "vjp": lambda u: vector_jacobian_product(lambda ps: {"a": ps["a"], "b": ps["b"]}, ps, u),
    "hvp": lambda u: hvp(lambda ps: ps["a"].sum() * ps["b"], ps, u),
    "hvp forward": lambda u: hvp(lambda ps: ps["a"].sum() * ps["b"], ps, u, mode="forward"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_vector_must_fit(name: str) -> None:
    product, like = PRODUCTS[name], r"f\(x\)" if name == "vjp" else "x"
    with pytest.raises(InputError, match=f"structure of {like}(.|\n)*the leaves a, b(.|\n)*the leaves a\n"):
        product({"a": torch.ones(2)})
    with pytest.raises(InputError, match=f"must have the structure of {like}(.|\n)*float32 tensor of shape"):
        product(torch.ones(3))
    with pytest.raises(InputError, match="The vector at the leaf 'a' has the wrong shape(.|\n)*(3,)"):
        product({"a": torch.ones(3), "b": torch.ones(())})
    with pytest.raises(DTypeError, match=f"The vector at the leaf 'b' must be of the dtype of {like}(.|\n)*float64"):
        product({"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)})
    with pytest.raises(DTypeError, match=f"The vector at the leaf 'b' must be of the dtype of {like}(.|\n)*float"):
        product({"a": torch.ones(2), "b": 1.0})


def test_a_vector_for_a_component_vector_has_its_axes() -> None:
    x = ComponentVector({"a": torch.ones(2)})
    with pytest.raises(InputError, match="must have the structure of x"):
        hvp(lambda x: (x.a**2).sum(), x, ComponentVector({"b": torch.ones(2)}))


def test_arguments_and_values_must_be_differentiable() -> None:
    for product in (pullback, pushforward):
        with pytest.raises(DTypeError, match="'x.labels' must be a.*tensor(.|\n)*int64"):
            product(lambda ps: ps["labels"] * 1.0, {"labels": torch.arange(2)})
    with pytest.raises(DTypeError, match="'f\\(x\\).mask' must be a.*tensor(.|\n)*bool(.|\n)*has_aux"):
        pullback(lambda x: {"mask": x > 0}, torch.ones(2))
    with pytest.raises(DTypeError, match="'x' must be a.*tensor(.|\n)*int64"):
        hvp(lambda z: z.abs(), torch.tensor(1), torch.tensor(1))
    with pytest.raises(InputError, match="must return a scalar"):
        hvp(lambda x: x, torch.ones(2), torch.ones(2))
