"""Models inside of torchdiffeq's solvers: plain closures, gradients to parameters of any form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training

torchdiffeq = pytest.importorskip("torchdiffeq")
odeint, odeint_adjoint = torchdiffeq.odeint, torchdiffeq.odeint_adjoint

MODEL = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 2))
TIMES = torch.linspace(0, 1, 6, dtype=torch.float64)
PRECISE = {"rtol": 1e-10, "atol": 1e-10}
METHODS = {"rk4": {"method": "rk4"}, "dopri5": {"method": "dopri5", **PRECISE}}
FORMS = {"dict": lambda tree: tree, "vector": lt.ComponentVector}


@pytest.fixture
def tree(make_key) -> Any:
    return lt.f64(lt.setup(make_key(), MODEL)[0])


@pytest.fixture
def y0(rng) -> Tensor:
    return torch.randn(3, 2, generator=rng, dtype=torch.float64)


def solve(ps, y0, solver=odeint, **options):
    _, st = lt.setup(0, MODEL)
    return solver(lambda t, y: MODEL(y, ps, st)[0], y0, TIMES, **options)


def loss(ps, y0, solver=odeint, **options):
    return solve(ps, y0, solver, **options).square().sum()


def by_hand(tree, y0, **options):
    """Return the loss of plain tensors and torch's own functions."""
    first, second = tree["layer_1"], tree["layer_2"]

    def slope(t, y):
        return F.linear(torch.tanh(F.linear(y, first["weight"], first["bias"])), second["weight"], second["bias"])

    return odeint(slope, y0, TIMES, **options).square().sum()


def taped(form, tree):
    """Return parameters whose leaves require gradients, and the leaves."""
    leaves, spec = pytree.tree_flatten(form(tree))
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return pytree.tree_unflatten(leaves, spec), leaves


def flat(leaves):
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


@pytest.fixture(params=METHODS)
def options(request) -> Any:
    return METHODS[request.param]


@pytest.fixture(params=FORMS)
def form(request) -> Any:
    return FORMS[request.param]


def hand_gradient(tree, y0, **options):
    plain, leaves = taped(FORMS["dict"], tree)
    return flat(torch.autograd.grad(by_hand(plain, y0, **options), leaves))


