"""SciPy's optimizers on trees: the same iterates as SciPy's own with hand-written derivatives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import luxtorch as lt
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, KeyNameError, LuxtorchError
from luxtorch.optim.solvers._scipy import scipy_least_squares, scipy_minimize

# Beside the value they take nothing, the gradient, the products with the Hessian too, or the Hessian too.
METHODS = {
    **dict.fromkeys(("Nelder-Mead", "Powell", "COBYLA", "COBYQA"), {}),
    **dict.fromkeys(("CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP"), {"jac": scipy.optimize.rosen_der}),
    **dict.fromkeys(
        ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr"),
        {"jac": scipy.optimize.rosen_der, "hessp": scipy.optimize.rosen_hess_prod},
    ),
    **dict.fromkeys(
        ("dogleg", "trust-exact"), {"jac": scipy.optimize.rosen_der, "hess": scipy.optimize.rosen_hess}
    ),
}  # fmt: skip
START = np.array([0.7, 0.8, 1.2, 0.9, 1.1, 0.95])


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def tree(x: Any) -> dict[str, Any]:
    x = torch.as_tensor(x)
    return {"a": {"weight": x[:4].reshape(2, 2), "bias": x[4:5]}, "b": x[5]}


FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Tensor]]] = {
    "dict": (tree, lambda ps: torch.cat([ps["a"]["weight"].flatten(), ps["a"]["bias"], ps["b"][None]])),
    "vector": (lambda x: ComponentVector(tree(x)), lambda ps: ps.flat),
    "tensor": (torch.as_tensor, lambda ps: ps),
    "mixed": (
        lambda x: (ComponentVector(tree(x)["a"]), [tree(x)["b"]]),
        lambda ps: torch.cat([ps[0].flat, ps[1][0][None]]),
    ),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    return FORMS[request.param]


class TestMinimize:
    @pytest.mark.parametrize("method", METHODS)
    def test_takes_the_steps_that_scipy_takes(self, method, form):
        make, flat = form
        # Few enough that rounding does not lead elsewhere.
        steps = {"Powell": {"maxiter": 1}, "TNC": {"maxfun": 15}}.get(method, {"maxiter": 15})
        options = {"method": method, "options": steps, "tol": 1e-9}
        expected = scipy.optimize.minimize(scipy.optimize.rosen, START, **METHODS[method], **options)
        ps, result = scipy_minimize(lambda ps: rosenbrock(flat(ps)), make(START), **options)
        assert type(ps) is type(make(START)) and (result.nfev, result.success) == (expected.nfev, expected.success)
        np.testing.assert_allclose(result.x, expected.x, rtol=1e-6)
        np.testing.assert_array_equal(flat(ps).numpy(), result.x)

    @pytest.mark.parametrize("method", ["L-BFGS-B", "trust-krylov", "trust-exact"])
    @pytest.mark.parametrize("model", [lt.Dense(64, 10), lt.Chain(lt.Dense(64, 4, torch.tanh), lt.Dense(4, 10))])
    def test_trains_a_model_in_its_own_dtype(self, method, model, rng):
        x, y = torch.randn(20, 64, generator=rng), torch.randint(10, (20,), generator=rng)
        start, states = lt.setup(0, model)
        start = ComponentVector(start)

        def loss(ps):
            return lt.CrossEntropyLoss()(model(x, ps, states)[0], y) + 1e-2 * ps.flat.square().sum()

        ps, result = scipy_minimize(loss, start, method=method, options={"maxiter": 60})
        assert ps.dtype == torch.float32 and ps.axes == start.axes and result.x.dtype == np.float64
        assert loss(ps).item() == pytest.approx(result.fun, rel=1e-5)
        assert lt.gradient(loss, ps).flat.norm() < 0.05 * lt.gradient(loss, start).flat.norm()

    def test_dtypes_may_differ(self):
        start = {"a": torch.tensor([3.0], dtype=torch.float32), "b": torch.tensor([4.0], dtype=torch.float64)}
        ps, _ = scipy_minimize(lambda ps: (ps["a"] - 1).square().sum() + (ps["b"] - 1 / 3).square().sum(), start)
        assert {name: p.dtype for name, p in ps.items()} == {name: p.dtype for name, p in start.items()}
        assert ps["b"].item() == pytest.approx(1 / 3, abs=1e-7)

    @pytest.mark.parametrize("method", ["L-BFGS-B", "Newton-CG", "trust-exact"])
    def test_nothing_is_changed_or_recorded(self, method):
        start = torch.tensor(START, requires_grad=True)
        ps, _ = scipy_minimize(rosenbrock, start, method=method)
        assert not ps.requires_grad and start.grad is None
        np.testing.assert_array_equal(start.detach().numpy(), START)

    def test_what_the_function_was_given_stays(self):
        """SciPy writes into its arrays; whoever keeps parameters keeps their numbers."""
        seen = []

        def f(ps):
            seen.append((ps, ps.detach().clone()))
            return rosenbrock(ps)

        scipy_minimize(f, torch.tensor(START))
        assert len(seen) > 5 and all(torch.equal(ps, copy) for ps, copy in seen)

    def test_a_place_is_recorded_once(self):
        """Conjugate gradients multiply by one Hessian many times."""
        calls = []

        def f(ps):
            calls.append(0)
            return rosenbrock(ps)

        _, result = scipy_minimize(f, torch.tensor(START), method="trust-ncg")
        assert result.nhev > result.nit and len(calls) <= 1 + result.nfev + result.njev + result.nit

    @given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=6))
    def test_bounds_hold(self, widths):
        target = torch.arange(1.0, 1.0 + len(widths), dtype=torch.float64)
        upper = {"x": torch.tensor(widths, dtype=torch.float64)}
        ps, _ = scipy_minimize(
            lambda ps: (ps["x"] - target).square().sum(), {"x": torch.zeros_like(target)}, bounds=(-1, upper)
        )
        torch.testing.assert_close(ps["x"], torch.minimum(target, upper["x"]))

    @pytest.mark.parametrize("method", ["L-BFGS-B", "Nelder-Mead", "TNC", "SLSQP", "trust-constr"])
    def test_a_callback_sees_the_parameters(self, method):
        seen = []
        ps, result = scipy_minimize(
            lambda ps: rosenbrock(ps.flat), ComponentVector(tree(START)), method=method, callback=seen.append
        )
        assert len(seen) >= result.nit - 1 > 0 and all(isinstance(point, ComponentVector) for point in seen)
        torch.testing.assert_close(seen[-1].flat, ps.flat, rtol=1e-3, atol=0)

    def test_a_callback_may_stop(self):
        def stop(ps):
            raise StopIteration

        _, result = scipy_minimize(rosenbrock, torch.tensor(START), callback=stop)
        assert result.nit == 1 and not result.success

    def test_constraints_pass_through(self):
        onto = {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like}
        ps, _ = scipy_minimize(
            lambda ps: ps["x"].square().sum(), {"x": torch.arange(4.0)}, method="SLSQP", constraints=[onto]
        )
        torch.testing.assert_close(ps["x"], torch.full((4,), 0.25))

    def test_the_minimum_may_use_transforms(self):
        """The loss of a small PINN is a function of derivatives."""

        def f(ps):
            slope = torch.vmap(torch.func.grad(lambda x: ps["a"] * x**3 + ps["b"] * x))
            return (slope(torch.linspace(0, 1, 5)) - 3).square().sum()

        ps, _ = scipy_minimize(f, {"a": torch.tensor(0.5), "b": torch.tensor(0.0)}, method="trust-exact")
        torch.testing.assert_close(ps, {"a": torch.tensor(0.0), "b": torch.tensor(3.0)}, rtol=1e-4, atol=1e-4)


def curve(ps: Any, x: Tensor) -> Tensor:
    return ps["height"] * torch.exp(-ps["rate"] * x) + ps["shift"]


class TestLeastSquares:
    X = torch.linspace(0, 4, 30, dtype=torch.float64)
    PS = {"height": torch.tensor(2.5), "rate": torch.tensor([1.3]), "shift": torch.tensor(0.5)}

    def slopes(self, p):
        x, decay = self.X.numpy(), np.exp(-p[1] * self.X.numpy())
        return np.stack([decay, -p[0] * x * decay, np.ones_like(x)], axis=1)

    @pytest.mark.parametrize("method", ["trf", "dogbox", "lm"])
    @pytest.mark.parametrize(
        "options", [{}, {"mode": "reverse"}, {"chunk_size": 1}, {"mode": "reverse", "chunk_size": 7}]
    )
    @pytest.mark.parametrize("make", [dict, ComponentVector])
    @pytest.mark.parametrize("shape", [(30,), (5, 6)])
    def test_takes_the_steps_that_scipy_takes(self, method, options, make, shape, rng):
        y = curve(self.PS, self.X) + 0.1 * torch.randn(30, dtype=torch.float64, generator=rng)
        x, wanted = self.X.numpy(), y.numpy()
        start = make({name: torch.ones_like(p, dtype=torch.float64) for name, p in self.PS.items()})
        expected = scipy.optimize.least_squares(
            lambda p: p[0] * np.exp(-p[1] * x) + p[2] - wanted, np.ones(3), jac=self.slopes, method=method
        )
        ps, result = scipy_least_squares(
            lambda ps: (curve(ps, self.X) - y).reshape(shape), start, method=method, **options
        )
        assert type(ps) is make and (result.nfev, result.status) == (expected.nfev, expected.status)
        np.testing.assert_allclose(result.x, expected.x, rtol=1e-9)
        np.testing.assert_allclose(result.jac, self.slopes(result.x), rtol=1e-9, atol=1e-12)

    def test_float32(self):
        ps, _ = scipy_least_squares(
            lambda ps: curve(ps, self.X.float()) - curve(self.PS, self.X.float()),
            {name: torch.ones_like(p) for name, p in self.PS.items()},
        )
        torch.testing.assert_close(ps, self.PS, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("method", ["trf", "dogbox"])
    def test_bounds_and_options_pass(self, method):
        lower = {"height": torch.tensor(-9.0), "rate": torch.tensor([1.5]), "shift": torch.tensor(-9.0)}
        start = {name: torch.full_like(p, 2.0) for name, p in self.PS.items()}
        ps, result = scipy_least_squares(
            lambda ps: curve(ps, self.X) - curve(self.PS, self.X), start, method=method, bounds=(lower, 5), max_nfev=50
        )
        assert ps["rate"].item() == pytest.approx(1.5, abs=1e-4) and result.nfev <= 50

    def test_a_callback_sees_the_parameters(self):
        seen = []
        start = {name: torch.ones_like(p) for name, p in self.PS.items()}
        if tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 16):
            with pytest.raises(InputError, match="needs SciPy 1.16"):
                scipy_least_squares(lambda ps: curve(ps, self.X), start, callback=seen.append)
            return
        ps, _ = scipy_least_squares(lambda ps: curve(ps, self.X) - curve(self.PS, self.X), start, callback=seen.append)
        assert len(seen) > 1
        torch.testing.assert_close(seen[-1], ps)


SOLVERS = {
    "minimize": (scipy_minimize, lambda ps: ps["a"].square().sum()),
    "least_squares": (scipy_least_squares, lambda ps: ps["a"]),
}


@pytest.mark.parametrize("solver", SOLVERS)
class TestErrors:
    PS = {"a": torch.tensor([1.0, 2.0])}

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"jac": "2-point"}, KeyNameError, "'jac' is not an option(.|\n)*Leave it out"),
            ({"args": (1,)}, KeyNameError, "'args' is not an option(.|\n)*closed over"),
            ({"bounds": [0, 1, 2]}, DTypeError, r"bounds must be a pair \(lower, upper\)"),
            ({"bounds": ({"b": torch.zeros(2)}, None)}, KeyNameError, "lower bounds(.|\n)*same names: 'a'"),
            ({"bounds": (None, {"a": torch.zeros(3)})}, InputError, r"a: The upper bound(.|\n)*\(2,\)(.|\n)*\(3,\)"),
            ({"bounds": (0, 1.5)}, InputError, "a: The parameters begin outside(.|\n)*0 to 1.5(.|\n)*got: +2"),
            ({"bounds": ("low", 1)}, DTypeError, "not a tensor"),
        ],
    )
    def test_of_options(self, solver, options, error, words):
        solve, f = SOLVERS[solver]
        with pytest.raises(error, match=words):
            solve(f, self.PS, **options)

    @pytest.mark.parametrize(
        ("ps", "error", "words"),
        [
            ({"a": torch.tensor([1, 2])}, DTypeError, "a: A parameter is not differentiable(.|\n)*int64"),
            ({"a": 1.0}, DTypeError, "a: A leaf is not a tensor"),
            ({}, InputError, "no parameters"),
            ({"a": torch.zeros(0)}, InputError, "no parameters"),
            ({"a": torch.tensor([float("nan")])}, InputError, "not finite where the search begins(.|\n)*nan in"),
            ({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")}, InputError, "on one device"),
        ],
    )
    def test_of_parameters(self, solver, ps, error, words):
        solve, f = SOLVERS[solver]
        with pytest.raises(error, match=words):
            solve(f, ps)

    @pytest.mark.parametrize(
        "run",
        [
            lambda f: torch.vmap(f)(torch.ones(2, 2)),
            lambda f: torch.func.grad(f)(torch.ones(2)),
            lambda f: torch.inference_mode()(f)(torch.ones(2)),
        ],
        ids=["vmap", "grad", "inference"],
    )
    def test_inside_of_transforms(self, solver, run):
        solve, f = SOLVERS[solver]
        with pytest.raises(InputError, match=f"scipy_{solver} does not run inside of transforms"):
            run(lambda x: solve(f, {"a": x})[0]["a"].sum())

    def test_without_scipy(self, solver, monkeypatch):
        solve, f = SOLVERS[solver]
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
        with pytest.raises(LuxtorchError, match=rf"not installed(.|\n)*scipy_{solver}(.|\n)*luxtorch\[scipy\]"):
            solve(f, self.PS)


@pytest.mark.parametrize("value", [lambda ps: ps["a"], lambda ps: 1.0, lambda ps: (ps["a"].sum(), {})])
def test_minimize_takes_a_scalar(value):
    with pytest.raises(InputError, match="does not return a scalar"):
        scipy_minimize(value, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda ps: 1.0, "float"),
        (lambda ps: (ps["a"], {}), "tuple"),
        (lambda ps: ps["a"] > 0, r"torch.bool, \(2,\)"),
        (lambda ps: ps["a"] * 1j, r"complex64, \(2,\)"),
        (lambda ps: ps["a"][:0], r"float32, \(0,\)"),
    ],
)
def test_least_squares_takes_residuals(value, got):
    with pytest.raises(DTypeError, match=rf"not return residuals(.|\n)*{got}(.|\n)*neither squared"):
        scipy_least_squares(value, {"a": torch.ones(2)})


def test_there_are_two_modes():
    with pytest.raises(InputError, match="mode must be 'reverse' or 'forward'"):
        scipy_least_squares(lambda ps: ps, torch.ones(2), mode="backward")
