"""`GGNVec`, diagonals, sums and products of operators, and SciPy's solvers with them, against explicit matrices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from scipy.sparse import linalg
from torch import Tensor
from torch.autograd import functional

import luxtorch as lt
from luxtorch._torch import is_wrapped
from luxtorch.autodiff import GGNVec, HesVec, JacVec, hessian_diagonal
from luxtorch.core import DTypeError, InputError, LuxtorchError
from luxtorch.jit import jit

TARGETS = torch.sin(torch.arange(8.0, dtype=torch.float64)).view(4, 2)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean squared error": lambda y: lt.MSELoss()(y, TARGETS),
    "cross entropy": lambda y: lt.CrossEntropyLoss()(y, torch.tensor([0, 1, 1, 0])),
    "not convex": lambda y: (y**3).sum() + y[0, 0] * y[1, 1],
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
modes = pytest.mark.parametrize("mode", ["reverse", "forward"])


def jacobian_of(problem) -> Tensor:
    return functional.jacobian(problem.flat(problem.net), problem.ravel(problem.ps)).view(8, 9)


def hessian_of(problem) -> Tensor:
    return functional.hessian(problem.flat(problem.loss), problem.ravel(problem.ps))


def gauss_newton_of(problem, loss) -> Tensor:
    """Return J^T H J of whole matrices."""
    J, y = jacobian_of(problem), problem.net(problem.ps)
    return J.T @ functional.hessian(loss, y).view(8, 8) @ J


def matrix_of(operator) -> Tensor:
    return torch.stack([operator.matvec(unit) for unit in torch.eye(operator.shape[1], dtype=torch.float64)], dim=1)


# The Gauss-Newton matrix.


@every_loss
@modes
def test_gauss_newton_is_what_the_whole_matrices_say(problem, loss, mode) -> None:
    operator, expected = GGNVec(problem.net, loss, problem.ps, mode=mode), gauss_newton_of(problem, loss)
    product = operator @ problem.direction
    assert type(product) is type(problem.ps)
    torch.testing.assert_close(problem.ravel(product), expected @ problem.ravel(problem.direction))
    torch.testing.assert_close(matrix_of(operator), expected)
    assert operator.T is operator and repr(operator) == "GGNVec(9 x 9)"
    np.testing.assert_allclose(operator.as_linear_operator() @ np.eye(9), expected, atol=1e-12)
    torch.testing.assert_close(operator.value, problem.net(problem.ps))
    slope = torch.func.grad(problem.flat(lambda ps: loss(problem.net(ps))))(problem.ravel(problem.ps))
    torch.testing.assert_close(problem.ravel(operator.gradient), slope)


@every_loss
def test_gauss_newton_is_symmetric_and_semidefinite_if_the_loss_is_convex(problem, loss) -> None:
    matrix = matrix_of(GGNVec(problem.net, loss, problem.ps))
    torch.testing.assert_close(matrix, matrix.T)
    if loss is not LOSSES["not convex"]:
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_gauss_newton_is_the_fisher_matrix_for_the_cross_entropy(problem) -> None:
    """The expected outer product of the gradient, over labels drawn from the model's own probabilities."""
    loss = lt.CrossEntropyLoss(agg="sum")
    at = problem.ravel(problem.ps)
    p = problem.net(problem.ps).softmax(1)
    fisher = torch.zeros(9, 9, dtype=torch.float64)
    for sample in range(4):
        for label in range(2):
            f = problem.flat(lambda ps, i=sample, k=label: loss(problem.net(ps)[i : i + 1], torch.tensor([k])))
            slope = torch.func.grad(f)(at)
            fisher += p[sample, label] * torch.outer(slope, slope)
    operator = GGNVec(problem.net, lambda y: loss(y, torch.tensor([0, 1, 0, 1])), problem.ps)
    torch.testing.assert_close(matrix_of(operator), fisher)


