"""Optimizers of torchopt work wherever rules of this package do."""

from __future__ import annotations

import pytest
import torch
import torchopt

from luxtorch import optim
from luxtorch.components import ComponentVector

PLACES = {
    "alone": lambda rule: rule,
    "last of a chain": lambda rule: optim.OptimiserChain(optim.ClipNorm(100.0), rule),
    "after an accumulation": lambda rule: optim.OptimiserChain(optim.AccumGrad(1), rule),
    "groups": lambda rule: optim.Groups({"layer_1": rule}, rest=rule),
    "mixed precision": lambda rule: optim.MixedPrecision(rule, torch.float64),
    "torchopt's chain": lambda rule: torchopt.chain(rule),
}
RULES = {
    "sgd": (lambda: torchopt.sgd(0.1, momentum=0.9), optim.Momentum(0.1, 0.9)),
    "adam": (lambda: torchopt.adam(0.1), optim.Adam(0.1)),
    "clipped": (
        lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), optim.Adam(0.1)),
        optim.OptimiserChain(optim.ClipNorm(0.5), optim.Adam(0.1)),
    ),
}


@pytest.mark.parametrize("kind", [dict, ComponentVector])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RULES)
def test_same_numbers_as_ours(name, place, kind, draw):
    make, ours = RULES[name]
    if name == "clipped" and place == "groups":
        ours = optim.Groups({"layer_1": ours}, rest=ours)
    ps, noises = kind(draw()), [kind(draw()) for _ in range(4)]
    state, expected_state, new, expected = optim.setup(PLACES[place](make()), ps), optim.setup(ours, ps), ps, ps
    for noise in noises:
        state, new = optim.update(state, new, noise)
        expected_state, expected = optim.update(expected_state, expected, noise)
    new, expected = (tree.to_dict() if kind is ComponentVector else tree for tree in (new, expected))
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)


def test_per_member(draw):
    members = [draw() for _ in range(2)]
    stacked = {k: {n: torch.stack([m[k][n] for m in members]) for n in v} for k, v in members[0].items()}
    rule = torchopt.sgd(0.1, momentum=0.9)
    state = optim.setup(optim.per_member(rule, 2), stacked)
    new = optim.update(state, stacked, stacked)[1]
    for i, member in enumerate(members):
        one = optim.update(optim.setup(rule, member), member, member)[1]
        torch.testing.assert_close({k: {n: p[i] for n, p in v.items()} for k, v in new.items()}, one)


def test_only_the_last_of_a_chain():
    with pytest.raises(optim._rule.InputError, match="torchopt transformation is not the last"):
        optim.OptimiserChain(torchopt.clip_grad_norm(0.5), optim.Adam())
