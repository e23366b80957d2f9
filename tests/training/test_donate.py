"""Donated steps: the same numbers in the old memory, and an old state that says so."""

from __future__ import annotations

import pytest
import torch
import torchopt
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.optim import linear

RULES = [
    optim.Descent(0.1),
    optim.Momentum(0.05),
    optim.Nesterov(0.05),
    optim.Adam(0.05),
    optim.AdamW(0.05),
    optim.AMSGrad(0.05, weight_decay=0.1),
    optim.AdaGrad(0.05, lr_decay=0.1, weight_decay=0.1),
]


def _donated(objective, data, ts):
    return training.single_train_step(objective, data, ts, donate=True)[3]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_are_the_same(new, tree, data, objective, equal, rule, dtype):
    ts, kept = new(tree, rule, dtype=dtype), new(tree, rule, dtype=dtype)
    batch = lt.cpu_device(dtype=dtype)(data)
    for i in range(20):
        ts = _donated(objective, batch, ts)
        kept = training.single_train_step(objective, batch, kept)[3]
        if i == 10:
            ts, kept = ts.adjust(lr=0.01), kept.adjust(lr=0.01)
    equal(ts, kept)


def test_a_schedule_goes_on(new, tree, data, objective, equal):
    schedule = linear(0.1, 0.0, 5)
    ts, kept = new(tree, optim.Adam(schedule)), new(tree, optim.Adam(schedule))
    for _ in range(7):
        ts = _donated(objective, data, ts)
        kept = training.single_train_step(objective, data, kept)[3]
    equal(ts, kept)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_memory_is_reused(new, tree, data, objective, rule):
    ts = _donated(objective, data, new(tree, rule))
    places = [leaf.data_ptr() for leaf in pytree.tree_leaves((ts._trees.parameters, ts._trees.optimizer_state))]
    ts = _donated(objective, data, ts)
    after = [leaf.data_ptr() for leaf in pytree.tree_leaves((ts._trees.parameters, ts._trees.optimizer_state))]
    assert after == places


def test_the_old_state_is_gone(new, data, objective):
    ts = new()
    _donated(objective, data, ts)
    uses = [
        lambda: ts.parameters,
        lambda: ts.model,
        lambda: ts.rule,
        lambda: ts.states,
        lambda: ts.optimizer_state,
        lambda: ts.step,
        lambda: ts.skipped,
        lambda: ts.adjust(lr=0.1),
        lambda: ts.replace(states={}),
        lambda: training.single_train_step(objective, data, ts),
        lambda: training.compute_gradients(objective, data, ts),
        lambda: training.apply_gradients(ts, {}),
        lambda: pytree.tree_leaves(ts),
        lambda: lt.to_device(ts, "cpu"),
        lambda: torch.vmap(lambda ts: ts)(ts),
    ]
    for use in uses:
        with pytest.raises(lt.LuxtorchError, match="was given away: a step with donate=True"):
            use()
    assert "given away" in repr(ts)


def test_no_tensor_outside_ever_changes(new, tree, data, objective, equal):
    """Whatever the caller holds stays as it is: initial values, and what was read out of a state before its end."""
    ts = new(tree)
    held = [ts.parameters, ts.states, ts.optimizer_state]
    copies = [pytree.tree_map(torch.clone, tree) for tree in held]
    for i in range(6):
        ts = _donated(objective, data, ts)
        if i % 2:
            held += [ts.parameters, ts.optimizer_state, ts.states, ts.step]
        else:
            held += pytree.tree_leaves(ts)
        copies += [pytree.tree_map(torch.clone, tree) for tree in held[len(copies) :]]
    equal(held, copies)


KEPT = {
    # what an objective keeps of a parameter, and how its numbers are read later
    "the tensor": (lambda p: p, lambda kept: kept),
    "detached": (lambda p: p.detach(), lambda kept: kept),
    "a view": (lambda p: p.flatten()[1:], lambda kept: kept),
    "numpy": (lambda p: p.detach().numpy(), torch.as_tensor),
    "dlpack": (lambda p: torch.from_dlpack(p.detach()), lambda kept: kept),
    "a closure": (lambda p: lambda: p, lambda kept: kept()),
    "memory": (lambda p: memoryview(p.detach().numpy()), lambda kept: torch.tensor(kept.tolist())),
}