def test_gauss_newton_of_trees_of_outputs(problem) -> None:
    def f(ps):
        y = problem.net(ps)
        return {"all": y, "sum": (y.sum(),)}

    def loss(y):
        return (y["all"] ** 2).sum() * y["sum"][0] ** 2

    def as_one(y: Tensor) -> Tensor:
        return loss({"all": y, "sum": (y.sum(),)}) if y.dim() == 2 else loss({"all": y[:8].view(4, 2), "sum": (y[8],)})

    y = problem.net(problem.ps)
    J = jacobian_of(problem)
    J = torch.cat([J, J.sum(0, keepdim=True)])
    H = functional.hessian(as_one, torch.cat([y.reshape(-1), y.sum()[None]]))
    torch.testing.assert_close(matrix_of(GGNVec(f, loss, problem.ps)), J.T @ H @ J)


@modes
def test_products_do_not_run_the_model_in_reverse_mode(problem, mode) -> None:
    calls = 0

    def net(ps):
        nonlocal calls
        calls += 1
        return problem.net(ps)

    operator = GGNVec(net, LOSSES["cross entropy"], problem.ps, mode=mode)
    before = calls
    for _ in range(3):
        operator @ problem.direction
    assert calls - before == {"reverse": 0, "forward": 3}[mode]


@modes
def test_gauss_newton_under_jit_and_vmap(problem, mode) -> None:
    loss = LOSSES["cross entropy"]
    expected = gauss_newton_of(problem, loss)
    at, u = problem.ravel(problem.ps), problem.ravel(problem.direction)

    def product(ps, u):
        return GGNVec(problem.net, loss, ps, mode=mode) @ u

    found = jit(product, backend="replay")(problem.ps, problem.direction)
    torch.testing.assert_close(problem.ravel(found), expected @ u)
    batch = torch.func.vmap(lambda u: problem.ravel(product(problem.unravel(at), problem.unravel(u))))(
        torch.stack([u, -u])
    )
    torch.testing.assert_close(batch, torch.stack([expected @ u, -expected @ u]))
    made = GGNVec(problem.net, loss, problem.ps, mode=mode)
    torch.testing.assert_close(problem.ravel(jit(made, backend="replay")(problem.direction)), expected @ u)


def test_wrong_losses_and_models() -> None:
    with pytest.raises(InputError, match="must return a scalar"):
        GGNVec(torch.sin, torch.cos, torch.ones(2))
    with pytest.raises(DTypeError, match=r"'f\(x\)' must be a.*floating point tensor"):
        GGNVec(lambda x: x > 0, torch.sum, torch.ones(2))
    with pytest.raises(DTypeError, match="'x' must be a.*tensor(.|\n)*complex64"):
        GGNVec(torch.abs, torch.sum, torch.ones(2) * 1j)
    with pytest.raises(InputError, match="mode must be"):
        GGNVec(torch.sin, torch.sum, torch.ones(2), mode="both")  # type: ignore[arg-type]


# Diagonals.


@modes
def test_the_diagonal_of_a_hessian(problem, mode) -> None:
    expected = hessian_of(problem).diagonal()
    found = hessian_diagonal(problem.loss, problem.ps, mode=mode)
    assert type(found) is type(problem.ps)
    torch.testing.assert_close(problem.ravel(found), expected)
    compiled = jit(lambda ps: hessian_diagonal(problem.loss, ps, mode=mode), backend="replay")(problem.ps)
    torch.testing.assert_close(problem.ravel(compiled), expected)


@every_loss
@pytest.mark.parametrize("copies", [1, 2], ids=["by rows", "by columns"])
def test_the_diagonal_of_a_gauss_newton_matrix(problem, loss, copies) -> None:
    operator = GGNVec(lambda ps: [problem.net(ps)] * copies, lambda ys: loss(ys[-1]), problem.ps)
    torch.testing.assert_close(problem.ravel(operator.diagonal()), gauss_newton_of(problem, loss).diagonal())


