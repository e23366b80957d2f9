"""Linear algebra, whose operators check for singular matrices: compiled, donated and recorded as it is plain."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.jit import jit

from .conftest import BACKENDS, compiled

linalg = torch.linalg
# What inductor says of its own code, and of complex numbers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]

# Functions of a positive definite matrix and of a second one.
FUNCTIONS = {
    "solve": lambda a, b: linalg.solve(a, b),
    "solve, a vector": lambda a, b: linalg.solve(a, b[:, 0]),
    "solve, from the right": lambda a, b: linalg.solve(a, b.mT, left=False),
    "solve_ex": lambda a, b: linalg.solve_ex(a, b)[0],
    "solve_triangular": lambda a, b: linalg.solve_triangular(a, b, upper=True),
    "inv": lambda a, b: linalg.inv(a) @ b,
    "inv, several": lambda a, b: linalg.inv(torch.stack([a, 2 * a + 1])) @ b,
    "inv_ex": lambda a, b: linalg.inv_ex(a)[0] @ b,
    "pinv": lambda a, b: linalg.pinv(a) @ b,
    "pinv, hermitian": lambda a, b: linalg.pinv(a + a.mT, hermitian=True) @ b,
    "tensorinv": lambda a, b: linalg.tensorinv(a, ind=1) @ b,
    "tensorsolve": lambda a, b: linalg.tensorsolve(a, b[:, 0]),
    "cholesky": lambda a, b: linalg.cholesky(a @ a.mT) @ b,
    "cholesky, upper": lambda a, b: linalg.cholesky(a @ a.mT, upper=True) @ b,
    "cholesky_ex": lambda a, b: linalg.cholesky_ex(a @ a.mT)[0] @ b,
    "cholesky_solve": lambda a, b: torch.cholesky_solve(b, linalg.cholesky(a @ a.mT)),
    "cholesky_inverse": lambda a, b: torch.cholesky_inverse(linalg.cholesky(a @ a.mT)) @ b,
    "lu": lambda a, b: (linalg.lu(a)[1] + linalg.lu(a)[2]) @ b,
    "lu_factor": lambda a, b: linalg.lu_factor(a)[0] @ b,
    "lu_solve": lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b),
    "qr": lambda a, b: linalg.qr(a)[1] @ b,
    "eigh": lambda a, b: linalg.eigh(a + a.mT)[0] @ b,
    "eigvalsh": lambda a, b: linalg.eigvalsh(a + a.mT) @ b,
    "eigvals": lambda a, b: linalg.eigvals(a).abs() @ b,
    "svdvals": lambda a, b: linalg.svdvals(a) @ b,
    "norms": lambda a, b: linalg.matrix_norm(a, "nuc") * linalg.norm(b) + linalg.cond(a) * linalg.matrix_norm(b, 2),
    "det": lambda a, b: linalg.det(a) * b,
    "slogdet": lambda a, b: linalg.slogdet(a)[1] * b,
    "logdet": lambda a, b: torch.logdet(a @ a.mT) * b,
    "matrix_power": lambda a, b: linalg.matrix_power(a, -2) @ b,
    "matrix_exp": lambda a, b: linalg.matrix_exp(a) @ b,
    "multi_dot": lambda a, b: linalg.multi_dot([a, a, b]),
    "two in a row": lambda a, b: linalg.inv(linalg.cholesky(a @ a.mT)) @ linalg.solve(a, b.sin()),
    "gradient inside": lambda a, b: lt.gradient(lambda a: linalg.solve(a, b).square().sum(), a),
    "vmap inside": lambda a, b: torch.vmap(linalg.solve)(torch.stack([a, a.mT]), torch.stack([b, b + 1])),
    "forward inside": lambda a, b: torch.func.jvp(lambda a: linalg.inv(a).sin(), (a,), (a.mT,))[1] @ b,
}

QUICK = ("solve", "inv", "cholesky", "slogdet", "gradient inside")
# Kernels take seconds each to compile. What differs is how an operator is traced, and these have all ways.
COMPILED = (*QUICK, "inv_ex", "lu_factor", "lu_solve", "qr", "eigh", "matrix_power", "two in a row", "vmap inside")


@pytest.fixture
def factors(rng):
    a = torch.randn(4, 4, generator=rng, dtype=torch.float64) / 4 + 2 * torch.eye(4, dtype=torch.float64)
    return a, torch.randn(4, 3, generator=rng, dtype=torch.float64)


def _gradients(function, factors):
    a, b = (factor.clone().requires_grad_() for factor in factors)
    return torch.autograd.grad(function(a, b).cos().sum(), (a, b), allow_unused=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FUNCTIONS]
)
def test_replayed(name, factors, same):
    function = FUNCTIONS[name]
    jitted = jit(function, backend="replay")
    same(jitted(*factors), function(*factors), 1e-9)
    same(_gradients(jitted, factors), _gradients(function, factors), 1e-9)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, factors, same):
    function = FUNCTIONS[name]
    same(jit(function, backend="inductor")(*factors), function(*factors), 1e-9)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_recorded(name, factors, same):
    function = FUNCTIONS[name]
    same(_gradients(jit(function, backend="inductor"), factors), _gradients(function, factors), 1e-9)


@compiled
@pytest.mark.slow
def test_donated(rng, same):
    def step(a, b):
        return linalg.solve(a, b), linalg.inv(a) + 1, linalg.cholesky(b @ b.mT + 100 * torch.eye(100))

    jitted = jit(step, donate=("a", "b"), backend="inductor")
    for _ in range(2):
        a, b = torch.randn(100, 100, generator=rng) + 100 * torch.eye(100), torch.randn(100, 100, generator=rng)
        expected = step(a, b)
        same(jitted(a, b), expected, 1e-3)
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_singular_matrices_are_errors_at_each_call(backend, recorded, factors):
    jitted = jit(lambda a: linalg.inv(a).sin(), backend=backend)
    a = factors[0].requires_grad_(recorded)
    for _ in range(2):
        assert jitted(a).isfinite().all()
        with pytest.raises(linalg.LinAlgError, match="singular"):
            jitted(torch.ones_like(a).requires_grad_(recorded))
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_may_run_again(backend, factors, same):
    a = factors[0].clone().requires_grad_()

    def function(a):
        return (linalg.inv(a).sin() * a.exp()).cos()

    y, expected = jit(function, backend=backend)(a), function(a)
    for keep in (True, True, False):
        got = torch.autograd.grad(y.sum(), a, retain_graph=keep)
        same(got, torch.autograd.grad(expected.sum(), a, retain_graph=keep), 1e-9)
