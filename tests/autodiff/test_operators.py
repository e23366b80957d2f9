"""Matrix-free operators: their products, their transposes, and their use by SciPy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from scipy.sparse import linalg
from torch import Tensor
from torch.autograd import functional

from luxtorch.autodiff import HesVec, JacVec
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, LuxtorchError

modes = pytest.mark.parametrize("mode", ["reverse", "forward"])


def matrix_of(problem, operator: Any) -> Tensor:
    """Return the matrix by autograd that an operator stands for."""
    if isinstance(operator, HesVec):
        return functional.hessian(problem.flat(problem.loss), problem.ravel(problem.ps))
    return functional.jacobian(problem.flat(problem.net), problem.ravel(problem.ps)).view(8, 9)


def operators_of(problem) -> list:
    return [
        JacVec(problem.net, problem.ps),
        HesVec(problem.loss, problem.ps),
        HesVec(problem.loss, problem.ps, mode="forward"),
    ]


def test_products_with_trees(problem) -> None:
    for operator in operators_of(problem):
        matrix = matrix_of(problem, operator)
        product = operator @ problem.direction
        torch.testing.assert_close(problem.ravel(product), matrix @ problem.ravel(problem.direction))
        assert type(product) is type(problem.net(problem.ps) if isinstance(operator, JacVec) else problem.ps)
    u = torch.cos(torch.arange(8.0, dtype=torch.float64)).view(4, 2)
    jacobian = JacVec(problem.net, problem.ps)
    product = jacobian.T @ u
    assert type(product) is type(problem.ps)
    torch.testing.assert_close(problem.ravel(product), matrix_of(problem, jacobian).T @ u.reshape(-1))


def test_products_with_flat_vectors(problem) -> None:
    for operator in operators_of(problem):
        matrix = matrix_of(problem, operator)
        assert operator.shape == matrix.shape
        assert operator.T.shape == matrix.T.shape
        v, u = torch.arange(9.0, dtype=torch.float64), torch.arange(len(matrix), dtype=torch.float64)
        for found in (operator.matvec(v), operator.T.rmatvec(v)):
            torch.testing.assert_close(found, matrix @ v)
        for found in (operator.rmatvec(u), operator.T.matvec(u)):
            torch.testing.assert_close(found, matrix.T @ u)
        if not isinstance(problem.ps, Tensor):
            torch.testing.assert_close(operator @ v, matrix @ v)


def test_what_the_operators_know(problem) -> None:
    jacobian, hessian = JacVec(problem.net, problem.ps), HesVec(problem.loss, problem.ps)
    torch.testing.assert_close(jacobian.value, problem.net(problem.ps))
    expected = torch.func.grad(problem.flat(problem.loss))(problem.ravel(problem.ps))
    torch.testing.assert_close(problem.ravel(hessian.gradient), expected)
    assert jacobian.T.T is jacobian and hessian.T is hessian
    assert (repr(jacobian), repr(hessian)) == ("JacVec(8 x 9)", "HesVec(9 x 9)")


@modes
def test_hesvec_records_once(mode: str) -> None:
    calls = 0

    def f(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (x**3).sum()

    hessian = HesVec(f, torch.ones(2), mode=mode)  # type: ignore[arg-type]
    for _ in range(3):
        torch.testing.assert_close(hessian @ torch.ones(2), torch.full((2,), 6.0))
    assert calls == {"reverse": 1, "forward": 4}[mode]


# SciPy.


def test_scipy_takes_the_operators_as_they_are(problem) -> None:
    for operator in operators_of(problem):
        matrix = matrix_of(problem, operator).numpy()
        for wrapped in (operator.as_linear_operator(), linalg.aslinearoperator(operator)):
            assert isinstance(wrapped, linalg.LinearOperator)
            assert (wrapped.shape, wrapped.dtype) == (matrix.shape, np.float64)
            np.testing.assert_allclose(wrapped @ np.eye(9), matrix, atol=1e-12)
            np.testing.assert_allclose(wrapped.T @ np.eye(len(matrix)), matrix.T, atol=1e-12)


@modes
def test_conjugate_gradients(mode: str) -> None:
    matrix = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    x = ComponentVector({"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)})
    hessian = HesVec(lambda x: x.flat @ matrix @ x.flat / 2, x, mode=mode)  # type: ignore[arg-type]
    b = np.array([1.0, 2.0, 3.0])
    solution, info = linalg.cg(hessian, b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(solution, np.linalg.solve(matrix.numpy(), b))


def test_least_squares_in_single_precision() -> None:
    x = {"a": torch.tensor([1.0, 2.0])}
    jacobian = JacVec(lambda x: torch.stack([x["a"][0] ** 2, x["a"].prod(), x["a"][1]]), x)
    assert jacobian.dtype == np.float32
    matrix = np.array([[2.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    b = np.array([1.0, 0.0, 2.0])
    np.testing.assert_allclose(linalg.lsqr(jacobian, b)[0], np.linalg.lstsq(matrix, b, rcond=None)[0], atol=1e-5)


def test_scipy_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(LuxtorchError, match="SciPy is not installed(.|\n)*pip install scipy"):
        JacVec(torch.sin, torch.ones(2)).as_linear_operator()


# Trees with several dtypes, without leaves, and errors.


def test_mixed_dtypes() -> None:
    x = {"single": torch.ones(2), "double": torch.ones(1, dtype=torch.float64)}
    hessian = HesVec(lambda x: (x["single"] ** 3).sum() * x["double"].sum(), x)
    expected = torch.tensor([[6.0, 0.0, 3.0], [0.0, 6.0, 3.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
    assert hessian.dtype == np.float64
    found = torch.stack([hessian @ unit for unit in torch.eye(3, dtype=torch.float64)])
    torch.testing.assert_close(found, expected)
    product = hessian @ x
    assert {name: leaf.dtype for name, leaf in product.items()} == {name: leaf.dtype for name, leaf in x.items()}


@modes
def test_without_parameters(mode: str) -> None:
    hessian = HesVec(lambda x: torch.ones(()), {}, mode=mode)  # type: ignore[arg-type]
    assert (hessian.shape, hessian @ {}) == ((0, 0), {})
    assert hessian.matvec(torch.zeros(0)).shape == (0,)


def test_errors() -> None:
    x = {"a": torch.ones(2), "b": torch.ones(())}
    hessian = HesVec(lambda x: x["a"].sum() * x["b"], x)
    with pytest.raises(InputError, match=r"flat vector has the wrong shape(.|\n)*\(3,\)(.|\n)*\(4,\)"):
        hessian @ torch.ones(4)
    with pytest.raises(InputError, match="must have the structure of x"):
        hessian @ {"a": torch.ones(2)}
    with pytest.raises(InputError, match=r"must have the structure of f\(x\)"):
        JacVec(lambda x: {"y": x["a"]}, x).T @ {"a": torch.ones(2)}
    with pytest.raises(InputError, match="must return a scalar"):
        HesVec(lambda x: x["a"], x)
    with pytest.raises(InputError, match="mode must be"):
        HesVec(lambda x: x["b"], x, mode="reversed")  # type: ignore[arg-type]
    for operator in (JacVec, HesVec):
        with pytest.raises(DTypeError, match="'x.n' must be a.*tensor(.|\n)*int64"):
            operator(lambda x: x["n"] * 1.0, {"n": torch.tensor(1)})
        with pytest.raises(DTypeError, match="'x' must be a.*tensor(.|\n)*complex64"):
            operator(torch.abs, torch.tensor(1j))
    with pytest.raises(DTypeError, match="dtype must be float16, float32 or float64(.|\n)*bfloat16"):
        _ = JacVec(torch.sin, torch.ones(2, dtype=torch.bfloat16)).dtype


def test_operators_hold_what_they_were_made_with(problem) -> None:
    before = problem.ravel(problem.ps).clone()
    for operator in operators_of(problem):
        first = pytree.tree_leaves(operator @ problem.direction)
        second = pytree.tree_leaves(operator @ problem.direction)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not any(leaf.requires_grad for leaf in first)
    assert torch.equal(problem.ravel(problem.ps), before)