def test_rows_are_taken_where_there_are_fewer_outputs_than_parameters() -> None:
    products = 0
    a = torch.ones(3, 500)
    operator = GGNVec(lambda x: a @ x, lambda y: (y**2).sum() / 2, torch.ones(500))
    back = operator._jacobian._apply_transposed

    def counted(u):
        nonlocal products
        products += 1
        return back(u)

    operator._jacobian._apply_transposed = counted  # type: ignore[method-assign]
    torch.testing.assert_close(operator.diagonal(chunk_size=1), torch.full((500,), 3.0))
    assert products == 6


def test_hutchinson_is_exact_for_a_diagonal_matrix(make_key) -> None:
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    found = hessian_diagonal(lambda x: (x["a"] ** 3).sum() + x["b"] ** 4, x, key=make_key(), samples=1)
    torch.testing.assert_close(found, {"a": torch.tensor([6.0, 12.0]), "b": torch.tensor(108.0)})


def test_hutchinson_goes_to_the_diagonal_as_fast_as_theory_says(problem, make_key) -> None:
    matrix = hessian_of(problem)
    off = matrix - torch.diag(matrix.diagonal())
    samples = 4000
    found = hessian_diagonal(problem.loss, problem.ps, key=make_key(), samples=samples, chunk_size=1000)
    deviations = (problem.ravel(found) - matrix.diagonal()) / (off.square().sum(1) / samples).sqrt()
    assert deviations.abs().max() < 5 and deviations.square().mean() < 4


def test_hutchinson_is_a_function_of_its_key(problem, make_key) -> None:
    operator, key = HesVec(problem.loss, problem.ps), make_key()
    first, again, other = (problem.ravel(operator.diagonal(key=k, samples=3)) for k in (key, key, make_key()))
    assert torch.equal(first, again) and not torch.equal(first, other)
    compiled = jit(lambda key: operator.diagonal(key=key, samples=3), backend="replay")(key)
    torch.testing.assert_close(problem.ravel(compiled), first)
    batch = torch.func.vmap(lambda key: problem.ravel(operator.diagonal(key=key, samples=3)))(key[None])
    torch.testing.assert_close(batch[0], first)


def test_a_nan_stays_where_it_is() -> None:
    x = torch.tensor([0.0, 2.0])
    found = hessian_diagonal(lambda x: x[0].abs().sqrt().sqrt() + x[1] ** 3, x)
    assert not found[0].isfinite() and found[1] == 12


def test_mixed_dtypes_and_no_parameters(make_key) -> None:
    x = {"single": torch.ones(2), "double": torch.ones(1, dtype=torch.float64)}
    for options in ({}, {"key": make_key(), "samples": 2}):
        found = hessian_diagonal(lambda x: (x["single"] ** 3).sum() + (x["double"] ** 2).sum(), x, **options)
        expected = {"single": torch.full((2,), 6.0), "double": torch.full((1,), 2.0, dtype=torch.float64)}
        torch.testing.assert_close(found, expected)
        assert hessian_diagonal(lambda x: torch.ones(()), {}, **options) == {}
        assert hessian_diagonal(lambda x: x.sum(), torch.ones(0), **options).shape == (0,)


def test_wrong_arguments_of_diagonals(make_key) -> None:
    operator = HesVec(lambda x: (x**3).sum(), torch.ones(2))
    with pytest.raises(InputError, match="Samples need a key"):
        operator.diagonal(samples=3)
    with pytest.raises(InputError, match="A key is for samples"):
        operator.diagonal(key=make_key())
    with pytest.raises(DTypeError, match="A key must be"):
        operator.diagonal(key=0, samples=3)  # type: ignore[arg-type]
    for samples in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="samples must be a positive integer"):
            operator.diagonal(key=make_key(), samples=samples)
    with pytest.raises(InputError, match=r"with a diagonal must be square(.|\n)*JacVec\(3 x 2\)"):
        JacVec(lambda x: x.sum() * torch.ones(3), torch.ones(2)).diagonal()


