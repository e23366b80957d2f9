"""Many differential equations at once: torchdiffeq's solvers and that of the guide, under vmap and other transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from scipy.integrate import solve_ivp
from torch import Tensor

import luxtorch as lt

torchdiffeq = pytest.importorskip("torchdiffeq")
odeint = torchdiffeq.odeint

PAGE = (Path(__file__).parents[2] / "docs" / "differential_equations.md").read_text()
MODEL = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 2))
TIMES = torch.linspace(0, 1, 5, dtype=torch.float64)
MEMBERS = 3
# The orders of their errors.
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE = ["dopri5", "bosh3"]
FORMS = {"dict": lambda tree: tree, "vector": lt.ComponentVector}


def own_rk4() -> Any:
    """Return the solver that stands in the guide."""
    block = next(part for part in PAGE.split("```") if part.startswith("python\n") and "def rk4" in part)
    scope: dict[str, Any] = {"torch": torch, "lt": lt}
    exec(block.removeprefix("python\n"), scope)
    return scope["rk4"]


RK4 = own_rk4()
METHODS = [*FIXED, "own"]


def solve(f, y0, times=TIMES, method="rk4", **options):
    return RK4(f, y0, times) if method == "own" else odeint(f, y0, times, method=method, **options)


def slope(t, y, ps):
    _, st = lt.setup(0, MODEL)
    return MODEL(y, ps, st)[0] * (1 + t)


def alone(ps, y0, method, **options):
    return solve(lambda t, y: slope(t, y, ps), y0, method=method, **options)


def inside(ps, y0, method, **options):
    """Return the solutions of members, stacked, by vmap in the right-hand side."""
    slopes = torch.vmap(slope, in_dims=(None, 0, 0))
    return solve(lambda t, y: slopes(t, y, ps), y0, method=method, **options)


@pytest.fixture(params=FORMS)
def members(request, make_key) -> Any:
    trees = [FORMS[request.param](lt.f64(lt.setup(make_key(), MODEL)[0])) for _ in range(MEMBERS)]
    return trees, pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


@pytest.fixture
def starts(rng) -> Tensor:
    return torch.randn(MEMBERS, 2, generator=rng, dtype=torch.float64)


def by_scipy(ps, y0, times=TIMES):
    """Return the solution by SciPy's method of order eight, nearly exact."""

    def f(t, y):
        with torch.no_grad():
            return slope(float(t), torch.from_numpy(y), ps).numpy()

    found = solve_ivp(f, (0, 1), y0.numpy(), "DOP853", times.numpy(), rtol=1e-12, atol=1e-12)
    return torch.from_numpy(np.ascontiguousarray(found.y.T))


def close(a, b, tolerance=1e-10):
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class TestVmapInTheRightHandSide:
    @pytest.mark.parametrize("method", METHODS)
    def test_fixed_steps_are_those_of_a_loop(self, members, starts, method):
        trees, stacked = members
        found = inside(stacked, starts, method)
        close(found, torch.stack([alone(ps, y0, method) for ps, y0 in zip(trees, starts, strict=True)], 1))

    @pytest.mark.parametrize("method", METHODS)
    def test_fixed_steps_come_near_the_solution_of_scipy(self, members, starts, method):
        """And nearer with half the step, by the order of the method."""
        trees, stacked = members
        exact = torch.stack([by_scipy(ps, y0) for ps, y0 in zip(trees, starts, strict=True)], 1)
        slopes, errors = torch.vmap(slope, in_dims=(None, 0, 0)), []
        for n in (2, 4):
            times = torch.linspace(0, 1, 4 * n + 1, dtype=torch.float64)
            found = solve(lambda t, y: slopes(t, y, stacked), starts, times, method)[::n]
            errors.append(float((found - exact).abs().max()))
        order = FIXED.get(method, 4)
        assert errors[0] < 2 * 0.3**order and errors[1] < errors[0] / 2 ** (order - 0.5)

    @pytest.mark.parametrize(("method", "compiled"), [*((name, False) for name in METHODS), ("rk4", True)])
    def test_the_gradient_of_the_sum_is_that_of_each(self, members, starts, method, compiled):
        trees, stacked = members

        def of_each(ps, y0):
            return lt.gradient(lambda ps, y0: inside(ps, y0, method).square().sum(), ps, y0)

        found = (lt.jit(of_each, backend="replay") if compiled else of_each)(stacked, starts)
        for i, (ps, y0) in enumerate(zip(trees, starts, strict=True)):
            expected = lt.gradient(lambda ps, y0: alone(ps, y0, method).square().sum(), ps, y0)
            close(pytree.tree_map(lambda leaf, i=i: leaf[i], found), expected)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_steps_that_are_chosen_are_shared(self, starts, method):
        """One member that is twenty times as fast sets the pace for all: so many calls are made, and no more."""
        speeds, calls = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64), []

        def count(f):
            calls.append(0)

            def counted(t, y):
                calls[-1] += 1
                return f(t, y)

            return counted

        slopes = torch.vmap(lambda t, y, speed: torch.stack([y[1], -y[0]]) * speed, in_dims=(None, 0, 0))
        options = {"method": method, "rtol": 1e-4, "atol": 1e-4, "options": {"norm": lambda x: x.abs().max()}}
        together = odeint(count(lambda t, y: slopes(t, y, speeds)), starts, TIMES, **options)
        for i in (0, 2):
            odeint(count(lambda t, y, i=i: slopes(t, y[None], speeds[i : i + 1])[0]), starts[i], TIMES, **options)
        assert 3 * calls[1] < calls[0] < 1.2 * calls[2]
        t = TIMES[:, None] * speeds
        exact = torch.stack([starts[:, 0] * t.cos() + starts[:, 1] * t.sin()], -1)
        assert float((together[..., :1] - exact).abs().max()) < 1e-2

    def test_steps_that_are_chosen_by_the_largest_error_are_precise_for_each(self, members, starts):
        trees, stacked = members
        options = {"rtol": 1e-6, "atol": 1e-6, "options": {"norm": lambda x: x.abs().max()}}
        found = inside(stacked, starts, "dopri5", **options)
        exact = torch.stack([by_scipy(ps, y0) for ps, y0 in zip(trees, starts, strict=True)], 1)
        close(found, exact, 1e-4)

    def test_gradients_of_the_tape_go_through_chosen_steps(self, members, starts):
        trees, stacked = members
        options = {"rtol": 1e-8, "atol": 1e-8}
        leaves, spec = pytree.tree_flatten(stacked)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        value = inside(pytree.tree_unflatten(leaves, spec), starts, "dopri5", **options).square().sum()
        found = torch.autograd.grad(value, leaves)
        for i, (ps, y0) in enumerate(zip(trees, starts, strict=True)):
            own, spec = pytree.tree_flatten(ps)
            own = [leaf.clone().requires_grad_() for leaf in own]
            value = alone(pytree.tree_unflatten(own, spec), y0, "dopri5", **options).square().sum()
            close([leaf[i] for leaf in found], torch.autograd.grad(value, own), 1e-5)


