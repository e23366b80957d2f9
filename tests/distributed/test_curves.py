"""Training on several processes is training on the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .work import BATCHES, RULES, STEPS, WAYS, curves, problem
from .world import run

QUICK = ["averaged vector", "averaged dict", "rule, dict", "sharded vector", "scattered"]


def torch_curve(rule):
    """Return losses and parameters of torch.nn and torch.optim on the whole batches."""
    ps, _, batches = problem()
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    names = {"0": "layer_1", "2": "layer_2"}
    module.load_state_dict({f"{i}.{leaf}": ps[name][leaf] for i, name in names.items() for leaf in ps[name]})
    optimizer = {
        "momentum": lambda weights: torch.optim.SGD(weights, 0.05, momentum=0.9),
        "adamw": lambda weights: torch.optim.AdamW(weights, 0.01, weight_decay=0.1),
        "clipped": lambda weights: torch.optim.Adam(weights, 0.01),
    }[rule](module.parameters())
    losses = []
    for i in range(STEPS):
        x, y = batches[i % BATCHES]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        if rule == "clipped":
            nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        optimizer.step()
        losses.append(loss.detach())
    weights = module.state_dict()
    return torch.stack(losses), {name: {leaf: weights[f"{i}.{leaf}"] for leaf in ps[name]} for i, name in names.items()}


def check(results, cases):
    for way, rule in cases:
        losses, ps = torch_curve(rule)
        assert losses[-1] < 0.8 * losses[0]  # there is something to compare
        for result in results:
            found, found_ps = result[f"{way}/{rule}"]
            torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
            torch.testing.assert_close(found_ps, ps, rtol=1e-6, atol=1e-9)


def test_the_curve_of_two_processes_is_that_of_one(tmp_path):
    cases = [(way, "clipped") for way in QUICK]
    results = run(curves, 2, tmp_path, cases)
    check(results, cases)
    # Without an average the ranks part at the first step: the comparison would notice.
    weights = [result["alone"]["layer_1"]["weight"] for result in results]
    assert not torch.allclose(*weights, rtol=1e-3)


@pytest.mark.slow
def test_the_curve_of_four_processes_is_that_of_one(tmp_path):
    cases = [("averaged vector", "adamw"), ("sharded vector", "adamw")]
    check(run(curves, 4, tmp_path, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rule"), [*((2, rule) for rule in RULES), (4, "clipped")])
def test_the_curve_of_several_processes_is_that_of_one(ranks, rule, tmp_path):
    cases = [(way, rule) for way in WAYS]
    check(run(curves, ranks, tmp_path, cases), cases)


def test_a_single_process_runs_the_same_script(tmp_path):
    cases = [(way, "clipped") for way in WAYS]
    check([curves(tmp_path, cases)], cases)