# Sums and products.


def test_sums_multiples_and_products_of_operators(problem) -> None:
    H, J = HesVec(problem.loss, problem.ps), JacVec(problem.net, problem.ps)
    h, j, eye = hessian_of(problem), jacobian_of(problem), torch.eye(9, dtype=torch.float64)
    half = torch.tensor(0.5)
    cases: list[tuple[Any, Tensor]] = [
        (H + 0.1, h + 0.1 * eye),
        (1 + H, h + eye),
        (H - half, h - 0.5 * eye),
        (2 - H, 2 * eye - h),
        (-H, -h),
        (half * H, 0.5 * h),
        (H * np.float64(3), 3 * h),
        (np.float64(3) * H, 3 * h),
        (np.float32(0.5) + H, h + 0.5 * eye),
        (H + H, 2 * h),
        (2 * H - H, h),
        (J.T @ J, j.T @ j),
        (J @ J.T, j @ j.T),
        (J @ H, j @ h),
        ((J @ H).T, (j @ h).T),
        ((J + 2 * J).T, 3 * j.T),
        ((J.T @ J + H + 0.1).T, j.T @ j + h + 0.1 * eye),
    ]
    for operator, expected in cases:
        torch.testing.assert_close(matrix_of(operator), expected)
        torch.testing.assert_close(matrix_of(operator.T), expected.T)
        if len(expected) == expected.shape[1]:
            torch.testing.assert_close(operator._inputs.ravel(operator.diagonal()), expected.diagonal())
    damped = (H + 0.1) @ problem.direction
    assert type(damped) is type(problem.ps)