class TestVmapAround:
    @pytest.mark.xfail(raises=RuntimeError, reason="torchdiffeq writes into memory that is no batch")
    @pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
    @pytest.mark.parametrize("over", ["starts", "parameters"])
    def test_torchdiffeq(self, members, starts, method, over):
        trees, stacked = members
        if over == "starts":
            torch.vmap(lambda y0: alone(trees[0], y0, method))(starts)
        else:
            torch.vmap(lambda ps: alone(ps, starts[0], method))(stacked)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_the_own_solver_over_starts_parameters_and_times(self, members, starts, compiled):
        trees, stacked = members
        times = TIMES * torch.arange(1, MEMBERS + 1, dtype=torch.float64)[:, None]

        def one(ps, y0, times):
            return RK4(lambda t, y: slope(t, y, ps), y0, times)

        many = torch.vmap(one)
        found = (lt.jit(many, backend="replay") if compiled else many)(stacked, starts, times)
        close(found, torch.stack([one(*arguments) for arguments in zip(trees, starts, times, strict=True)]))


# What the own solver is put through, as a function of the loss of one equation and of its parameters.
TRANSFORMS = {
    "gradient": lambda f, ps: lt.gradient(f, ps),
    "forward": lambda f, ps: lt.gradient(f, ps, mode="forward"),
    "vmap of gradients": lambda f, ps: torch.vmap(lambda factor: lt.gradient(lambda ps: f(ps, factor), ps))(
        torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    ),
    "gradient of vmap": lambda f, ps: lt.gradient(
        lambda ps: torch.vmap(lambda a: f(ps, a))(torch.tensor([0.5, 2.0], dtype=torch.float64)).prod(), ps
    ),
    "jvp": lambda f, ps: torch.func.jvp(f, (ps,), (pytree.tree_map(torch.cos, ps),)),
    "hvp": lambda f, ps: lt.hvp(f, ps, pytree.tree_map(torch.cos, ps)),
}


def unrolled(f, y0, times):
    """Return what the guide's solver computes, for a state of one tensor, by a loop."""
    ys = [y0]
    for start, end in zip(times[:-1], times[1:], strict=True):
        h, y = end - start, ys[-1]
        a = f(start, y)
        b = f(start + h / 2, y + h / 2 * a)
        c = f(start + h / 2, y + h / 2 * b)
        ys.append(y + h * (a + 2 * b + 2 * c + f(end, y + h * c)) / 6)
    return torch.stack(ys)


class TestTheSolverOfTheGuide:
    @pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_transforms_are_those_of_a_loop(self, members, starts, name, compiled):
        trees, _ = members

        def of(solver):
            def loss(ps, factor=1.0):
                return solver(lambda t, y: slope(t, y, ps), factor * starts[0], TIMES[::2])[-1].square().sum()

            return lambda ps: TRANSFORMS[name](loss, ps)

        found = lt.jit(of(RK4), backend="replay") if compiled else of(RK4)
        for ps in trees[: 1 + compiled]:
            close(found(ps), of(unrolled)(ps))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("compiled", [False, True])
    def test_states_are_trees(self, form, compiled):
        """A spring swings by cosine and sine, and so does each of many, with a gradient of its own."""
        y0 = FORMS[form]({"place": torch.ones(1, dtype=torch.float64), "speed": torch.zeros(1, dtype=torch.float64)})

        def motion(t, y, stiffness):
            return FORMS[form]({"place": y["speed"], "speed": -stiffness * y["place"]})

        def place(stiffness):
            return RK4(lambda t, y: motion(t, y, stiffness), y0, TIMES)["place"][-1, 0]

        many = torch.vmap(torch.func.grad_and_value(place))
        stiffness = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
        slopes, values = (lt.jit(many, backend="replay") if compiled else many)(stiffness)
        root = stiffness.sqrt()
        close(values, root.cos(), 1e-2)
        close(slopes, -root.sin() / (2 * root), 1e-2)
