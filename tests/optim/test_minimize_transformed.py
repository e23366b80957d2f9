"""`minimize` inside of transforms and of `lt.jit`: what it finds is what it finds outside, with exact derivatives."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError
from luxtorch.optim import LBFGS, minimize

TIGHT = {"tolerance_grad": 1e-9, "tolerance_change": 0.0}
OFFSETS = torch.linspace(-1, 2, 4, dtype=torch.float64)


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def rosenbrock(x: Tensor, offset: Any = 0.0) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 + offset - x[:-1]) ** 2).sum()


def quartic(x: Tensor, offset: Any = 1.0) -> Tensor:
    curvatures = torch.logspace(0, 1, len(x), dtype=x.dtype)
    return (curvatures * x**2).sum() / 2 + (x**4).sum() / 4 + x.roll(1).dot(x) / 4 - offset * x.sum()


def network(x: Tensor, offset: Any = 0.0) -> Tensor:
    w1, b1, w2, b2 = x[:6].view(3, 2), x[6:9], x[9:12], x[12]
    points = torch.cartesian_prod(*[torch.linspace(-2, 2, 5, dtype=x.dtype)] * 2)
    target = torch.sin(points[:, 0] + offset) * torch.sin(points[:, 1])
    return (torch.tanh(points @ w1.T + b1) @ w2 + b2 - target).square().mean() + 1e-2 * x.square().sum()


PROBLEMS = {"rosenbrock": rosenbrock, "quartic": quartic, "network": network}


def flat(kind: Any, ps: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in kind.leaves(ps)])


def stacked(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def ways(f: Any) -> dict[str, Any]:
    """Return a function of one member for a batch of them, in all ways."""

    def one_by_one(jitted: Any) -> Any:
        return lambda *batch: stacked(
            [
                pytree.tree_map(torch.as_tensor, jitted(*pytree.tree_map(lambda leaf, i=i: leaf[i], batch)))
                for i in range(len(pytree.tree_leaves(batch)[0]))
            ]
        )

    return {
        "vmap": torch.vmap(f),
        "jit": one_by_one(lt.jit(f, backend="replay")),
        "vmap in jit": lt.jit(torch.vmap(f), backend="replay"),
        "jit in vmap": torch.vmap(lt.jit(f, backend="replay")),
    }


def found(f: Any, x: Any, *operands: Any, rule: LBFGS | None = None, **options: Any) -> Any:
    return minimize(f, optim.setup(rule or LBFGS(history_size=4), x), x, *operands, **options)


# Values.


def check_members(way: str, f: Any, kind: Any, draw: Any, closed: bool) -> None:
    members = [kind.make(draw()) for _ in OFFSETS]

    def fit(ps: Any, offset: Tensor) -> Any:
        loss = lambda ps, offset=offset: f(flat(kind, ps), offset)  # noqa: E731
        opt_state, ps, result = found(loss, ps, *(() if closed else (offset,)), max_iter=9)
        return opt_state, flat(kind, ps), result

    outside = [fit(ps, offset) for ps, offset in zip(members, OFFSETS, strict=True)]
    opt_state, x, result = ways(fit)[way](stacked(members), OFFSETS)
    close(x, torch.stack([x for _, x, _ in outside]), 1e-6)
    close(result.loss, torch.tensor([r.loss for *_, r in outside], dtype=torch.float64))
    assert result.why() == [r.reason for *_, r in outside]
    assert result.iterations.tolist() == [r.iterations for *_, r in outside]
    assert result.evaluations.tolist() == [r.evaluations for *_, r in outside]
    close(opt_state.state.steps, torch.stack([o.state.steps for o, *_ in outside]), 0.0)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_member_of_a_batch_is_found_as_alone(problem, kind, draw):
    check_members("vmap", PROBLEMS[problem], kind, draw, closed=problem == "network")


@pytest.mark.parametrize(
    "way, kind, closed",
    [("jit", "dict", True), ("vmap in jit", "vector", False), ("jit in vmap", "mixed", True)],
    indirect=["kind"],
)
def test_compiled(way, kind, closed, draw):
    check_members(way, network, kind, draw, closed)


@pytest.mark.slow
def test_compiled_by_inductor():
    x = torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64)
    _, expected, outside = found(rosenbrock, x, **TIGHT)
    _, inside, result = lt.jit(lambda x: found(rosenbrock, x, **TIGHT))(x)
    close(inside, expected, 1e-7)
    assert bool(result.converged) == outside.converged


@pytest.mark.parametrize(
    "scale, options, reason",
    [
        (1.0, {"tolerance_grad": 1e-1}, "gradient"),
        (1e3, {"tolerance_change": 1e-2}, "step"),
        (1.0, {"tolerance_change": 1e-2}, "loss"),
        (1e-6, {"tolerance_change": 1e-2}, "slope"),
        (1.0, {"max_iter": 3, "max_eval": 100}, "iterations"),
        (1.0, {"max_iter": 1}, "iterations"),
        (1.0, {"max_eval": 1}, "evaluations"),
        (1.0, {"max_eval": 4}, "evaluations"),
        (1.0, {"tolerance_grad": 1e9}, "gradient"),
    ],
)
def test_reasons(scale, options, reason):
    x = torch.full((5,), 2.0, dtype=torch.float64)
    fit = lambda x: found(lambda x: scale * quartic(x), x, **{"tolerance_grad": 0.0, **options})  # noqa: E731
    _, expected, outside = fit(x)
    _, inside, result = torch.vmap(fit)(x[None])
    assert result.why() == [outside.reason] == [reason]
    assert result.converged.tolist() == [outside.converged]
    close(inside[0], expected)
    close(result.loss[0].item(), outside.loss)
    close(result.grad_norm[0].item(), outside.grad_norm, 1e-8)
    assert (result.iterations[0], result.evaluations[0]) == (outside.iterations, outside.evaluations)


def test_each_member_stops_by_itself():
    """One is at its minimum, one begins where nothing is finite, two are far."""
    x = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 2.0], [-9.0, 80.0]], dtype=torch.float64)
    _, y, result = torch.vmap(lambda x: found(lambda x: x.square().dot(x.square() + 1), x))(x)
    assert result.why()[:2] == ["gradient", "not finite"]
    assert result.converged.tolist() == [True, False, True, True]
    assert result.iterations[:2].tolist() == [0, 0] and result.iterations[2] != result.iterations[3]
    torch.testing.assert_close(y[:2], x[:2], equal_nan=True, rtol=0, atol=0)
    close(y[2:], torch.zeros(2, 2, dtype=torch.float64), 1e-4)
    assert result.loss[1].isnan()


@pytest.mark.parametrize("barrier", [lambda x: 3 * x - x.log(), lambda x: 9 * x + (-9 * x).exp()])
def test_where_the_loss_is_not_finite_is_too_far(barrier):
    starts = torch.tensor([2.0, 7.0], dtype=torch.float64)
    outside = [found(barrier, x, rule=LBFGS(100.0))[1] for x in starts]
    _, x, result = torch.vmap(lambda x: found(barrier, x, rule=LBFGS(100.0)))(starts)
    close(x, torch.stack(outside))
    assert result.converged.all()


def test_goes_on_from_the_state(draw):
    """Two calls of 5 iterations are one of 10, but for one evaluation."""
    x = torch.stack([torch.cat([leaf.ravel() for leaf in pytree.tree_leaves(draw())]) for _ in range(2)])

    def fit(opt_state: Any, x: Tensor, max_iter: int) -> Any:
        return minimize(rosenbrock, opt_state, x, max_iter=max_iter, max_eval=1000)

    def twice(x: Tensor) -> Any:
        opt_state, x, first = fit(optim.setup(LBFGS(), x), x, 5)
        _, x, second = fit(opt_state, x, 5)
        return x, first.evaluations + second.evaluations

    _, whole, result = torch.vmap(lambda x: fit(optim.setup(LBFGS(), x), x, 10))(x)
    parts, evaluations = torch.vmap(twice)(x)
    close(parts, whole)
    assert torch.equal(evaluations, result.evaluations + 1)


@pytest.mark.parametrize("path", ["*layer_1*", "*layer_1.bias", None])
@pytest.mark.parametrize("kind", ["dict", "vector", "mixed"], indirect=True)
def test_frozen(path, kind, draw):
    members = [kind.make(draw()) for _ in range(2)]

    def fit(ps: Any) -> Any:
        opt_state = optim.freeze(optim.setup(LBFGS(), ps), path)
        _, ps, result = minimize(lambda ps: quartic(flat(kind, ps)), opt_state, ps, max_iter=8)
        return flat(kind, ps), result.evaluations

    x, evaluations = torch.vmap(fit)(stacked(members))
    for i, ps in enumerate(members):
        expected, count = fit(ps)
        close(x[i], expected)
        assert evaluations[i] == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_dtypes(dtype):
    a = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=dtype)

    def fit(a: Tensor) -> Any:
        x = {"x": torch.zeros_like(a), "y": a.real.new_ones(1)}
        return found(lambda ps: (ps["x"] - a).abs().square().sum() + (ps["y"] ** 4).sum(), x)[1:]

    ps, result = torch.vmap(fit)(a)
    assert ps["x"].dtype == dtype and result.loss.dtype == a.real.dtype
    torch.testing.assert_close(ps["x"], a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ps", [{}, {"a": torch.empty(0)}], ids=repr)
def test_no_parameters(ps):
    def fit(a: Tensor) -> Any:
        return found(lambda ps: a**2, ps)[2]

    result = torch.vmap(fit)(torch.tensor([1.0, 2.0]))
    assert result.loss.tolist() == [1.0, 4.0] and result.why() == ["gradient"] * 2
    close(torch.func.grad(lambda a: fit(a).loss)(torch.tensor(3.0)), torch.tensor(6.0))


# Derivatives.

DESIGN = torch.linspace(-1, 2, 24, dtype=torch.float64).view(8, 3).cos()
TARGET = torch.linspace(0, 3, 8, dtype=torch.float64).sin()
PENALTY = torch.tensor(0.7, dtype=torch.float64)


def ridge(ps: Any, penalty: Tensor, target: Tensor = TARGET) -> Tensor:
    return (DESIGN @ ps["w"] + ps["b"] - target).square().sum() + penalty * ps["w"].square().sum()


def closed_form(penalty: Tensor, target: Tensor = TARGET) -> Tensor:
    design = torch.cat([DESIGN, torch.ones(8, 1, dtype=torch.float64)], 1)
    penalties = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64).diag() * penalty
    return torch.linalg.inv(design.T @ design + penalties) @ (design.T @ target)


def fitted(penalty: Tensor, target: Tensor = TARGET, form: str = "operand", make: Any = dict) -> tuple[Tensor, Any]:
    ps = make({"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)})
    if form == "operand":
        _, ps, result = found(ridge, ps, penalty, target, **TIGHT)
    else:
        _, ps, result = found(lambda ps: ridge(ps, penalty, target), ps, **TIGHT)
    return torch.cat([ps["w"], ps["b"][None]]), result


grad, forward, backward = torch.func.grad, torch.func.jacfwd, torch.func.jacrev
ORDERS = {
    "reverse": backward,
    "forward": forward,
    "reverse of reverse": lambda f: backward(backward(f)),
    "forward of reverse": lambda f: forward(backward(f)),
    "reverse of forward": lambda f: backward(forward(f)),
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["operand", "closed over"])
@pytest.mark.parametrize("make", [dict, ComponentVector])
def test_derivatives_of_ridge_regression(order, form, make):
    derivative = ORDERS[order](lambda penalty: fitted(penalty, form=form, make=make)[0])(PENALTY)
    close(derivative, ORDERS[order](closed_form)(PENALTY), 1e-7)


def test_forward_of_forward():
    """Torch's own second derivative of an inverse by forward over forward mode is another."""
    derivative = forward(forward(lambda penalty: fitted(penalty)[0]))(PENALTY)
    close(derivative, backward(backward(closed_form))(PENALTY), 1e-7)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda a: torch.vmap(backward(f))(torch.stack([a, 2 * a])),
        lambda f: lambda a: backward(torch.vmap(f))(torch.stack([a, 2 * a])),
        lambda f: lt.jit(backward(f), backend="replay"),
        lambda f: backward(lt.jit(f, backend="replay")),
        lambda f: lt.jit(forward(f), backend="replay"),
    ],
    ids=["vmap of reverse", "reverse of vmap", "jit of reverse", "reverse of jit", "jit of forward"],
)
def test_derivatives_inside_of_other_transforms(transform):
    plain = transform(closed_form)(PENALTY)
    close(transform(lambda penalty: fitted(penalty)[0])(PENALTY), plain, 1e-7)


