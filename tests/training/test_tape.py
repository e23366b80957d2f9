"""The cheap gradient of an eager step: the numbers of torch's own tape bit for bit, and the faithful one elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.autodiff import _gradient, _torch_func

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "all": lambda model, ps, st, data: (model(data[0], ps, st)[0].square().mean(), st, {}),
    "one unused": lambda model, ps, st, data: (ps["layer_1"]["weight"].sin().sum(), st, {}),
    "independent": lambda model, ps, st, data: (data[0].sum(), st, {}),
    "a constant": lambda model, ps, st, data: (torch.ones(()), st, {}),
    "stats": lambda model, ps, st, data: (ps["layer_2"]["bias"].exp().sum(), st, {"ps": ps, "n": 3}),
    "new states": lambda model, ps, st, data: (model(data[0], ps, st)[0].sum(), {"seen": (data[0] * 2,)}, {}),
}
RULES = {"Descent": optim.Descent(0.1), "Adam": optim.Adam(0.1), "RMSProp": optim.RMSProp(0.1)}
MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))

every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_mode = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])


def _by_hand(objective: Callable, ts: training.TrainState, data: Any) -> tuple[Tensor, list[Tensor]]:
    leaves, spec = pytree.tree_flatten(ts.parameters)
    with torch.enable_grad():
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        loss, _, _ = objective(ts.model, pytree.tree_unflatten(own, spec), ts.states, data)
        if not loss.requires_grad:
            return loss, [torch.zeros_like(leaf) for leaf in leaves]
        return loss.detach(), list(torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True))


@every_mode
@every_objective
def test_the_bits_are_those_of_autograd(new, tree, data, equal, name, mode) -> None:
    ts = new(tree, model=MODEL)
    expected = _by_hand(OBJECTIVES[name], ts, data)
    with mode():
        grads, loss, stats, after = training.compute_gradients(OBJECTIVES[name], data, ts)
    equal((loss, pytree.tree_leaves(grads)), expected)
    assert pytree.tree_structure(grads) == pytree.tree_structure(ts.parameters)
    tensors = [leaf for leaf in pytree.tree_leaves((grads, loss, stats, after)) if isinstance(leaf, Tensor)]
    assert not any(leaf.requires_grad for leaf in tensors)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves((ts, data)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_is_autograd_and_an_update(new, tree, data, equal, rule, donate) -> None:
    ts = new(tree, RULES[rule], MODEL)
    opt_state, ps, spec = ts.optimizer_state, ts.parameters, pytree.tree_structure(ts.parameters)
    for _ in range(4):
        loss, grads = _by_hand(OBJECTIVES["all"], ts.replace(parameters=ps), data)
        opt_state, ps = optim.update(opt_state, ps, pytree.tree_unflatten(grads, spec))
        ours = training.single_train_step(OBJECTIVES["all"], data, ts, donate=donate)
        equal((ours[1], ours[3].parameters, ours[3].optimizer_state), (loss, ps, opt_state))
        ts = ours[3]


@every_objective
def test_another_torch_is_served_by_its_public_names(new, tree, data, equal, name, monkeypatch) -> None:
    ts = new(tree, model=MODEL)
    expected = training.compute_gradients(OBJECTIVES[name], data, ts)
    monkeypatch.setattr(_torch_func, "_AVAILABLE", False)
    equal(training.compute_gradients(OBJECTIVES[name], data, ts), expected)


def _frozen_on_a_tape(ts: training.TrainState) -> training.TrainState:
    taped = pytree.tree_map(lambda p: p.clone().requires_grad_(), ts.parameters)
    frozen, _, st = lt.freeze(ts.model, taped, ts.states, "layer_1")
    some = lt.freeze(ts.model, ts.parameters, ts.states, "layer_1")[1]
    return training.TrainState(frozen, some, st, optim.Descent(0.1))


CONTEXTS = {
    "vmap": lambda step, ts, data: torch.func.vmap(lambda x: step((x, data[1]), ts))(torch.stack([data[0]] * 2)),
    "grad": lambda step, ts, data: torch.func.grad(lambda x: step((x, data[1]), ts)[1])(data[0]),
    "jvp": lambda step, ts, data: torch.func.jvp(lambda x: step((x, data[1]), ts)[1], (data[0],), (data[0],)),
    "parameters on a tape": lambda step, ts, data: step(
        data, ts.replace(parameters=pytree.tree_map(lambda p: p.clone().requires_grad_(), ts.parameters))
    ),
    "states on a tape": lambda step, ts, data: step(data, _frozen_on_a_tape(ts)),
}


@pytest.mark.parametrize("context", [*CONTEXTS, "dual"])
def test_the_tape_stays_away_from_those_who_look_on(new, tree, data, context, monkeypatch) -> None:
    faithful: list[bool] = []
    original = _gradient.withgradient

    def counted(*args: Any, **kwargs: Any) -> Any:
        faithful.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(_gradient, "withgradient", counted)
    ts = new(tree, optim.Descent(0.1), MODEL)

    def step(data: Any, ts: Any) -> Any:
        return training.single_train_step(OBJECTIVES["all"], data, ts)

    step(data, ts)
    assert not faithful
    if context == "dual":
        with forward_ad.dual_level():
            loss = step((forward_ad.make_dual(data[0], data[0]), data[1]), ts)[1]
            assert forward_ad.unpack_dual(loss).tangent is not None
    else:
        CONTEXTS[context](step, ts, data)
    assert faithful


@pytest.mark.parametrize("hooks", [nullcontext, lambda: torch.autograd.graph.save_on_cpu()])
def test_hooks_on_saved_tensors_are_honoured(new, data, equal, hooks) -> None:
    ts = new(model=MODEL)
    expected = _by_hand(OBJECTIVES["all"], ts, data)
    with hooks():
        grads, loss, _, _ = training.compute_gradients(OBJECTIVES["all"], data, ts)
    equal((loss, pytree.tree_leaves(grads)), expected)


def test_steps_compose_with_jit(new, tree, data, equal) -> None:
    def step(data: Any, ts: Any) -> Any:
        return training.single_train_step(OBJECTIVES["all"], data, ts)

    jitted = lt.jit(step, backend="replay")
    ts = eager = new(tree, model=MODEL)
    for _ in range(3):
        ts, eager = jitted(data, ts)[3], step(data, eager)[3]
    equal(ts, eager, rtol=1e-10, atol=1e-12)


# Objectives as they are written for torch: with its tape inside, and over what is on a tape.

FROZEN, UNFROZEN = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double(), torch.nn.Linear(2, 2).double()
FROZEN.requires_grad_(False)


def _through(module: torch.nn.Module) -> Callable[..., Any]:
    def objective(model: Any, ps: Any, st: Any, data: Any) -> Any:
        y_hat, st = model(data[0], ps, st)
        features = module(y_hat) - module(data[1])
        return features.square().mean(), st, {"features": features, "y_hat": y_hat}

    return objective


def _regularized(model: Any, ps: Any, st: Any, data: Any) -> Any:
    y_hat, st = model(data[0], ps, st)
    decay = sum(p.square().sum() for p in UNFROZEN.parameters())
    return (y_hat - data[1]).square().mean() + decay, st, {"decay": decay, "weight": UNFROZEN.weight}


def _slope_by_torch(model: Any, ps: Any, st: Any, data: Any) -> Any:
    x = data[0].detach().requires_grad_()
    y_hat, st = model(x, ps, st)
    (slope,) = torch.autograd.grad(y_hat.sum(), x, create_graph=True)
    return (slope.square().sum(1) - y_hat[:, 0]).square().mean(), st, {"slope": slope, "x": x}


def _slope_by_func(model: Any, ps: Any, st: Any, data: Any) -> Any:
    slope = torch.func.grad(lambda x: model(x, ps, st)[0].sum())(data[0])
    return (slope.square().sum(1) - model(data[0], ps, st)[0][:, 0]).square().mean(), st, {}


def _laplacian_by_torch(model: Any, ps: Any, st: Any, data: Any) -> Any:
    x = data[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x, ps, st)[0].sum(), x, create_graph=True)
    rows = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(rows).sum(0).square().mean(), st, {"rows": rows}


def _laplacian_by_func(model: Any, ps: Any, st: Any, data: Any) -> Any:
    hessian = torch.func.vmap(torch.func.hessian(lambda x: model(x, ps, st)[0].sum()))(data[0])
    return hessian.diagonal(dim1=1, dim2=2).sum(1).square().mean(), st, {}


def _penalty_by_torch(model: Any, ps: Any, st: Any, data: Any) -> Any:
    loss = (model(data[0], ps, st)[0] - data[1]).square().mean()
    grads = torch.autograd.grad(loss, pytree.tree_leaves(ps), create_graph=True)
    return loss + sum(g.square().sum() for g in grads), st, {"grads": grads}


def _penalty_by_func(model: Any, ps: Any, st: Any, data: Any) -> Any:
    def fit(ps: Any) -> Tensor:
        return (model(data[0], ps, st)[0] - data[1]).square().mean()

    grads = torch.func.grad(fit)(ps)
    return fit(ps) + sum(g.square().sum() for g in pytree.tree_leaves(grads)), st, {}


ON_TAPES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "frozen module": (_through(FROZEN), None),
    "unfrozen module": (_through(UNFROZEN), None),
    "regularized module": (_regularized, None),
    "data": (OBJECTIVES["all"], None),
    "slope": (_slope_by_torch, _slope_by_func),
    "laplacian": (_laplacian_by_torch, _laplacian_by_func),
    "penalty": (_penalty_by_torch, _penalty_by_func),
}


@every_mode
@pytest.mark.parametrize("option", [{}, {"accumulate": 2}, {"skip_nonfinite": True}, {"donate": True}], ids=str)
@pytest.mark.parametrize("name", ON_TAPES)
def test_what_the_objective_closes_over_leaves_no_tape(new, tree, data, equal, name, option, mode) -> None:
    objective, by_func = ON_TAPES[name]
    ts, calls = new(tree, model=MODEL), []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return objective(*args)

    if name == "data":
        data = (data[0].clone().requires_grad_(), 2 * data[1].clone().requires_grad_())
    with mode():
        result = training.single_train_step(counted, data, ts, **option)
    assert len(calls) == option.get("accumulate", 1)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
    assert all(p.grad is None for p in UNFROZEN.parameters())

    ts = new(tree, model=MODEL)

    def loss(ps: Any) -> Tensor:
        return (by_func or objective)(ts.model, ps, ts.states, data)[0]

    if "accumulate" not in option:
        grads, value = torch.func.grad_and_value(loss)(ts.parameters)
        equal((result[0], result[1]), (grads, value.detach()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["slope", "laplacian", "penalty"])
def test_torchs_own_tape_inside_of_a_jitted_step(new, tree, data, equal, name, backend) -> None:
    objective, _ = ON_TAPES[name]
    jitted = lt.jit(lambda data, ts: training.single_train_step(objective, data, ts), backend=backend)
    ts = eager = new(tree, model=MODEL)
    for _ in range(3):
        (_, loss, _, ts), (_, expected, _, eager) = (
            jitted(data, ts),
            training.single_train_step(objective, data, eager),
        )
        equal(loss, expected, rtol=1e-9, atol=1e-12)
    equal(ts, eager, rtol=1e-8, atol=1e-10)


def test_a_run_over_an_unfrozen_module_keeps_no_graph(new, data) -> None:
    def model(x: Tensor, ps: Any, st: Any) -> Any:
        y = MODEL(x, ps, {"layer_1": {}, "layer_2": {}})[0]
        return y, {"seen": st["seen"] + UNFROZEN(y).sum()}

    ts = new(model=MODEL).replace(model=model, states={"seen": torch.zeros((), dtype=torch.float64)})
    for _ in range(3):
        ts = training.single_train_step(_through(UNFROZEN), data, ts)[3]
    assert all(leaf.grad_fn is None for leaf in pytree.tree_leaves(ts))
