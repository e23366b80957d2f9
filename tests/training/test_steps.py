"""Gradients and steps: against torch.nn and torch.optim, pure, compiled, and true wherever something looks on."""

from __future__ import annotations

import pytest
import torch
import torchopt
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.autodiff import _gradient
from luxtorch.layers.recurrent import _fused

RULES = {
    "adam": (optim.Adam(0.05), lambda ps: torch.optim.Adam(ps, lr=0.05)),
    "adamw": (optim.AdamW(0.05), lambda ps: torch.optim.AdamW(ps, lr=0.05)),
    "nesterov": (optim.Nesterov(0.05), lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True)),
    "torchopt": (torchopt.sgd(0.05), lambda ps: torch.optim.SGD(ps, lr=0.05)),
}


@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_equal_torch(new, tree, data, objective, rule, donate):
    rule, reference = RULES[rule]
    model = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dense(4, 2))
    ts = new(tree, rule, model)
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    ).double()
    for p, leaf in zip(module.parameters(), _leaves(ts.parameters), strict=True):
        p.data.copy_(leaf)
    optimizer = reference(list(module.parameters()))
    for i in range(20):
        x, y = data[0] + 0.1 * i, data[1]
        optimizer.zero_grad()
        expected = (module(x) - y).square().mean()
        expected.backward()
        optimizer.step()
        grads, loss, stats, ts = training.single_train_step(objective, (x, y), ts, donate=donate)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(_leaves(grads), [p.grad for p in module.parameters()], rtol=1e-8, atol=1e-12)
    assert ts.step == 20
    torch.testing.assert_close(_leaves(ts.parameters), [p.data for p in module.parameters()], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ts.states["layer_2"]["running_var"], module[2].running_var, rtol=1e-8, atol=1e-10)


def _leaves(ps):
    return pytree.tree_leaves(ps.to_dict() if isinstance(ps, lt.ComponentVector) else ps)


def test_luxtorch_losses_are_objectives(new, tree, data, objective, equal):
    ts = new(tree)
    a = training.single_train_step(lt.MSELoss(), data, ts)
    b = training.single_train_step(objective, data, ts)
    assert a[2] == {}
    equal((a[0], a[1], a[3]), (b[0], b[1], b[3]), rtol=1e-12, atol=1e-14)


def test_a_step_is_pure(new, tree, data, objective, equal):
    ts = new(tree)
    before = pytree.tree_map(torch.clone, (ts, data))
    first = training.single_train_step(objective, data, ts)
    equal((ts, data), before)
    equal(training.single_train_step(objective, data, ts), first)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(first))


def test_a_step_is_its_two_halves(new, tree, data, objective, equal):
    ts = new(tree)
    grads, loss, stats, half = training.compute_gradients(objective, data, ts)
    assert half.step == 0 and half.parameters is ts.parameters
    assert not torch.equal(half.states["layer_2"]["running_mean"], ts.states["layer_2"]["running_mean"])
    whole = training.single_train_step(objective, data, ts)
    equal((grads, loss, stats, training.apply_gradients(half, grads)), whole)


def test_compiles_to_one_graph(new, tree, data, objective, equal):
    counter = CompileCounterWithBackend("aot_eager")

    def step(data, ts):
        return training.single_train_step(objective, data, ts)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    ts = eager = new(tree)
    for i in range(10):
        grads, loss, stats, ts = compiled(data, ts)
        eager = step(data, eager)[3]
        if i == 4:  # a new rate, and a state that was read and printed, change nothing
            ts, eager = ts.adjust(lr=0.01), eager.adjust(lr=0.01)
            assert repr(ts.parameters) and repr(ts)
    assert counter.frame_count == 1 and ts.step == 10
    equal(ts, eager, rtol=1e-9, atol=1e-10)


def test_equal_models_and_other_rates_share_the_graph(new, tree, data):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda data, ts: training.single_train_step(lt.MSELoss(), data, ts), fullgraph=True, backend=counter
    )
    compiled(data, new(tree, optim.Adam(0.1)))
    compiled(data, new(tree, optim.Adam(0.2)))
    assert counter.frame_count == 1