class TestGradients:
    def test_of_the_tape_are_those_of_plain_tensors(self, form, options, tree, y0):
        ps, leaves = taped(form, tree)
        found = torch.autograd.grad(loss(ps, y0, **options), leaves)
        torch.testing.assert_close(flat(found), hand_gradient(tree, y0, **options), rtol=1e-12, atol=1e-12)

    def test_of_the_tape_are_finite_differences(self, options, tree, y0, rng):
        """Along a random direction, in double precision, whatever the solver does in between."""
        ps, leaves = taped(lt.ComponentVector, tree)
        direction = torch.randn(ps.flat.shape, generator=rng, dtype=torch.float64)
        found = torch.autograd.grad(loss(ps, y0, **options), leaves)[0] @ direction
        h = 1e-6
        with torch.no_grad():
            ends = [
                loss(lt.ComponentVector.from_flat(ps.flat + s * h * direction, ps.axes), y0, **options) for s in (1, -1)
            ]
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), found, rtol=1e-6, atol=1e-6)

    def test_by_the_adjoint_equation(self, form, options, tree, y0):
        """`adjoint_params` are the leaves of the tree; nothing has to be a module."""
        ps, leaves = taped(form, tree)
        y0 = y0.requires_grad_()
        found = torch.autograd.grad(loss(ps, y0, odeint_adjoint, **options, adjoint_params=leaves), [*leaves, y0])
        expected = torch.autograd.grad(loss(ps, y0, **options), [*leaves, y0])
        tolerance = 1e-7 if options["method"] == "dopri5" else 1e-2  # rk4 backwards is not the derivative of rk4
        torch.testing.assert_close(flat(found), flat(expected), rtol=tolerance, atol=tolerance)

    def test_by_the_adjoint_equation_as_a_module(self, tree, y0):
        """`lt.to_torch` makes a module for those who want one."""
        _, st = lt.setup(0, MODEL)
        module = lt.to_torch(MODEL, tree, st)

        class Slope(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = module

            def forward(self, t, y):
                return self.net(y)

        odeint_adjoint(Slope(), y0, TIMES, method="dopri5", **PRECISE).square().sum().backward()
        found = flat([p.grad for p in module.parameters()])
        torch.testing.assert_close(found, hand_gradient(tree, y0, **METHODS["dopri5"]), rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("mode", ["reverse", "forward"])
    def test_by_transforms_through_fixed_steps(self, mode, form, tree, y0):
        grads = lt.gradient(lambda ps: loss(ps, y0, method="rk4"), form(tree), mode=mode)
        assert type(grads) is type(form(tree))
        found = flat(pytree.tree_leaves(grads))
        torch.testing.assert_close(found, hand_gradient(tree, y0, method="rk4"), rtol=1e-10, atol=1e-10)

    def test_hessian_and_jit_through_fixed_steps(self, tree, y0, rng):
        ps = lt.ComponentVector(tree)
        H = lt.hessian(lambda ps: loss(ps, y0, method="rk4"), ps)
        v = torch.randn(ps.flat.shape, generator=rng, dtype=torch.float64)
        product = lt.hvp(lambda ps: loss(ps, y0, method="rk4"), ps, lt.ComponentVector.from_flat(v, ps.axes))
        torch.testing.assert_close(H.data @ v, product.flat)
        gradient = lt.jit(lambda ps: lt.gradient(lambda ps: loss(ps, y0, method="rk4"), ps), backend="replay")
        for _ in range(2):
            torch.testing.assert_close(gradient(ps).flat, hand_gradient(tree, y0, method="rk4"))

    @pytest.mark.xfail(raises=RuntimeError, reason="torchdiffeq writes into buffers by functions of autograd's tape")
    @pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
    def test_by_transforms_through_steps_of_its_choice(self, solver, tree, y0):
        told = {"adjoint_params": ()} if solver is odeint_adjoint else {}
        lt.gradient(lambda ps: loss(ps, y0, solver, method="dopri5", **told), tree)


class TestTraining:
    @pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
    def test_a_step_takes_gradients_on_the_tape(self, form, options, solver, tree, y0):
        def objective(model, ps, st, data):
            told = {"adjoint_params": lt.core.tree_leaves(ps)} if solver is odeint_adjoint else {}
            solution = solver(lambda t, y: model(y, ps, st)[0], data, TIMES, **options, **told)
            return solution.square().sum(), st, {}

        _, st = lt.setup(0, MODEL)
        ts = training.TrainState(MODEL, form(tree), st, optim.Descent(1e-3))
        grads, *_ = training.compute_gradients(objective, y0, ts)
        expected = hand_gradient(tree, y0, **options)
        close = 1e-10 if solver is odeint else 1e-7 if options["method"] == "dopri5" else 1e-2
        found = flat(pytree.tree_leaves(grads))
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        _, before, _, ts = training.single_train_step(objective, y0, ts)
        _, after, _, _ = training.single_train_step(objective, y0, ts)
        assert after < before

    def test_minimizers_take_gradients_on_the_tape(self, form, tree, y0):
        """A law is learnt from its solution."""
        target = solve(pytree.tree_map(lambda p: p * 0.8, tree), y0, method="dopri5")
        start = form(pytree.tree_map(lambda p: p * 1.2, tree))

        def f(ps):
            return (solve(ps, y0, method="dopri5") - target).square().mean()

        _, _, result = optim.minimize(f, optim.setup(optim.LBFGS(), start), start, max_iter=15)
        assert result.loss < 1e-2 * f(start).item()

    def test_rows_of_a_batch_are_solved_together(self, tree, y0):
        _, st = lt.setup(0, MODEL)
        together = solve(tree, y0, method="rk4")
        alone = torch.stack([solve(tree, row, method="rk4") for row in y0], 1)
        torch.testing.assert_close(together, alone)

    def test_a_model_may_know_the_time(self, make_key):
        """dy/dt = t, of a model that is exact: y = t**2 / 2."""
        model = lt.Dense(2, 1, bias=False)
        ps, st = {"weight": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}, lt.setup(make_key(), model)[1]
        y = odeint(
            lambda t, y: model(torch.stack([t, y[0]]), ps, st)[0],
            torch.zeros(1, dtype=torch.float64),
            TIMES,
            method="rk4",
        )
        torch.testing.assert_close(y[:, 0], TIMES**2 / 2)
