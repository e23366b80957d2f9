"""The protocol of rules: further arguments of a step, slots by name, and parameters to evaluate with."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
import torchopt

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.components import ComponentVector
from luxtorch.core import KeyNameError


class Seen(optim.ListRule):
    """Take steps of the length of the loss, and note what was passed."""

    descends = False

    def updates(self, leaves, state):
        value = leaves.extra["value"]
        return [None if g is None else value * g.sign() for g in leaves.grads], state


class Plain(optim.Rule):
    """A rule of `init` and `update` alone."""

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, *, inplace=False, **extra):
        return pytree.tree_map(lambda g: -extra["value"] * g, updates), state


class Old(optim.Rule):
    """One that takes no further arguments."""

    def init(self, params):
        return ()

    def update(self, updates, state, *, params=None, inplace=False):
        return pytree.tree_map(lambda g: -0.5 * g, updates), state


PLACES = {
    "alone": lambda rule: rule,
    "chain": lambda rule: optim.OptimiserChain(optim.ClipNorm(1e9), rule),
    "before": lambda rule: optim.OptimiserChain(rule, optim.Descent(1.0)),
    "accumulated": lambda rule: optim.OptimiserChain(optim.AccumGrad(1), rule),
    "groups": lambda rule: optim.Groups({"layer_1": rule}, rest=rule),
    "mixed precision": lambda rule: optim.MixedPrecision(rule, torch.float64),
    "torchopt": lambda rule: torchopt.chain(torchopt.clip_grad_norm(1e9), rule, optim.OptimiserChain()),
}


@pytest.mark.parametrize("kind", [dict, ComponentVector])
@pytest.mark.parametrize("place", PLACES)
def test_further_arguments_come_through(place, kind, draw):
    ps, grads = kind(draw()), kind(draw())
    opt_state = optim.setup(PLACES[place](Seen()), ps)
    new = optim.update(opt_state, ps, grads, value=torch.tensor(0.5))[1]
    expected = pytree.tree_map(lambda p, g: p - 0.5 * g.sign(), ps, grads)
    torch.testing.assert_close(pytree.tree_leaves(new), pytree.tree_leaves(expected))


def test_each_member_has_its_own_value(draw):
    ps = pytree.tree_map(lambda p: torch.stack([p, p]), draw())
    opt_state = optim.setup(optim.per_member(Seen(), 2), ps)
    new = optim.update(opt_state, ps, ps, value=torch.tensor([1.0, 2.0]))[1]
    for p, q in zip(pytree.tree_leaves(ps), pytree.tree_leaves(new), strict=True):
        torch.testing.assert_close(q, torch.stack([p[0] - p[0].sign(), p[1] - 2 * p[1].sign()]))


def test_frozen_parameters_stay(draw):
    ps = draw()
    opt_state = optim.freeze(optim.setup(Seen(), ps), "layer_1")
    new = optim.update(opt_state, ps, ps, value=1.0)[1]
    assert torch.equal(new["layer_1"]["weight"], ps["layer_1"]["weight"])
    torch.testing.assert_close(new["layer_2"]["bias"], ps["layer_2"]["bias"] - ps["layer_2"]["bias"].sign())


def test_value_fn_takes_the_tree(draw):
    class Ask(optim.ListRule):
        def updates(self, leaves, state):
            value_fn = leaves.extra["value_fn"]
            moved = {name: torch.zeros_like(p) for name, p in zip(leaves.names, leaves.params, strict=True)}
            return [value_fn(moved) - value_fn({}) + 0 * p for p in leaves.params], state

    for kind in (dict, ComponentVector):
        ps = kind(draw())
        for rule in (
            Ask(),
            optim.per_member(Ask(), 1) if False else optim.Groups({"layer_1": Ask(), "layer_2": Ask()}),
        ):
            new = optim.update(optim.setup(rule, ps), ps, ps, value_fn=lambda ps: (ps["layer_1"]["bias"] ** 2).sum())[1]
            torch.testing.assert_close(
                new["layer_1"]["bias"], ps["layer_1"]["bias"] - (ps["layer_1"]["bias"] ** 2).sum()
            )


@pytest.mark.parametrize("rule", [Seen(), Plain(), Old()])
def test_a_training_step_passes_the_loss(rule):
    model = lt.Dense(2, 2)
    ts = training.TrainState(model, *lt.setup(0, model), optim.OptimiserChain(optim.ClipNorm(1e9), rule))
    data = torch.ones(3, 2), torch.zeros(3, 2)
    grads, loss, _, new = training.single_train_step(lt.MSELoss(), data, ts)
    factor = 0.5 if isinstance(rule, Old) else loss
    for p, g, q in zip(*(pytree.tree_leaves(t) for t in (ts.parameters, grads, new.parameters)), strict=True):
        torch.testing.assert_close(q, p - factor * (g.sign() if isinstance(rule, Seen) else g))
    torch.testing.assert_close(
        training.apply_gradients(ts, grads, value=loss).parameters, new.parameters, rtol=0, atol=0
    )


def test_torchopt_takes_a_rule_of_ours(draw):
    ps = draw()
    rule = torchopt.chain(torchopt.clip_grad_norm(1e9), optim.Adam(0.1))
    updates, _ = rule.update(ps, rule.init(ps), params=ps, inplace=False)
    new = optim.update(optim.setup(optim.Adam(0.1), ps), ps, ps)[1]
    torch.testing.assert_close(torchopt.apply_updates(ps, updates, inplace=False), new)


WRAPPED = {
    "alone": lambda rule: rule,
    "chain": lambda rule: optim.OptimiserChain(optim.ClipNorm(), rule),
    "groups": lambda rule: optim.Groups({"layer_1": rule}, rest=rule),
    "mixed precision": lambda rule: optim.MixedPrecision(rule, torch.float64),
    "torchopt": lambda rule: torchopt.chain(torchopt.clip_grad_norm(1e9), rule),
}


class TestSlots:
    @pytest.mark.parametrize("kind", [dict, ComponentVector])
    @pytest.mark.parametrize("place", WRAPPED)
    def test_like_the_parameters(self, place, kind, draw):
        ps, grads = kind(draw()), kind(draw())
        opt_state, _ = optim.update(optim.setup(WRAPPED[place](optim.Adam(betas=(0.5, 0.9))), ps), ps, grads)
        averages = optim.slots(opt_state, "exp_avg")
        assert pytree.tree_structure(averages) == pytree.tree_structure(ps)
        if place in ("alone", "groups"):
            torch.testing.assert_close(pytree.tree_leaves(averages), [g / 2 for g in pytree.tree_leaves(grads)])

    def test_of_a_frozen_component(self, draw):
        ps = ComponentVector(draw())
        opt_state = optim.freeze(optim.setup(optim.Adam(), ps), "layer_1")
        assert pytree.tree_structure(optim.slots(opt_state, "exp_avg")) == pytree.tree_structure(ps)

    def test_one_tensor_and_some_parameters(self, draw):
        assert optim.slots(optim.setup(optim.Adam(), torch.ones(2)), "exp_avg").shape == (2,)
        opt_state = optim.setup(optim.Groups({"layer_1": optim.Adam()}, rest=optim.Descent()), draw())
        assert list(optim.slots(opt_state, "exp_avg")) == ["layer_1"]

    def test_misspelt(self, draw):
        with pytest.raises(KeyNameError, match=r"no slot 'exp_agv'(.|\n)*Did you mean 'exp_avg'"):
            optim.slots(optim.setup(optim.Adam(), draw()), "exp_agv")


class TestEvalParameters:
    @pytest.mark.parametrize("kind", [dict, ComponentVector])
    @pytest.mark.parametrize("place", WRAPPED)
    def test_whatever_wraps_the_rule(self, place, kind, draw):
        ps = kind(draw())
        opt_state = optim.setup(WRAPPED[place](optim.ASGD(0.1, t0=0.0)), ps)
        for _ in range(4):
            opt_state, ps = optim.update(opt_state, ps, kind(draw()))
        evaluated = optim.eval_parameters(opt_state, ps)
        averages = optim.slots(opt_state, "ax")
        torch.testing.assert_close(pytree.tree_leaves(evaluated), pytree.tree_leaves(averages))
        assert pytree.tree_structure(evaluated) == pytree.tree_structure(ps)

    def test_of_most_rules_the_parameters(self, draw):
        ps = draw()
        for place in WRAPPED.values():
            assert optim.eval_parameters(optim.setup(optim.OptimiserChain(optim.Adam()), ps), ps) is ps
            new = optim.eval_parameters(optim.setup(place(optim.Adam()), ps), ps)
            torch.testing.assert_close(new, ps, rtol=0, atol=0)

    def test_of_members(self, draw):
        ps = pytree.tree_map(lambda p: torch.stack([p, 2 * p]), draw())
        opt_state = optim.setup(optim.per_member(optim.ASGD(0.1, t0=0.0), 2), ps)
        for _ in range(3):
            opt_state, ps = optim.update(opt_state, ps, ps)
        torch.testing.assert_close(optim.eval_parameters(opt_state, ps), optim.slots(opt_state, "ax"))


def test_unfreeze_is_thaw():
    assert optim.unfreeze is optim.thaw
