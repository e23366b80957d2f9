"""L-BFGS, step by step and with its line search, against torch.optim and SciPy."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, KeyNameError
from luxtorch.optim import LBFGS, minimize
from luxtorch.optim._rule_state import ALL


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def quartic(x: Tensor) -> Tensor:
    """Be convex, with curvatures from about one to ten."""
    curvatures = torch.logspace(0, 1, len(x), dtype=x.dtype)
    return (curvatures * x**2).sum() / 2 + (x**4).sum() / 4 + x.roll(1).dot(x) / 4 - x.sum()


def network(x: Tensor) -> Tensor:
    """Fit a product of sines with 13 parameters: two inputs, three hidden units, weight decay."""
    w1, b1, w2, b2 = x[:6].view(3, 2), x[6:9], x[9:12], x[12]
    points = torch.cartesian_prod(*[torch.linspace(-2, 2, 7, dtype=x.dtype)] * 2)
    target = torch.sin(points[:, 0]) * torch.sin(points[:, 1])
    return (torch.tanh(points @ w1.T + b1) @ w2 + b2 - target).square().mean() + 1e-3 * x.square().sum()


PROBLEMS = {"rosenbrock": rosenbrock, "quartic": quartic, "network": network}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Any:
    return PROBLEMS[request.param]


class Torch:
    """torch.optim.LBFGS on a function of one vector."""

    def __init__(self, f: Any, x: Tensor, **options: Any) -> None:
        self.f, self.p = f, torch.nn.Parameter(x.clone())
        self.optimizer = torch.optim.LBFGS([self.p], **options)

    def step(self, **options: Any) -> Tensor:
        self.optimizer.param_groups[0].update(options)
        self.optimizer.step(self.closure)
        return self.p.detach().clone()

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.f(self.p)
        loss.backward()
        return loss

    @property
    def evaluations(self) -> int:
        return self.optimizer.state[self.p]["func_evals"]


WITHOUT_SEARCH = {"max_iter": 1, "tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": None}


def flat(kind: Any, ps: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in kind.leaves(ps)])


def descend(f: Any, rule: LBFGS, x: Tensor, steps: int) -> Tensor:
    opt_state = optim.setup(rule, x)
    for _ in range(steps):
        opt_state, x = optim.update(opt_state, x, torch.func.grad(f)(x))
    return x


class TestUpdate:
    @pytest.mark.parametrize("rule", [LBFGS(), LBFGS(0.5, 1), LBFGS(0.2, 4)], ids=repr)
    @pytest.mark.parametrize("form", ["numbers", "formula"])
    def test_equals_torch(self, rule, form, kind, draw):
        ps = kind.make(draw())
        reference = Torch(quartic, flat(kind, ps), lr=rule.lr, history_size=rule.history_size, **WITHOUT_SEARCH)
        step, opt_state = optim.update, optim.setup(rule, ps)
        if form == "formula":
            ps = pytree.tree_map(lambda p: p[None], ps)
            opt_state = pytree.tree_map(lambda value: value[None], opt_state)
            step = torch.vmap(optim.update)
        for _ in range(100):
            expected = reference.step()
            grads = torch.func.grad(lambda ps: quartic(flat(kind, ps)))(ps)
            opt_state, ps = step(opt_state, ps, grads)
            close(flat(kind, ps), expected)
        assert opt_state.state.leaves[ALL]["rho"].ravel()[0] > 0  # all pairs are in use

    def test_no_curvature_is_learnt_where_there_is_none(self):
        """On a concave function no pair is kept, as in torch."""
        x = torch.tensor([0.3, -0.2], dtype=torch.float64)
        reference = Torch(lambda x: -(x**2).sum(), x, lr=0.1, **WITHOUT_SEARCH)
        opt_state = optim.setup(LBFGS(0.1), x)
        for _ in range(5):
            expected = reference.step()
            opt_state, x = optim.update(opt_state, x, -2 * x)
            close(x, expected)
        assert not opt_state.state.leaves[ALL]["rho"].any()

    def test_states_share_what_they_remember(self):
        x = torch.tensor([0.3, -0.2], dtype=torch.float64)
        opt_state = optim.setup(LBFGS(0.1, 3), x)
        for _ in range(5):
            old = opt_state.state.leaves[ALL]
            opt_state, x = optim.update(opt_state, x, torch.func.grad(quartic)(x))
        new = opt_state.state.leaves[ALL]
        assert new["s_1"] is old["s_2"] and new["y_2"] is old["y_3"]

    def test_gradients_are_not_kept(self):
        """Whoever reuses the memory of gradients does not change what the rule remembers of them."""
        x, g = torch.ones(2), torch.ones(2)
        opt_state, _ = optim.update(optim.setup(LBFGS(), x), x, g)
        g.zero_()
        close(opt_state.state.leaves[ALL]["grad"], torch.ones(2))

    @pytest.mark.parametrize("make", [lambda tree: tree, ComponentVector], ids=["dict", "vector"])
    @pytest.mark.parametrize("path", ["layer_1", "layer_1.bias", "layer_2"])
    def test_a_frozen_parameter_is_a_constant(self, make, path, draw):
        """The others step as they do alone; where it is frozen or thawed, nothing is learnt about it."""
        ps = draw()
        names = ["layer_1.weight", "layer_1.bias", "layer_2.weight", "layer_2.bias"]
        moves = torch.cat(
            [
                torch.full((p.numel(),), not name.startswith(path))
                for name, p in zip(names, pytree.tree_leaves(ps), strict=True)
            ]
        )
        whole = torch.cat([leaf.ravel() for leaf in pytree.tree_leaves(ps)])
        expected = descend(lambda x: quartic(whole.masked_scatter(moves, x)), LBFGS(0.3, 3), whole[moves], 10)

        def step(opt_state: Any, ps: Any) -> Any:
            def loss(ps: Any) -> Tensor:
                return quartic(torch.cat([leaf.ravel() for leaf in pytree.tree_leaves(as_dict(ps))]))

            return optim.update(opt_state, ps, torch.func.grad(loss)(ps))

        def as_dict(ps: Any) -> Any:
            return ps.to_dict() if isinstance(ps, ComponentVector) else ps

        def vector(ps: Any) -> Tensor:
            return torch.cat([leaf.ravel() for leaf in pytree.tree_leaves(as_dict(ps))])

        ps = make(ps)
        opt_state = optim.freeze(optim.setup(LBFGS(0.3, 3), ps), path)
        for _ in range(10):
            opt_state, ps = step(opt_state, ps)
        close(vector(ps)[moves], expected)
        assert torch.equal(vector(ps)[~moves], whole[~moves])
        opt_state, ps = step(optim.thaw(opt_state), ps)
        assert (opt_state.state.leaves[ALL]["y_3"] == 0).equal(~moves)  # the change of a gradient that was not there
        for _ in range(3):
            opt_state, ps = step(opt_state, ps)
        before = vector(ps)
        opt_state, ps = step(optim.freeze(opt_state, path), ps)
        assert torch.equal(vector(ps)[~moves], before[~moves])
        assert (opt_state.state.leaves[ALL]["y_3"] == 0).equal(~moves)
        opt_state = optim.thaw(opt_state)
        for _ in range(50):
            opt_state, ps = step(opt_state, ps)
        close(vector(ps), descend(quartic, LBFGS(1.0), before, 50), 1e-4)

    def test_a_missing_gradient_is_one_that_is_frozen(self, draw):
        ps = draw()
        grads = {**draw(), "layer_1": None}
        opt_state = optim.setup(LBFGS(), ps)
        some = optim.update(opt_state, ps, grads)
        frozen = optim.update(optim.freeze(opt_state, "layer_1"), ps, {**grads, "layer_1": ps["layer_1"]})
        torch.testing.assert_close(some[1], frozen[1], rtol=0, atol=0)
        torch.testing.assert_close(some[0].state.leaves, frozen[0].state.leaves, rtol=0, atol=0, equal_nan=True)

    def test_compiled_with_frozen_parameters_and_a_schedule(self, draw):
        ps, grads = ComponentVector(draw()["layer_1"]), ComponentVector(draw()["layer_1"])
        opt_state = optim.freeze(optim.setup(LBFGS(optim.linear(0.5, 0.1, 4), 2), ps), "bias")
        compiled_state, compiled_ps = opt_state, ps
        compiled = torch.compile(optim.update, backend="aot_eager", fullgraph=True)
        for _ in range(4):
            opt_state, ps = optim.update(opt_state, ps, ps + grads)
            compiled_state, compiled_ps = compiled(compiled_state, compiled_ps, compiled_ps + grads)
        close(compiled_ps.flat, ps.flat, 1e-12)

    def test_a_schedule_scales_steps(self):
        x = torch.tensor([0.3, -0.2], dtype=torch.float64)
        opt_state = optim.setup(LBFGS(optim.piecewise([0.3, 0.1], [3])), x)
        reference = Torch(quartic, x, **WITHOUT_SEARCH)
        for i in range(6):
            expected = reference.step(lr=0.3 if i < 3 else 0.1)
            opt_state, x = optim.update(opt_state, x, torch.func.grad(quartic)(x))
            close(x, expected)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda rule: optim.OptimiserChain(optim.ClipNorm(1e9), rule),
            lambda rule: optim.MixedPrecision(rule, torch.float64),
            lambda rule: optim.Groups({"layer_1": rule, "layer_2": rule}),
            lambda rule: optim.OptimiserChain(rule),
        ],
        ids=["clipped", "precise", "groups", "alone"],
    )
    def test_inside_other_rules(self, wrap, draw):
        ps, rule = draw(), LBFGS(0.3, 3)
        opt_state, plain = optim.setup(wrap(rule), ps), optim.setup(rule, ps)
        layers = {name: optim.setup(rule, {name: ps[name]}) for name in ps}
        new = old = ps
        parts: dict[str, Any] = {name: {name: ps[name]} for name in ps}
        for _ in range(8):
            opt_state, new = optim.update(opt_state, new, new)
            plain, old = optim.update(plain, old, old)
            for name in ps:
                layers[name], parts[name] = optim.update(layers[name], parts[name], parts[name])
        groups = isinstance(wrap(rule), optim.Groups)
        close(new, {name: parts[name][name] for name in ps} if groups else old, 1e-12)

    def test_saved_and_loaded(self, draw):
        ps = draw()
        opt_state, ps = optim.update(optim.setup(LBFGS(0.3, 2), ps), ps, ps)
        buffer = io.BytesIO()
        torch.save(opt_state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        close(optim.update(loaded, ps, ps)[1], optim.update(opt_state, ps, ps)[1], 0.0)
        assert repr(loaded) == "OptState(LBFGS(lr=0.3, history_size=2), 4 parameters)"

    def test_adjusted_for_all_parameters_alone(self, draw):
        ps = draw()
        opt_state = optim.setup(LBFGS(1.0), ps)
        close(
            optim.update(optim.adjust(opt_state, 0.5), ps, ps)[1],
            optim.update(optim.setup(LBFGS(0.5), ps), ps, ps)[1],
            0.0,
        )
        with pytest.raises(InputError, match="LBFGS treats all parameters together"):
            optim.adjust(opt_state, 0.5, path="layer_1")

    def test_mixed_dtypes(self):
        ps = {"a": torch.ones(2), "b": torch.full((2,), 2.0, dtype=torch.float64)}
        opt_state, new = optim.update(optim.setup(LBFGS(), ps), ps, ps)
        close(new["a"], torch.full((2,), 1 - 1 / 6), 1e-6)
        close(new["b"], torch.full((2,), 2 - 2 / 6, dtype=torch.float64))
        assert opt_state.state.leaves[ALL]["grad"].dtype == torch.float64


class TestUpdateErrors:
    @pytest.mark.parametrize("size", [0, -1, 2.0, True])
    def test_history_size(self, size):
        with pytest.raises(InputError, match="history_size must be a positive integer"):
            LBFGS(history_size=size)

    def test_many_models_in_one_vector(self):
        with pytest.raises(InputError, match=r"many models as one(.|\n)*torch\.vmap"):
            optim.setup(LBFGS(), ComponentVector({"w": torch.ones(3, 2)}, batch_dims=1))

    def test_several_devices(self):
        with pytest.raises(InputError, match="on one device(.|\n)*cpu, meta"):
            optim.setup(LBFGS(), {"a": torch.ones(1), "b": torch.ones(1, device="meta")})

    def test_other_parameters(self):
        opt_state = optim.setup(LBFGS(), {"a": torch.ones(2)})
        with pytest.raises(KeyNameError, match="belongs to other parameters"):
            optim.update(opt_state, {"b": torch.ones(2)}, {"b": torch.ones(2)})
        with pytest.raises(InputError, match="other shapes(.|\n)*2 numbers in all(.|\n)*3"):
            optim.update(opt_state, {"a": torch.ones(3)}, {"a": torch.ones(3)})


def solved(f: Any, x: Tensor, rule: LBFGS | None = None, **options: Any) -> tuple[Tensor, Any]:
    _, x, result = minimize(f, optim.setup(rule or LBFGS(), x), x, **options)
    return x, result


class TestMinimize:
    @pytest.mark.parametrize("max_iter", [1, 10, 100])
    @pytest.mark.parametrize(
        "rule, tolerances",
        [(LBFGS(), (1e-7, 1e-9)), (LBFGS(0.1, 3), (0.0, 1e-12)), (LBFGS(1.0, 100), (0.0, 1e-12))],
        ids=["usual", "short", "long"],
    )
    def test_equals_torch(self, problem, rule, max_iter, tolerances, kind, draw):
        ps = kind.make(draw())
        options = {"max_iter": max_iter, "tolerance_grad": tolerances[0], "tolerance_change": tolerances[1]}
        reference = Torch(problem, flat(kind, ps), line_search_fn="strong_wolfe", lr=rule.lr, **options)
        expected = reference.step(history_size=rule.history_size)
        opt_state, ps, result = minimize(lambda ps: problem(flat(kind, ps)), optim.setup(rule, ps), ps, **options)
        close(flat(kind, ps), expected)
        assert result.evaluations == reference.evaluations
        assert result.iterations == opt_state.state.steps
        assert result.loss == problem(flat(kind, ps)).item()
        close(result.grad_norm, torch.func.grad(problem)(flat(kind, ps)).abs().max().item())

    @pytest.mark.parametrize("max_iter, calls", [(1, 30), (3, 10), (7, 6)])
    def test_goes_on_as_torch_does_with_other_data(self, max_iter, calls, problem, rng):
        """Each call sees a function that differs a little, and goes on from the state of the one before."""
        x = torch.randn(13, generator=rng, dtype=torch.float64)
        slopes = torch.randn(calls, 13, generator=rng, dtype=torch.float64) / 100
        reference = Torch(problem, x, line_search_fn="strong_wolfe", max_iter=max_iter, history_size=10)
        opt_state = optim.setup(LBFGS(), x)
        for slope in slopes:
            reference.f = f = lambda x, slope=slope: problem(x) + slope.dot(x)
            expected = reference.step()
            opt_state, x, _ = minimize(f, opt_state, x, max_iter=max_iter)
            close(x, expected)

    def test_takes_turns_with_update(self, rng):
        x = torch.randn(13, generator=rng, dtype=torch.float64)
        reference = Torch(quartic, x, history_size=10, tolerance_grad=0, tolerance_change=0)
        opt_state = optim.setup(LBFGS(), x)
        for i in range(9):
            if i % 3 == 1:
                expected = reference.step(max_iter=3, max_eval=100, line_search_fn="strong_wolfe")
                opt_state, x, _ = minimize(
                    quartic, opt_state, x, max_iter=3, max_eval=100, tolerance_grad=0, tolerance_change=0
                )
            else:
                expected = reference.step(max_iter=1, line_search_fn=None)
                opt_state, x = optim.update(opt_state, x, torch.func.grad(quartic)(x))
            close(x, expected)

    @pytest.mark.parametrize("parts", [(50, 50), (1, 99), (99, 1)])
    def test_two_calls_are_one(self, parts):
        x = torch.full((10,), -1.2, dtype=torch.float64)
        whole, result = solved(rosenbrock, x, max_iter=100, max_eval=1000, tolerance_change=0.0)
        opt_state, evaluations = optim.setup(LBFGS(), x), 0
        for max_iter in parts:
            opt_state, x, part = minimize(
                rosenbrock, opt_state, x, max_iter=max_iter, max_eval=1000, tolerance_change=0.0
            )
            evaluations += part.evaluations
        assert torch.equal(x, whole)
        assert evaluations == result.evaluations + (part.evaluations > 0)

    @pytest.mark.parametrize(
        "f, start", [(rosenbrock, [-1.2, 1.0] * 5), (himmelblau, [0.0, 0.0]), (himmelblau, [-4.0, 4.0])]
    )
    def test_finds_what_scipy_finds(self, f, start):
        def value_and_slope(x: np.ndarray) -> Any:
            slope, value = torch.func.grad_and_value(f)(torch.from_numpy(x))
            return value.item(), slope.numpy()

        theirs = scipy.optimize.minimize(
            value_and_slope, start, method="L-BFGS-B", jac=True, options={"ftol": 1e-15, "gtol": 1e-9}
        )
        x, result = solved(f, torch.tensor(start, dtype=torch.float64), tolerance_grad=1e-9, tolerance_change=1e-15)
        assert result.converged
        close(x, torch.from_numpy(theirs.x), 1e-6)
        assert result.evaluations <= 1.5 * theirs.nfev

    def test_single_precision(self):
        x, result = solved(rosenbrock, torch.tensor([-1.2, 1.0]))
        assert x.dtype == torch.float32 and result.converged
        close(x, torch.ones(2), 1e-3)

    @pytest.mark.parametrize("path", ["layer_1", "layer_1.bias", "layer_2"])
    @pytest.mark.parametrize("kind", ["dict", "vector"], indirect=True)
    def test_a_frozen_parameter_is_a_constant(self, path, kind, draw):
        ps = kind.make(draw())
        names = ["layer_1.weight", "layer_1.bias", "layer_2.weight", "layer_2.bias"]
        moves = torch.cat(
            [
                torch.full((p.numel(),), not name.startswith(path))
                for name, p in zip(names, kind.leaves(ps), strict=True)
            ]
        )
        whole = flat(kind, ps)
        expected, _ = solved(lambda x: quartic(whole.masked_scatter(moves, x)), whole[moves])
        opt_state = optim.freeze(optim.setup(LBFGS(), ps), path)
        opt_state, ps, result = minimize(lambda ps: quartic(flat(kind, ps)), opt_state, ps)
        assert result.converged
        close(flat(kind, ps)[moves], expected, 1e-8)
        assert torch.equal(flat(kind, ps)[~moves], whole[~moves])
        _, ps, _ = minimize(lambda ps: quartic(flat(kind, ps)), optim.thaw(opt_state), ps)
        close(flat(kind, ps), solved(quartic, whole)[0], 1e-4)

    def test_all_frozen(self, draw):
        ps = draw()
        opt_state = optim.freeze(optim.setup(LBFGS(), ps))
        _, new, result = minimize(lambda ps: ps["layer_1"]["bias"].sum(), opt_state, ps)
        assert new is ps and result.iterations == 0

    @pytest.mark.parametrize(
        "barrier",
        [
            lambda x: 3 * x - x.log(),  # NaN below zero
            lambda x: torch.where(x > 0, 3 * x - x.log(), math.inf),
            lambda x: 3 * x - 2 * x.sqrt(),  # NaN, and a slope that is infinite on the way
            lambda x: 9 * x + (-9 * x).exp(),  # overflows
        ],
        ids=["nan", "inf", "root", "overflow"],
    )
    @pytest.mark.parametrize("start", [2.0, 7.0])
    def test_where_the_loss_is_not_finite_is_too_far(self, barrier, start):
        x, result = solved(barrier, torch.tensor(start, dtype=torch.float64), LBFGS(100.0))
        assert result.converged
        assert torch.func.grad(barrier)(x).abs() < 1e-3

    def test_nothing_is_lower(self):
        """Where only the start is finite, the search ends there."""
        start = torch.tensor([1.0, 2.0], dtype=torch.float64)
        x, result = solved(lambda x: x.sum() * (1.0 if x.equal(start) else math.nan), start, max_eval=100)
        assert torch.equal(x, start)
        assert (result.reason, result.converged, result.loss) == ("line search", False, 3.0)

    def test_minimum_from_the_start(self):
        x = torch.zeros(3)
        opt_state = optim.setup(LBFGS(), x)
        new_state, new, result = minimize(lambda x: (x**2).sum(), opt_state, x)
        assert new is x
        assert result == (0.0, 0.0, 0, 1, "gradient")
        assert result.converged
        close(pytree.tree_leaves(new_state), pytree.tree_leaves(opt_state), 0.0)

    @pytest.mark.parametrize(
        "scale, options, reason",
        [
            (1.0, {"tolerance_grad": 1e-1}, "gradient"),
            (1e3, {"tolerance_change": 1e-2}, "step"),
            (1.0, {"tolerance_change": 1e-2}, "loss"),
            (1e-6, {"tolerance_change": 1e-2}, "slope"),
            (1.0, {"max_iter": 3, "max_eval": 100}, "iterations"),
            (1.0, {"max_eval": 4}, "evaluations"),
        ],
    )
    def test_reasons(self, scale, options, reason):
        x = torch.full((5,), 2.0, dtype=torch.float64)
        _, result = solved(lambda x: scale * quartic(x), x, **{"tolerance_grad": 0.0, **options})
        assert result.reason == reason
        assert result.converged == (reason in ("gradient", "step", "loss", "slope"))

    @pytest.mark.parametrize("ps", [{}, {"a": torch.empty(0)}, torch.empty(0, 3)], ids=repr)
    def test_no_parameters(self, ps):
        opt_state, new, result = minimize(lambda ps: torch.tensor(2.0), optim.setup(LBFGS(), ps), ps)
        assert new is ps and result == (2.0, 0.0, 0, 1, "gradient")
        close(optim.update(opt_state, ps, ps)[1], ps, 0.0)

    def test_parameters_that_do_not_matter(self):
        ps = {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}
        _, ps, result = minimize(lambda ps: ps["a"] ** 2, optim.setup(LBFGS(), ps), ps)
        assert result.converged and ps["b"] == 1.0
        close(ps["a"], torch.tensor(0.0), 1e-6)

    def test_pure(self, draw):
        """Nothing is changed, results have memory of their own and are on no tape, and come out the same again."""
        weight = torch.ones(13, dtype=torch.float64, requires_grad=True)
        ps = pytree.tree_map(lambda leaf: leaf.requires_grad_(), draw())

        def f(ps: Any) -> Tensor:
            return quartic(weight * torch.cat([leaf.ravel() for leaf in pytree.tree_leaves(ps)]))

        opt_state, ps, _ = minimize(f, optim.setup(LBFGS(), ps), ps, max_iter=5)
        arguments = (opt_state, ps)
        before = pytree.tree_map(torch.clone, arguments)
        first, second = (minimize(f, *arguments, max_iter=5) for _ in range(2))
        close(pytree.tree_leaves(arguments), pytree.tree_leaves(before), 0.0)
        close(pytree.tree_leaves(first[:2]), pytree.tree_leaves(second[:2]), 0.0)
        assert first[2] == second[2]
        assert weight.grad is None
        assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(first[:2]))
        leaves = pytree.tree_leaves(first[1])
        assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
            lambda f: lambda x: torch.vmap(f)(x.expand(3, -1)).mean(),
            lambda f: lambda x: f(x) + 0 * torch.func.grad(f)(x).square().sum(),
        ],
        ids=["compiled", "vmap", "gradient"],
    )
    def test_the_function_may_be_transformed(self, wrap):
        x = torch.full((4,), 2.0, dtype=torch.float64)
        close(solved(wrap(quartic), x)[0], solved(quartic, x)[0], 1e-6)

    def test_under_no_grad(self):
        x = torch.full((4,), 2.0, dtype=torch.float64)
        with torch.no_grad():
            inside, _ = solved(quartic, x)
        assert torch.equal(inside, solved(quartic, x)[0])


class TestMinimizeErrors:
    def test_rule(self):
        x = torch.ones(2)
        for rule in (optim.Adam(), optim.OptimiserChain(optim.ClipNorm(), LBFGS())):
            with pytest.raises(DTypeError, match=r"line search is for LBFGS alone(.|\n)*OptState"):
                minimize(quartic, optim.setup(rule, x), x)
        with pytest.raises(DTypeError, match=r"line search is for LBFGS alone(.|\n)*got: +Tensor"):
            minimize(quartic, x, optim.setup(LBFGS(), x))

    @pytest.mark.parametrize("f", [lambda x: x, lambda x: (x.sum(), {}), lambda x: x.sum().item()])
    def test_not_a_scalar(self, f):
        with pytest.raises(InputError, match="does not return a scalar"):
            solved(f, torch.ones(2))

    def test_not_a_real_number(self):
        with pytest.raises(DTypeError, match="complex64"):
            solved(lambda x: x.sum() * 1j, torch.ones(2))

    @pytest.mark.parametrize(
        "f", [lambda x: x.sum() * math.nan, lambda x: x.sum() + math.inf, lambda x: x.sqrt().sum()]
    )
    def test_not_finite_from_the_start(self, f):
        with pytest.raises(InputError, match="not finite where the search begins"):
            solved(f, torch.zeros(2))

    @pytest.mark.parametrize(
        "options", [{"max_iter": 0}, {"max_eval": 0}, {"tolerance_grad": -1.0}, {"tolerance_change": math.nan}]
    )
    def test_options(self, options):
        with pytest.raises(InputError, match=f"{next(iter(options))} must be at least"):
            solved(quartic, torch.ones(2), **options)

    def test_in_inference_mode(self):
        with torch.inference_mode(), pytest.raises(InputError, match="inference mode"):
            solved(quartic, torch.ones(2))

    def test_a_parameter_without_derivative(self):
        ps = {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}
        with pytest.raises(DTypeError, match=r"n: A parameter is not differentiable\.(.|\n)*int64"):
            minimize(lambda ps: ps["a"].sum(), optim.setup(LBFGS(), ps), ps)

    def test_many_models(self):
        x = torch.ones(2, 3)
        opt_state = torch.vmap(lambda x: optim.setup(LBFGS(), x))(x)
        with pytest.raises(InputError, match="state is that of many models"):
            minimize(lambda x: x.sum(), opt_state, x)

    def test_other_parameters(self):
        opt_state = optim.setup(LBFGS(), {"a": torch.ones(2)})
        with pytest.raises(KeyNameError, match="belongs to other parameters"):
            minimize(lambda ps: ps["b"].sum(), opt_state, {"b": torch.ones(2)})
        with pytest.raises(InputError, match="other shapes"):
            minimize(lambda ps: ps["a"].sum(), opt_state, {"a": torch.ones(3)})