def test_the_derivative_by_the_damping(problem) -> None:
    H = HesVec(problem.loss, problem.ps)
    slope = torch.func.grad(lambda d: problem.ravel((H + d) @ problem.direction).sum())(torch.tensor(0.1).double())
    torch.testing.assert_close(slope, problem.ravel(problem.direction).sum())
    batch = torch.func.vmap(lambda d: problem.ravel((H + d) @ problem.direction))(torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(batch[1] - batch[0], problem.ravel(problem.direction))


def test_multiples_keep_the_dtypes_of_the_leaves() -> None:
    x = {"single": torch.tensor(1.0), "double": torch.tensor(1.0, dtype=torch.float64)}
    H = HesVec(lambda x: x["single"] ** 2 + x["double"] ** 2, x)
    product = (torch.tensor(2.0, dtype=torch.float64) * H + 1) @ x
    torch.testing.assert_close(product, {"single": torch.tensor(5.0), "double": torch.tensor(5.0, dtype=torch.float64)})


def test_what_cannot_be_added_or_multiplied() -> None:
    H = HesVec(lambda x: (x**3).sum(), torch.ones(2))
    J = JacVec(lambda x: x.sum() * torch.ones(3), torch.ones(2))
    with pytest.raises(InputError, match="plus a number must be square"):
        J + 0.1
    with pytest.raises(InputError, match=r"to add them(.|\n)*HesVec\(2 x 2\) and JacVec\(3 x 2\)"):
        H + J
    with pytest.raises(InputError, match=r"to multiply them(.|\n)*HesVec\(2 x 2\) and JacVec\(3 x 2\)"):
        H @ J
    with pytest.raises(InputError, match="to add them"):
        H + HesVec(lambda x: x["a"].sum(), {"a": torch.ones(2)})
    with pytest.raises(InputError, match="must have the structure of x|has the wrong shape"):
        (H + 0.1) @ torch.ones(3)
    for wrong in (torch.ones(2), "0.1", 1j, True, {"a": 1}):
        for operation in (
            lambda a, b: a + b,
            lambda a, b: b + a,
            lambda a, b: a - b,
            lambda a, b: a * b,
            lambda a, b: b * a,
        ):
            with pytest.raises(TypeError):
                operation(H, wrong)


# Solvers.


@pytest.mark.parametrize("method", ["cg", "minres", "gmres", "bicgstab"])
def test_a_damped_step_of_newton(problem, method) -> None:
    G = GGNVec(problem.net, LOSSES["mean squared error"], problem.ps)
    matrix = gauss_newton_of(problem, LOSSES["mean squared error"]) + 0.1 * torch.eye(9, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, problem.ravel(G.gradient))
    step, info = (G + 0.1).solve(G.gradient, method=method, rtol=1e-12)
    assert info == 0 and type(step) is type(problem.ps)
    torch.testing.assert_close(problem.ravel(step), expected)
    again, info = (G + 0.1).solve(problem.ravel(G.gradient), x0=step, rtol=1e-8, maxiter=1)
    assert info == 0
    torch.testing.assert_close(again, expected) if not isinstance(problem.ps, Tensor) else None


def test_a_preconditioner_and_too_few_steps(problem) -> None:
    G = GGNVec(problem.net, LOSSES["mean squared error"], problem.ps) + 1e-3
    b = problem.direction
    diagonal = problem.ravel(G.diagonal()).numpy()
    step, info = G.solve(b, M=np.diag(1 / diagonal), rtol=1e-10)
    assert info == 0
    torch.testing.assert_close(problem.ravel(G @ step), problem.ravel(b))
    assert G.solve(b, maxiter=1, rtol=1e-10)[1] == 1


DERIVATIVES = {
    "reverse": lambda f, d: torch.func.jacrev(f)(d),
    "forward": lambda f, d: torch.func.jvp(f, (d,), (torch.ones_like(d),))[1],
    "tape": lambda f, d: functional.jacobian(f, d),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_the_derivative_of_a_solution_by_custom_root(problem, derivative) -> None:
    G = GGNVec(problem.net, LOSSES["mean squared error"], problem.ps)
    matrix = gauss_newton_of(problem, LOSSES["mean squared error"]) + 0.1 * torch.eye(9, dtype=torch.float64)
    b = problem.ravel(problem.direction)

    def solver(f, x):
        return x - JacVec(f, x).solve(f(x), rtol=1e-12)[0]

    def damped(d: Tensor) -> Tensor:
        return lt.custom_root(lambda x, d: (G + d).matvec(x) - b, torch.zeros_like(b), solver, d)

    d = torch.tensor(0.1, dtype=torch.float64)
    x = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(damped(d), x)
    torch.testing.assert_close(derivative(damped, d), -torch.linalg.solve(matrix, x))


def test_solutions_have_the_dtypes_of_the_tree() -> None:
    x = {"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)}
    H = HesVec(lambda x: (x["a"] ** 2).sum() + x["b"] ** 2 + x["a"].sum() * x["b"], x)
    step, info = H.solve(H.gradient)
    assert info == 0
    torch.testing.assert_close(step, x)


def test_what_cannot_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    H, J = HesVec(lambda x: (x**3).sum(), x), JacVec(lambda x: x.sum() * torch.ones(3), x)
    with pytest.raises(InputError, match="to solve with must be square"):
        J.solve(torch.ones(3))
    with pytest.raises(InputError, match=r"method must be one of(.|\n)*Did you mean 'gmres'"):
        H.solve(x, method="gmress")
    with pytest.raises(InputError, match="wrong shape"):
        H.solve(torch.ones(3))
    with pytest.raises(InputError, match="must have the structure of x"):
        H.solve({"a": x})
    with pytest.raises(InputError, match="not run inside of vmap"):
        torch.func.vmap(H.solve)(torch.ones(3, 2))
    for derivative in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.grad(lambda x: torch.func.grad(lambda y: f(x) * y.sum())(x).sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: f(x.clone().requires_grad_()),
    ):
        with pytest.raises(InputError, match="solve is not differentiated"):
            derivative(lambda b: H.solve(b)[0].sum())
        with pytest.raises(InputError, match="solve is not differentiated"):
            derivative(lambda x: HesVec(lambda x: (x**3).sum(), x).solve(torch.ones(2))[0].sum())
    damping = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(InputError, match="solve is not differentiated"):
        (H + damping).solve(x)
    with torch.no_grad():
        assert (H + damping).solve(x)[1] == 0
    with torch.inference_mode(), pytest.raises(InputError, match="not run inside of"):
        H.solve(x)
    with pytest.raises(InputError, match="not run inside of"):
        jit(lambda b: H.solve(b)[0], backend="replay")(x)
    solution, info = H.solve(torch.tensor([torch.nan, 1.0]))
    assert info != 0 or solution.isnan().all()
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(LuxtorchError, match="SciPy is not installed(.|\n)*scipy, for solve"):
        H.solve(x)


def test_numbers_are_not_taken_of_what_is_mapped_or_differentiated() -> None:
    def product(x: Tensor) -> Tensor:
        return torch.from_numpy(HesVec(lambda x: (x**3).sum(), x).matvec(np.ones(2))).sum()

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError):
            transform(product)(torch.ones(2) if transform is torch.func.grad else torch.ones(2, 2))


def test_scipy_finds_eigenvalues_and_least_squares(problem) -> None:
    H, J = HesVec(problem.loss, problem.ps), JacVec(problem.net, problem.ps, mode="reverse")
    G = GGNVec(problem.net, LOSSES["mean squared error"], problem.ps)
    eigenvalues = torch.linalg.eigvalsh(hessian_of(problem)).numpy()
    found, vectors = linalg.eigsh(H, k=2, which="LA")
    np.testing.assert_allclose(found, eigenvalues[-2:])
    np.testing.assert_allclose(hessian_of(problem).numpy() @ vectors, vectors * found, atol=1e-8)
    np.testing.assert_allclose(linalg.eigsh(H, k=1, which="SA", return_eigenvectors=False), eigenvalues[:1])
    largest = torch.linalg.eigvalsh(gauss_newton_of(problem, LOSSES["mean squared error"]))[-1].numpy()
    np.testing.assert_allclose(linalg.eigsh(G, k=1, return_eigenvectors=False), [largest])
    start = np.cos(np.arange(9.0))[:, None]
    found, _ = linalg.lobpcg(G.as_linear_operator(), start, tol=1e-10, maxiter=200)
    np.testing.assert_allclose(found, [largest], rtol=1e-6)
    singular = linalg.svds(J.as_linear_operator(), k=1, return_singular_vectors=False)
    np.testing.assert_allclose(singular, torch.linalg.svdvals(jacobian_of(problem))[:1])
    b = np.sin(np.arange(8.0))
    j = jacobian_of(problem).numpy()
    expected = np.linalg.solve(j.T @ j + 0.01 * np.eye(9), j.T @ b)
    np.testing.assert_allclose(linalg.lsmr(J, b, damp=0.1, atol=1e-14, btol=1e-14, maxiter=200)[0], expected, atol=1e-6)
    assert linalg.cg(G + 0.1, j.T @ b, rtol=1e-12)[1] == 0


def test_products_are_plain_tensors(problem) -> None:
    """Nothing that an operator returns is on a tape, or wrapped by a transform that is over."""
    for operator in (
        GGNVec(problem.net, LOSSES["cross entropy"], problem.ps),
        JacVec(problem.net, problem.ps, mode="reverse"),
        HesVec(problem.loss, problem.ps) + 1,
    ):
        for leaf in pytree.tree_leaves(operator @ problem.direction):
            assert type(leaf) is Tensor and not leaf.requires_grad and not is_wrapped(leaf)