def test_finite_differences():
    def minimum(offset: Tensor) -> Tensor:
        x = torch.linspace(-1, 1, 13, dtype=torch.float64)
        return found(lambda x, offset: network(x, offset) + 0.05 * x.dot(x), x, offset, max_iter=500, **TIGHT)[1]

    offset, h = torch.tensor(0.3, dtype=torch.float64), 1e-2
    expected = (minimum(offset + h) - minimum(offset - h)) / (2 * h)
    close(forward(minimum)(offset), expected, 1e-3)
    close(backward(minimum)(offset), expected, 1e-3)


def test_the_loss_has_the_derivative_of_the_minimum():
    """By the envelope theorem, the square of the weights."""
    loss = lambda penalty: fitted(penalty)[1].loss  # noqa: E731
    weights = closed_form(PENALTY)[:3]
    close(grad(loss)(PENALTY), weights.square().sum(), 1e-8)
    close(grad(grad(loss))(PENALTY), 2 * weights @ backward(closed_form)(PENALTY)[:3], 1e-7)


def test_by_a_frozen_parameter():
    """The others follow it; where the search begins does not matter."""

    def fit(b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ps = {"w": w, "b": b}
        opt_state = optim.freeze(optim.setup(LBFGS(), ps), "b")
        _, ps, _ = minimize(lambda ps: ridge(ps, PENALTY), opt_state, ps, **TIGHT)
        return ps["w"], ps["b"]

    b, w = PENALTY / 3, torch.zeros(3, dtype=torch.float64)
    of_w, of_b = backward(fit)(b, w)
    expected = torch.linalg.solve(DESIGN.T @ DESIGN + PENALTY * torch.eye(3), -DESIGN.sum(0))
    close(of_w, expected, 1e-8)
    close(of_b, torch.ones((), dtype=torch.float64), 0.0)
    assert not backward(fit, argnums=1)(b, w)[0].any()


def test_many_parameters():
    """Of more than 512, derivatives are those by operands, by products with the Hessian."""
    center = torch.linspace(-1, 1, 600, dtype=torch.float64)

    def minimum(a: Tensor, form: str = "operand") -> Tensor:
        f = lambda x, a: ((x - a * center) ** 2 + (x - a * center) ** 4).sum()  # noqa: E731
        if form == "operand":
            return found(f, torch.zeros_like(center), a)[1]
        return found(lambda x: f(x, a), torch.zeros_like(center))[1]

    a = torch.tensor(2.0, dtype=torch.float64)
    close(forward(minimum)(a), center, 1e-6)
    close(backward(lambda a: minimum(a)[::100])(a), center[::100], 1e-6)
    with pytest.raises(InputError, match="must not close over what is differentiated"):
        forward(lambda a: minimum(a, "closed"))(a)


def test_on_a_tape():
    """An operand that requires grad gets derivatives; what is closed over is a constant, as for torch.optim."""
    penalty = PENALTY.clone().requires_grad_()
    x, result = fitted(penalty)
    (found_grad,) = torch.autograd.grad(x.sum() + result.loss, penalty)
    expected = grad(lambda a: closed_form(a).sum() + ridge({"w": closed_form(a)[:3], "b": closed_form(a)[3]}, a))
    close(found_grad, expected(PENALTY), 1e-8)
    assert isinstance(result.reason, str)
    constant, _ = fitted(penalty, form="closed over")
    assert not constant.requires_grad
    close(constant, x.detach(), 0.0)


def test_on_a_tape_around_a_compiled_function():
    penalty = PENALTY.clone().requires_grad_()
    step = lt.jit(lambda penalty: fitted(penalty, form="closed over")[0], backend="replay")
    (found_grad,) = torch.autograd.grad(step(penalty).sum(), penalty)
    close(found_grad, backward(closed_form)(PENALTY).sum(), 1e-8)


@pytest.mark.parametrize("jitted", [False, True])
def test_in_the_loss_of_a_training_step(jitted):
    """The rate of a step is 1, so that the parameter moves by the derivative."""
    ps = {"penalty": PENALTY}

    def objective(model: Any, ps: Any, st: Any, data: Any) -> Any:
        return fitted(ps["penalty"])[0].sum(), st, {}

    def step(ps: Any) -> Any:
        ts = training.TrainState(lt.NoOpLayer(), ps, {}, optim.Descent(1.0))
        return training.single_train_step(objective, TARGET, ts)[-1].parameters

    new = (lt.jit(step, backend="replay") if jitted else step)(ps)
    close(new["penalty"], PENALTY - backward(closed_form)(PENALTY).sum(), 1e-8)


def test_numbers_under_gradients_are_tensors():
    _, result = lt.gradient(lambda a: (lambda x, r: (x.sum(), r))(*fitted(a)), PENALTY, has_aux=True)
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in result)
    assert result.why() in ("gradient", "evaluations", "line search", "slope")


