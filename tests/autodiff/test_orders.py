"""Derivatives of every order of what luxtorch's own functions compute, through torch's linear algebra too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch.testing import check_derivatives

WORDS = ("R", "F", "f", "RF", "FR", "rF", "FF")
U = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64)


def scalar(x):
    return (x.sin() * x.flip(-1)).sum().exp()


def vector(x):
    return torch.stack([x.prod(), x.sin().sum(), x[0].exp() * x[1]])


FUNCTIONS = {
    "gradient": lambda x: lt.gradient(scalar, x),
    "gradient, forward": lambda x: lt.gradient(scalar, x, mode="forward"),
    "withgradient": lambda x: lt.withgradient(scalar, x),
    "hvp": lambda x: lt.hvp(scalar, x, U),
    "hvp, forward": lambda x: lt.hvp(scalar, x, U, mode="forward"),
    "jacobian": lambda x: lt.jacobian(vector, x),
    "jacobian, forward": lambda x: lt.jacobian(vector, x, mode="forward"),
    "hessian": lambda x: lt.hessian(scalar, x),
    "hessian, forward": lambda x: lt.hessian(scalar, x, mode="forward"),
    "pushforward": lambda x: lt.pushforward(vector, x)(U),
    "pullback": lambda x: lt.pullback(vector, x)[1](U),
    "jacobian_vector_product": lambda x: lt.jacobian_vector_product(vector, x, U),
    "vector_jacobian_product": lambda x: lt.vector_jacobian_product(vector, x, U),
    "batched_jacobian": lambda x: lt.batched_jacobian(lambda xs: xs.sin() * xs.sum(-1, keepdim=True), x[None]),
    "per_sample_gradients": lambda x: lt.per_sample_gradients(
        lambda p, st, b: (p * b).sin().prod(), x, {}, torch.outer(U, U)
    ),
    "JacVec": lambda x: lt.JacVec(vector, x) @ U,
    "HesVec": lambda x: lt.HesVec(scalar, x) @ U,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(make_key, name):
    x = torch.tensor([0.4, 0.9, -0.3], dtype=torch.float64)
    check_derivatives(FUNCTIONS[name], x, rng=make_key(), words=WORDS)


B = torch.tensor([[0.5, -1.0], [2.0, 0.3], [0.1, 0.7]], dtype=torch.float64)
ALGEBRA = {
    "solve": lambda A: torch.linalg.solve(A, B),
    "solve for a vector that depends on the matrix": lambda A: torch.linalg.solve(A, A[:, 0].sin()),
    "solve from the right": lambda A: torch.linalg.solve(A, B.mT, left=False),
    "solve of a batch": lambda A: torch.linalg.solve(torch.stack([A, A.mT]), B),
    "solve, by names": lambda A: torch.linalg.solve(A=A, B=B),
    "solve_ex": lambda A: torch.linalg.solve_ex(A, B)[0],
    "tensorsolve": lambda A: torch.linalg.tensorsolve(A, B[:, 0]),
    "det": torch.linalg.det,
    "det, a method": lambda A: A.det(),
    "det, negative": lambda A: torch.det(-A),
    "slogdet": lambda A: torch.linalg.slogdet(A).logabsdet,
    "logdet": lambda A: torch.logdet(A @ A.mT),
    "logdet, by name": lambda A: torch.logdet(input=A @ A.mT),
    "inv": torch.linalg.inv,
    "cholesky": lambda A: torch.linalg.cholesky(A @ A.mT),
    "lu_solve": lambda A: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), B),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_linear_algebra_in_forward_mode_inside_another_derivative(make_key, name):
    f = ALGEBRA[name]
    A = lt.random.normal(make_key(), (3, 3), dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
    V = lt.random.normal(make_key(), (3, 3), dtype=torch.float64)
    check_derivatives(lambda A: lt.pushforward(f, A)(V), A, rng=make_key(), words=("R", "F", "r", "f"))
    check_derivatives(lambda A: lt.gradient(lambda A: f(A).sum(), A, mode="forward"), A, rng=make_key(), words="RF")


def test_what_torch_gets_wrong_is_named():
    x = torch.ones(2, 3)

    def slope(x):
        return lt.pushforward(lambda x: F.layer_norm(x, (3,)).sum(), x)(x)[1]

    slope(x)
    with pytest.warns(UserWarning, match=r"layer_norm, unlike that of lt.LayerNorm.*wrong"):
        lt.gradient(slope, x)
