"""Casts of whole training states: every rule goes on in low precision, and keeps its own numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training

MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 1))


def is_matrix(name: str) -> bool:
    return "weight" in name


RULES: dict[str, Any] = {
    **{
        name: rule(lr=max(rule.lr, 0.02))  # a smaller step is lost in the rounding of bfloat16
        for name, rule in vars(optim).items()
        if isinstance(rule, type)
        and issubclass(rule, optim.LeafwiseRule)
        and rule is not optim.LeafwiseRule
        and rule.descends
        and rule is not optim.Muon
    },
    "LBFGS": optim.LBFGS(0.1),
    "RMSProp centered": optim.RMSProp(centered=True),
    "Muon": optim.Groups({is_matrix: optim.Muon(0.01)}, rest=optim.AdamW(0.01)),
    "clipped": optim.OptimiserChain(optim.ClipNorm(1.0), optim.ClipGrad(0.5), optim.Adam(0.01)),
    "decayed": optim.OptimiserChain(optim.WeightDecay(), optim.SignDecay(), optim.NAdam(0.01)),
    "collected": optim.OptimiserChain(optim.AccumGrad(2), optim.AdamW(0.01)),
    "scheduled": optim.Adam(optim.cosine(1e-2, 0.0, 100)),
    "scaled schedule": optim.OptimiserChain(optim.ClipNorm(optim.linear(2.0, 1.0, 9)), optim.RAdam(1e-2)),
    "MixedPrecision": optim.MixedPrecision(optim.Adam(0.01)),
    "MixedPrecision in Groups": optim.Groups(
        {is_matrix: optim.OptimiserChain(optim.ClipNorm(1.0), optim.MixedPrecision(optim.NAdam(0.01)))},
        rest=optim.Adam(0.01),
    ),
}
CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "bf16": (lt.bf16, torch.bfloat16),
    "f16": (lt.f16, torch.float16),
    "f64": (lt.f64, torch.float64),
    "device bf16": (lt.cpu_device(dtype=torch.bfloat16), torch.bfloat16),
    "device f16": (lt.cpu_device(dtype=torch.float16), torch.float16),
}
# Up to how much of the way that single precision has gone a run may be off.
ROOM = {torch.bfloat16: 0.3, torch.float16: 0.05, torch.float64: 0.02}


def trained(ts: training.TrainState, steps: int) -> training.TrainState:
    dtype = pytree.tree_leaves(ts.parameters)[0].dtype
    x = torch.linspace(-1, 1, 24).reshape(8, 3).to(dtype)
    for _ in range(steps):
        ts = training.single_train_step(lt.MSELoss(), (x, 2 * x[:, :1] - x[:, 1:2].square()), ts)[3]
    return ts


def flat(ts: training.TrainState) -> Tensor:
    return torch.cat([leaf.reshape(-1).double() for leaf in pytree.tree_leaves(ts.parameters)])


@pytest.mark.parametrize("cast", [c if c[0] != "d" else pytest.param(c, marks=pytest.mark.slow) for c in CASTS])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_in_low_precision(make_key, rule: str, cast: str) -> None:
    (change, dtype), rule = CASTS[cast], RULES[rule]
    start = training.TrainState(MODEL, *lt.setup(make_key(), MODEL), rule)
    first = training.TrainState(MODEL, change(start.parameters), start.states, rule)
    half = trained(start, 6)
    after = change(half)
    assert after.rule == half.rule == rule
    assert repr(after.optimizer_state) == repr(half.optimizer_state)  # all hyperparameters, to the last digit
    assert all(leaf.dtype == dtype for leaf in pytree.tree_leaves(after.parameters))
    end = trained(half, 14)
    way = (flat(end) - flat(start)).norm()
    runs = [trained(after, 14), trained(change(start), 20)]
    if dtype != torch.float16:  # whose squares of gradients are zero then, as in torch.optim
        runs.append(trained(first, 20))
    for run in runs:
        if isinstance(rule, optim.LBFGS) and dtype != torch.float64:
            assert flat(run).isfinite().all()  # its curvatures are differences of rounded gradients
        else:
            signs = isinstance(rule, optim.Rprop) and dtype != torch.float64  # a step is doubled, or halved, by one
            assert (flat(run) - flat(end)).norm() < (0.5 if signs else ROOM[dtype]) * way + 0.02


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("rule", ["Adam", "NAdam", "LAMB", "collected", "scheduled", "MixedPrecision"])
def test_a_cast_state_is_that_of_cast_parameters(make_key, equal, rule: str, tree: Any) -> None:
    ps, st = lt.setup(make_key(), MODEL)
    first = training.TrainState(MODEL, lt.bf16(tree(ps)), st, RULES[rule])
    later = lt.bf16(training.TrainState(MODEL, tree(ps), st, RULES[rule]))
    if rule != "MixedPrecision":  # which makes its copies at the first step after a cast
        equal(later, first)
    equal(trained(later, 5), trained(first, 5))
    back = lt.f32(trained(later, 5))
    assert pytree.tree_structure(back) == pytree.tree_structure(lt.f32(trained(first, 5)))


def test_the_copies_of_mixed_precision_survive_casts(make_key) -> None:
    ts = training.TrainState(MODEL, *lt.setup(make_key(), MODEL), optim.MixedPrecision(optim.Descent(1e-4)))
    end, there_and_back = trained(ts, 40), lt.f32(trained(lt.bf16(ts), 40))
    assert (flat(trained(there_and_back, 1)) - flat(end)).norm() < 0.05 * (flat(end) - flat(ts)).norm() + 0.01


@pytest.mark.parametrize("rule", ["Adam", "RMSProp", "clipped"])
def test_cast_states_are_compiled(make_key, equal, rule: str) -> None:
    ts = lt.bf16(training.TrainState(MODEL, *lt.setup(make_key(), MODEL), RULES[rule]))
    jitted = lt.jit(lambda ts: trained(ts, 1), backend="replay")
    after = ts
    for _ in range(4):
        after = jitted(after)
    assert (flat(after) - flat(trained(ts, 4))).abs().max() < 0.02


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("Muon", "Adafactor", "SOAP")])
def test_complex_parameters_are_cast(rule: str) -> None:
    """In double precision, a state of complex parameters goes on as one that began there."""
    ps = {"weight": torch.full((2, 2), 0.5 - 0.25j), "bias": torch.ones(2)}
    states = [(optim.setup(RULES[rule], tree), tree) for tree in (ps, lt.f64(ps))]
    states[0] = lt.f64(states[0])
    for _ in range(3):
        states = [optim.update(opt_state, ps, ps) for opt_state, ps in states]
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-6, atol=1e-6)