def test_a_compiled_batch_of_steps(new, tree, data):
    model = lt.Dense(3, 2)
    many = torch.vmap(lambda lr: new(tree, model=model).adjust(lr=lr))(torch.tensor([0.1, 0.2], dtype=torch.float64))
    step = torch.vmap(lambda ts: training.single_train_step(lt.MSELoss(), data, ts)[3])
    a = torch.compile(step, fullgraph=True, backend="aot_eager")(many)
    torch.testing.assert_close(pytree.tree_leaves(a), pytree.tree_leaves(step(many)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_the_tape_gives_the_numbers_of_torch_func(new, tree, data, objective, equal, monkeypatch, grad_mode):
    ts = new(tree)
    with grad_mode():
        fast = training.compute_gradients(objective, data, ts)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(fast))
    monkeypatch.setattr(_gradient, "_by_tape", lambda f, ps: None)
    equal(fast, training.compute_gradients(objective, data, ts), rtol=1e-12, atol=1e-14)


def test_fused_kernels_are_used(new, data, monkeypatch, equal):
    ts = new(model=lt.Recurrence(lt.LSTMCell(3, 2)))
    batch = data[0].reshape(2, 4, 3), data[1][:2]
    slow = torch.func.grad(lambda ps: lt.MSELoss()(ts.model, ps, ts.states, batch)[0])(ts.parameters)

    def refuse(*args):
        raise AssertionError("step by step")

    monkeypatch.setattr(_fused, "stepwise", refuse)
    equal(training.compute_gradients(lt.MSELoss(), batch, ts)[0], slow, rtol=1e-10, atol=1e-12)


# Whoever looks on sees the true derivatives.


def _after(ts, data, objective):
    return training.single_train_step(objective, data, ts, differentiable=True)[3]


def _weighted(weight):
    def objective(model, ps, st, data):
        y_hat, st = model(data[0], ps, st)
        return weight * (y_hat - data[1]).square().mean(), st, {}

    return objective


def _judged(weight, ts, data):
    """A loss after three steps whose objectives are weighted: a function of the weight."""
    st = ts.states  # those after a step are detached
    for _ in range(3):
        ts = _after(ts, data, _weighted(weight))
    return ts.model(data[0], ts.parameters, st)[0].square().sum()


def test_derivatives_through_steps(new, tree, data):
    ts = new(tree, optim.Momentum(0.1))
    weight = torch.tensor(0.7, dtype=torch.float64)
    eps = 1e-6
    difference = (_judged(weight + eps, ts, data) - _judged(weight - eps, ts, data)) / (2 * eps)
    by_func = torch.func.grad(_judged)(weight, ts, data)
    torch.testing.assert_close(by_func, difference, rtol=1e-6, atol=1e-8)
    taped = weight.clone().requires_grad_()  # the objective closes over a tape, and nothing else tells
    (by_tape,) = torch.autograd.grad(_judged(taped, ts, data), taped)
    torch.testing.assert_close(by_tape, by_func)
    not_a_leaf = (2 * taped) / 2
    (by_tape,) = torch.autograd.grad(_judged(not_a_leaf, ts, data), taped)
    torch.testing.assert_close(by_tape, by_func)
    _, by_jvp = torch.func.jvp(lambda weight: _judged(weight, ts, data), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(by_jvp, by_func)


def test_forward_mode_sees_the_gradient(new, data):
    ts = new(rule=optim.Descent(0.1), model=lt.Dense(3, 2))
    weight = torch.tensor(0.7, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        try:
            value = _judged(dual, ts, data)
        except RuntimeError:  # torch has no torch.func gradient inside of a plain dual level
            return
        assert forward_ad.unpack_dual(value).tangent is not None


@pytest.mark.parametrize("place", ["parameters", "states", "data", "stats"])
def test_a_tape_on_any_input_is_kept(new, data, place):
    ts = new(rule=optim.Descent(0.1), model=lt.Dense(3, 2))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def objective(model, ps, st, data):
        y_hat, _ = model(data[0], ps, {})
        loss = (y_hat * st["factor"] - data[1]).square().mean()
        return loss, st, {"seen": scale * loss.detach() if place == "stats" else loss}

    factor = torch.ones((), dtype=torch.float64)
    ts = ts.replace(states={"factor": factor * scale if place == "states" else factor})
    if place == "parameters":
        ts = ts.replace(parameters=pytree.tree_map(lambda p: p * scale, ts.parameters))
    batch = (data[0] * scale, data[1]) if place == "data" else data
    told = place in ("data", "stats")  # where the training state itself is on a tape, that is seen
    grads, loss, stats, after = training.single_train_step(objective, batch, ts, differentiable=told)
    seen = stats["seen"] if place == "stats" else after.parameters["weight"].sum()
    (slope,) = torch.autograd.grad(seen, scale)
    assert slope != 0 and slope.isfinite()


def test_a_batch_of_closures(new, data):
    ts = new(rule=optim.Descent(0.1), model=lt.Dense(3, 2))
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    many = torch.vmap(lambda weight: _after(ts, data, _weighted(weight)).parameters["weight"])(weights)
    for one, weight in zip(many, weights, strict=True):
        torch.testing.assert_close(one, _after(ts, data, _weighted(weight)).parameters["weight"])


def test_derivatives_inside_the_objective(new, data):
    """A loss may contain derivatives itself, as those of physics do."""
    ts = new(model=lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 1)))

    def objective(model, ps, st, data):
        slope = torch.func.grad(lambda x: model(x, ps, st)[0].sum())(data[0])
        return slope.square().mean(), st, {}

    grads = training.compute_gradients(objective, data, ts)[0]
    expected = torch.func.grad(lambda ps: objective(ts.model, ps, ts.states, data)[0])(ts.parameters)
    torch.testing.assert_close(pytree.tree_leaves(grads), pytree.tree_leaves(expected))


# Parameters that are left alone, and whatever else may be missing.


def test_frozen_parameters(new, tree, data, objective):
    ts = new(tree)
    ts = ts.replace(optimizer_state=optim.freeze(ts.optimizer_state, "layer_1"))
    after = training.single_train_step(objective, data, ts)[3]
    assert torch.equal(after.parameters["layer_1"]["weight"], ts.parameters["layer_1"]["weight"])
    assert not torch.equal(after.parameters["layer_4"]["weight"], ts.parameters["layer_4"]["weight"])


def test_missing_gradients(new):
    ts = new(rule=optim.AdamW(0.1))
    after = training.apply_gradients(ts, {"layer_4": {"weight": torch.ones_like(ts.parameters["layer_4"]["weight"])}})
    assert after.parameters["layer_1"]["weight"] is ts.parameters["layer_1"]["weight"]
    assert not torch.equal(after.parameters["layer_4"]["weight"], ts.parameters["layer_4"]["weight"])
    assert after.step == 1


def test_unused_parameters_get_zeros(new, tree, data):
    def first_only(model, ps, st, data):
        return ps["layer_1"]["weight"].square().sum(), st, {}

    def none(model, ps, st, data):
        return data[0].sum(), st, {}

    ts = new(tree)
    grads = training.compute_gradients(first_only, data, ts)[0]
    assert torch.equal(grads["layer_1"]["weight"], 2 * ts.parameters["layer_1"]["weight"])
    assert not grads["layer_4"]["weight"].any()
    assert not any(leaf.any() for leaf in _leaves(training.compute_gradients(none, data, ts)[0]))


def test_stats_may_be_anything(new, tree, data):
    def objective(model, ps, st, data):
        y_hat, st = model(data[0], ps, st)
        return y_hat.square().mean(), st, {"name": "a", "n": 3, "y": [y_hat, None]}

    stats = training.single_train_step(objective, data, new(tree))[2]
    assert stats["name"] == "a" and stats["n"] == 3 and stats["y"][1] is None
    assert stats["y"][0].shape == (8, 2) and not stats["y"][0].requires_grad


# What is wrong is said.


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (lambda loss, st: loss, lt.InputError, "must return three things"),
        (lambda loss, st: (loss, st), lt.InputError, "a tuple of length 2"),
        (lambda loss, st: (loss.item(), st, {}), lt.InputError, "of type float"),
        (lambda loss, st: (loss.expand(3), st, {}), lt.InputError, r"tensor of shape \(3,\)"),
        (lambda loss, st: (loss.long(), st, {}), lt.DTypeError, "torch.int64"),
    ],
)
def test_wrong_objectives(new, data, result, error, text):
    def objective(model, ps, st, data):
        y_hat, st = model(data[0], ps, st)
        return result(y_hat.detach().sum(), st)

    with pytest.raises(error, match=text):
        training.single_train_step(objective, data, new())