# Errors.


def test_torch_compile_is_refused():
    step = torch.compile(lambda x: found(quartic, x)[1], backend="eager")
    with pytest.raises(Exception, match=r"inside of torch\.compile(.|\n)*lt\.jit"):
        step(torch.ones(2))


def test_not_finite_from_the_start_under_gradients():
    with pytest.raises(InputError, match="not finite where the search begins"):
        grad(lambda a: found(lambda x: (x * a).sqrt().sum(), torch.zeros(2))[1].sum())(torch.tensor(1.0))


@pytest.mark.parametrize("way", ["vmap", "jit"])
def test_wrong_arguments(way):
    transform = torch.vmap if way == "vmap" else partial(lt.jit, backend="replay")
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match="does not return a scalar"):
        transform(lambda x: found(lambda x: x.square(), x)[1])(x)
    other = optim.setup(LBFGS(), torch.ones(5))
    with pytest.raises(InputError, match="parameters of other shapes"):
        transform(lambda x: minimize(lambda x: x.square().sum(), other, x)[1])(x)
    with pytest.raises(InputError, match="max_iter must be at least 1"):
        transform(lambda x: found(quartic, x, max_iter=0)[1])(x)
    with pytest.raises(DTypeError, match="n: A parameter is not differentiable"):
        transform(lambda x: minimize(quartic, optim.setup(LBFGS(), {"n": x}), {"n": x.long()})[1])(x)


def test_no_words_inside_of_vmap():
    with pytest.raises(InputError, match="a reason has no words"):
        torch.vmap(lambda x: found(quartic, x)[2].why())(torch.ones(2, 3))


def test_a_state_of_many_models():
    x = torch.ones(2, 3)
    opt_state = torch.vmap(lambda x: optim.setup(LBFGS(), x))(x)
    with pytest.raises(InputError, match=r"many models(.|\n)*torch\.vmap"):
        lt.jit(lambda x: minimize(lambda x: x.sum(), opt_state, x)[1], backend="replay")(x)