@pytest.mark.parametrize("where", ["outside", "stats"])
@pytest.mark.parametrize("name", KEPT)
def test_what_an_objective_keeps_of_its_parameters_stays(new, tree, data, name, where):
    keep, read = KEPT[name]
    seen = {}
    for donate in (False, True):
        kept = []

        def objective(model, ps, st, data):
            one = keep(ps["layer_1"]["weight"])
            if where == "outside":
                kept.append(one)  # noqa: B023
            return model(data[0], ps, st)[0].square().mean(), st, {} if where == "outside" else {"kept": one}

        ts = new(tree, optim.Descent(0.1))
        for _ in range(4):
            *_, stats, ts = training.single_train_step(objective, data, ts, donate=donate)
            kept += stats.values()
        seen[donate] = [read(one).detach().clone() for one in kept]
    assert all(map(torch.equal, seen[True], seen[False])) and not torch.equal(seen[True][0], seen[True][-1])


@pytest.mark.parametrize("place", ["states", "stats", "loss"])
def test_views_of_the_parameters_that_an_objective_returns(new, data, equal, place):
    def objective(model, ps, st, data):
        y_hat, _ = model(data[0], ps, {})
        scale = ps["scale"]
        loss = scale if place == "loss" else scale * y_hat.square().mean()
        return loss, {"copy": scale} if place == "states" else st, {"scale": scale} if place == "stats" else {}

    def model(x, ps, st):
        return x @ ps["weight"], st

    ps = {"weight": data[1][:3], "scale": torch.ones((), dtype=torch.float64)}
    more = pytree.tree_map(torch.ones_like, ps)
    ts = training.TrainState(model, ps, {"copy": torch.zeros((), dtype=torch.float64)}, optim.Descent(0.1))
    kept = ts.replace()
    for _ in range(3):
        _, loss, stats, ts = training.single_train_step(objective, data, ts, donate=True)
        _, expected_loss, expected_stats, kept = training.single_train_step(objective, data, kept)
        held, expected = (loss, stats, ts._trees.states), (expected_loss, expected_stats, kept.states)
        ts, kept = training.apply_gradients(ts, more, donate=True), training.apply_gradients(kept, more)
        equal(held, expected)
    equal(ts, kept)


def test_frozen_and_missing(new, data, objective, equal):
    ts = new()
    ts = ts.replace(optimizer_state=optim.freeze(ts.optimizer_state, "layer_1.weight"))
    kept = ts.replace()
    grads = training.compute_gradients(objective, data, kept)[0]
    grads["layer_4"] = {"bias": None}
    for _ in range(3):
        ts = training.apply_gradients(ts, grads, donate=True)
        kept = training.apply_gradients(kept, grads)
    equal(ts, kept)


@pytest.mark.parametrize("by_path", [False, True])
def test_rules_without_a_step_in_place_donate_too(new, tree, data, objective, equal, by_path):
    ts = new(tree).adjust(lr=0.1, path="layer_1") if by_path else new(tree, torchopt.adam(0.1))
    kept = ts.replace()
    for _ in range(3):
        old, ts = ts, _donated(objective, data, ts)
        kept = training.single_train_step(objective, data, kept)[3]
        with pytest.raises(lt.LuxtorchError, match="given away"):
            _ = old.step
    equal(ts, kept)


def test_a_step_that_fails_gives_nothing_away(new, data, objective, equal):
    ts = _donated(objective, data, new())
    before = pytree.tree_map(torch.clone, new())
    before = training.single_train_step(objective, data, before)[3]
    with pytest.raises(lt.LuxtorchError):
        _donated(objective, (data[0][:, :1], data[1]), ts)
    with pytest.raises(lt.KeyNameError):
        training.apply_gradients(ts, {"layer_9": None}, donate=True)
    equal(ts, before)


def test_no_effect_inside_of_transforms(new, tree, data, objective, equal):
    ts = new(tree)
    many = pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), ts)
    after = torch.vmap(lambda ts: _donated(objective, data, ts))(many)
    expected = training.single_train_step(objective, data, ts)[3]
    equal(pytree.tree_map(lambda leaf: leaf[1], after), expected, rtol=1e-10, atol=1e-12)
    compiled = torch.compile(_donated, fullgraph=True, backend="aot_eager")
    equal(compiled(objective, data, ts), expected, rtol=1e-10, atol=1e-12)
    assert ts.step == 0 and many.step.tolist() == [0, 0]


def test_derivatives_through_a_donated_step(new, data):
    def loss(weight, donate):
        def objective(model, ps, st, data):
            return weight * model(data[0], ps, st)[0].square().mean(), st, {}

        ts = new(rule=optim.Descent(0.1), model=lt.Dense(3, 2))
        for _ in range(2):
            ts = training.single_train_step(objective, data, ts, donate=donate, differentiable=True)[3]
        return ts.parameters["weight"].square().sum()

    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (taped,) = torch.autograd.grad(loss(weight, True), weight)
    torch.testing.assert_close(taped, torch.func.grad(loss)(weight.detach(), False))