def test_wrong_arguments(new, data, objective):
    ts = new()
    with pytest.raises(lt.DTypeError, match="must be a function") as error:
        training.single_train_step(lt.MSELoss, data, ts)
    assert "Make the loss" in str(error.value)
    with pytest.raises(lt.InputError, match="must be a TrainState"):
        training.single_train_step(objective, ts, data)
    with pytest.raises(lt.InputError, match="must be a TrainState"):
        training.apply_gradients({}, ts)
    with pytest.raises(lt.InputError, match="neither of the two call forms"):
        training.single_train_step(lt.MSELoss(), data[0], ts)
    with pytest.raises(lt.InputError, match=r"layer_1 \(Dense"):
        training.single_train_step(objective, (data[0][:, :2], data[1]), ts)
    with pytest.raises(lt.KeyNameError, match="a name that the parameters lack"):
        training.apply_gradients(ts, {"layer_9": None})
    with torch.inference_mode(), pytest.raises(lt.InputError, match="inference mode"):
        training.single_train_step(objective, data, ts)


def test_an_integer_parameter(new, data, objective):
    ts = new(rule=optim.Descent(0.1))
    ts = ts.replace(parameters={**ts.parameters, "count": torch.tensor(1)})
    with pytest.raises(lt.DTypeError, match="count"):
        training.compute_gradients(objective, data, ts)


def test_a_model_without_parameters(data):
    ts = training.TrainState(lt.NoOpLayer(), {}, {}, optim.Adam())
    grads, loss, _, ts = training.single_train_step(lt.MSELoss(), (data[0], data[0]), ts)
    assert grads == {} and loss == 0 and ts.step == 1
