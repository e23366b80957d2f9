"""The rule in force, and another rule in the middle of a training, which goes on from what was remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.components import ComponentVector

MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 1))
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
TREES = {"dict": dict, "vector": ComponentVector}
LEAFWISE = {
    name: rule
    for name, rule in vars(optim).items()
    if isinstance(rule, type) and issubclass(rule, optim.LeafwiseRule) and rule is not optim.LeafwiseRule
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def start(rule: Any, tree: Any = dict) -> training.TrainState:
    ps, st = lt.f64(lt.setup(0, MODEL))
    return training.TrainState(MODEL, tree(ps), st, rule)


def trained(ts: training.TrainState, steps: int) -> training.TrainState:
    x = X.to(pytree.tree_leaves(ts.parameters)[0].dtype)
    for _ in range(steps):
        ts = training.single_train_step(lt.MSELoss(), (x, x[:, :1].sin()), ts)[3]
    return ts


def alike(one: Any, other: Any) -> None:
    torch.testing.assert_close(pytree.tree_leaves(one), pytree.tree_leaves(other), rtol=1e-9, atol=1e-11)


# What is in force.

FORMS = {
    "plain": optim.Adam(0.1, betas=(0.8, 0.9)),
    "integer": optim.Descent(1),
    "tensor": optim.Descent(torch.tensor(0.1)),
    "schedule": optim.Adam(optim.cosine(0.1, 0.0, 100)),
    "scaled": optim.Adam(0.1 * optim.cosine(1.0, 0.0, 100)),
    "chain": optim.OptimiserChain(optim.ClipNorm(1.0), optim.AccumGrad(2), optim.AdamW(0.1)),
    "groups": optim.Groups({lambda name: "bias" in name: optim.Descent(0.1)}, rest=optim.Adam(0.2)),
    "mixed": optim.MixedPrecision(optim.NAdam(0.1)),
}


@every_tree
@pytest.mark.parametrize("form", FORMS)
def test_the_rule_in_force_is_the_one_that_was_given(form: str, tree: Any) -> None:
    ts = trained(start(FORMS[form], tree), 2)
    assert ts.rule == FORMS[form] or form == "tensor" and ts.rule == optim.Descent(torch.tensor(0.1).item())
    again = training.TrainState(MODEL, ts.parameters, ts.states, ts.rule)
    assert repr(again.optimizer_state) == repr(ts.optimizer_state)
    assert pytree.tree_structure(again) == pytree.tree_structure(ts)


def lr_of(rule: Any) -> Any:
    while not hasattr(rule, "lr"):
        rule = rule.rules[-1] if hasattr(rule, "rules") else rule.rule
    return rule.lr


@pytest.mark.parametrize("form", ["plain", "integer", "tensor", "chain", "groups", "mixed"])
def test_an_adjusted_rule_is_in_force(form: str) -> None:
    ts = start(FORMS[form]).adjust(lr=0.5)
    assert lr_of(ts.rule) == lr_of(ts.optimizer_state.rule) == 0.5
    by_path = start(FORMS["plain"]).adjust(lr=0.5, path="layer_1")
    assert by_path.rule.lr is None and by_path.rule.betas == (0.8, 0.9)
    assert by_path.adjust(lr=0.5, path="layer_2").rule.lr == 0.5


def test_a_replaced_optimizer_is_in_force() -> None:
    ts = start(optim.Adam(0.1))
    ts = ts.replace(optimizer_state=optim.setup(optim.Momentum(0.3), ts.parameters))
    assert ts.rule == optim.Momentum(0.3)


@pytest.mark.parametrize("form", ["plain", "chain", "groups", "mixed"])
def test_the_rate_of_the_file_is_in_force(tmp_path, form: str) -> None:
    training.save_checkpoint(tmp_path / "a", trained(start(FORMS[form]).adjust(lr=0.7), 2))
    ts = training.load_checkpoint(tmp_path / "a", like=start(FORMS[form]))
    assert lr_of(ts.rule) == 0.7 and "lr=0.7" in repr(ts)


def test_rates_of_many_models_and_traced_ones() -> None:
    many = torch.vmap(lambda lr: start(optim.Adam()).adjust(lr=lr))(torch.tensor([0.1, 0.2]))
    assert many.rule.lr.shape == (2,)
    shown = []
    torch.func.grad(lambda lr: shown.append(start(optim.Descent(lr)).rule.lr) or lr)(torch.tensor(0.1))
    assert isinstance(shown[0], torch.Tensor)


# Going on by another rule.

OTHERS = {
    "the same": lambda rule: rule(),
    "another rate": lambda rule: rule(lr=0.03),
    "a schedule": lambda rule: rule(lr=optim.cosine(0.03, 0.0, 100)),
    "clipped": lambda rule: optim.OptimiserChain(optim.ClipNorm(0.1), rule()),
    "grouped": lambda rule: optim.Groups({"layer_1": rule(lr=0.1)}, rest=rule()),
    "collected": lambda rule: optim.OptimiserChain(optim.AccumGrad(2), rule()),
}


@every_tree
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", sorted(LEAFWISE.keys() - {"Muon", "Descent", "SignDecay", "WeightDecay"}))
def test_moments_are_kept(name: str, other: str, tree: Any) -> None:
    plain, rule = LEAFWISE[name](), OTHERS[other](LEAFWISE[name])
    ts = trained(start(plain, tree), 5)
    changed = ts.with_rule(rule)
    assert changed.rule == rule and changed.step == 5

    # By hand: one step of the new rule alone, from the slots of the old.
    parts: dict[str, Any] = {}
    changed.optimizer_state.layout.rule.map_states(
        lambda r, s: parts.update({leaf: slots for leaf, slots in s.leaves.items() if type(r) is type(plain)}) or s,
        changed.optimizer_state.state,
    )
    old = optim._opt_state.by_component(ts.optimizer_state) if "flat" not in parts else ts.optimizer_state
    alike(parts, old.state.leaves)
    if other == "the same":
        alike(trained(changed, 3), trained(ts, 3))
    back = changed.with_rule(plain)
    alike(trained(back, 3).parameters, trained(ts, 3).parameters)


@every_tree
def test_a_run_that_is_clipped_from_the_middle_on_is_as_by_hand(tree: Any) -> None:
    ts = trained(start(optim.Adam(0.05), tree), 6)
    rule = optim.OptimiserChain(optim.ClipNorm(0.05), optim.Adam(optim.linear(0.05, 0.0, 10)))
    changed = trained(ts.with_rule(rule), 4)
    state, ps = ts.optimizer_state, ts.parameters
    clip = optim.setup(optim.ClipNorm(0.05), ps)
    for step in range(4):
        grads = training.compute_gradients(lt.MSELoss(), (X, X[:, :1].sin()), ts.replace(parameters=ps))[0]
        clipped = pytree.tree_map(torch.sub, ps, optim.update(clip, ps, grads)[1])
        state, ps = optim.update(optim.adjust(state, lr=0.05 - 0.005 * step), ps, clipped)
    alike(changed.parameters, ps)


def test_schedules_go_on_or_begin_where_they_are_told() -> None:
    linear = optim.Adam(optim.linear(1.0, 0.0, 10))
    constant, scheduled = trained(start(optim.Adam()), 4), trained(start(linear), 4)

    def count(ts: training.TrainState) -> int:
        return int(ts.optimizer_state.state.steps)

    assert count(constant.with_rule(linear)) == 0 and count(scheduled.with_rule(linear)) == 4
    assert count(constant.with_rule(linear, steps=4)) == 4 and count(scheduled.with_rule(linear, steps=0)) == 0


@every_tree
@pytest.mark.parametrize("rule", [optim.Adam(0.05), optim.OptimiserChain(optim.ClipNorm(1.0), optim.RAdam(0.05))])
def test_unfrozen_parameters_begin_anew_beside_the_others(rule: Any, tree: Any) -> None:
    plain = start(rule, tree)
    model, ps, st = lt.freeze(MODEL, plain.parameters, plain.states, "layer_1")
    ts = trained(training.TrainState(model, ps, st, rule), 5)
    model, ps, st = lt.unfreeze(ts.model, ts.parameters, ts.states)
    after = ts.replace(model=model, parameters=ps, states=st).with_rule(ts.rule)
    assert after.rule == rule and after.step == 5 and isinstance(after.parameters, type(plain.parameters))

    # The same run with a fresh optimizer for the one, and the old one for the other.
    fresh = optim.setup(rule, {"layer_1": dict(ps["layer_1"])})
    known = optim._opt_state.by_component(ts.optimizer_state)
    slots = {}
    after.optimizer_state.layout.rule.map_states(
        lambda r, s: slots.update({k: v for k, v in s.leaves.items() if v}) or s,
        after.optimizer_state.state,
    )
    expected = {}
    for state in (fresh, known):
        state.layout.rule.map_states(
            lambda r, s: expected.update({k: v for k, v in s.leaves.items() if v}) or s, state.state
        )
    assert slots.keys() == expected.keys()
    alike(slots, {name: expected[name] for name in slots})
    assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves(trained(after, 3).parameters))


def test_a_replaced_head_begins_anew() -> None:
    ts = trained(start(optim.Adam(0.1)), 3)
    head = lt.Dense(4, 2)
    new = lt.replace_layer(ts.model, ts.parameters, ts.states, "layer_2", head, *lt.f64(lt.setup(1, head)))
    state = ts.replace(model=new[0], parameters=new[1], states=new[2]).with_rule(ts.rule).optimizer_state.state
    assert state.leaves["layer_1.weight"]["step"] == 3
    # The bias of one number and that of two differ in shape: no part of it is kept.
    assert state.leaves["layer_2.bias"]["step"] == state.leaves["layer_2.weight"]["step"] == 0


def test_other_rules_with_the_same_memory() -> None:
    ts = trained(start(optim.Adam(0.1)), 3)
    for rule in (optim.AdamW(0.1), optim.LAMB(0.1), optim.OptimiserChain(optim.WeightDecay(), optim.RAdam())):
        state = ts.with_rule(rule).optimizer_state
        state = state.state[1] if isinstance(rule, optim.OptimiserChain) else state.state
        alike(state.leaves, ts.optimizer_state.state.leaves)
    mixed = trained(lt.bf16(start(optim.MixedPrecision(optim.Adam(0.1)))), 3)
    masters, inner = mixed.with_rule(optim.MixedPrecision(optim.AdamW(0.1))).optimizer_state.state
    alike((masters.leaves, inner.leaves), [part.leaves for part in mixed.optimizer_state.state])


def test_what_is_frozen_stays_so() -> None:
    ts = start(optim.Adam(0.1))
    ts = trained(ts.replace(optimizer_state=optim.freeze(ts.optimizer_state, "layer_1")), 2)
    assert ts.with_rule(optim.Adam(0.2)).optimizer_state.layout.frozen == ("layer_1.weight", "layer_1.bias")


def test_many_models_change_their_rule_inside_of_vmap() -> None:
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    many = torch.vmap(lambda lr: trained(start(optim.Adam()).adjust(lr=lr), 2))(rates)
    rule = optim.AdamW(0.05)
    with pytest.raises(lt.InputError, match="many models"):
        many.with_rule(rule)
    changed = torch.vmap(lambda ts: ts.with_rule(rule))(many)
    for one, lr in zip(lt.unstack(changed), rates, strict=True):
        alike(one, trained(start(optim.Adam(lr)), 2).with_rule(rule))


def test_a_rule_of_another_kind_begins_anew_by_setup_alone() -> None:
    ts = trained(start(optim.Momentum(0.1)), 2)
    with pytest.raises(lt.InputError, match="of use to the new one") as error:
        ts.with_rule(optim.Adam(0.1))
    assert "optim.setup" in str(error.value)
    assert ts.with_rule(optim.Descent(0.1)).rule == optim.Descent(0.1)  # which remembers nothing
    with pytest.raises(lt.KeyNameError, match="no field 'rule'") as error:
        ts.replace(rule=optim.Adam())
    assert "with_rule" in str(error.value)
