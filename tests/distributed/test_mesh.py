"""Sharded models on meshes of ranks compute what one process does."""

from __future__ import annotations

import pytest
import torch

from .mesh_work import alone, layer_outcomes, losses, rule_steps
from .world import run


def check_losses(results, layers, steps):
    values, ps = alone(layers, steps)
    assert values[-1] < 0.9 * values[0]  # there is something to compare
    for found in results:
        for way in ("eager", "jit", "donated"):
            torch.testing.assert_close(found[way][0], values, rtol=0, atol=1e-5)
            torch.testing.assert_close(found[way][1], ps, rtol=0, atol=1e-4)
            assert not found[f"{way} moved"].numel(), "parameters are not where they were"
        torch.testing.assert_close(found["jit"], found["eager"], rtol=0, atol=1e-6)
        assert found["compiled"] == 1


@pytest.mark.parametrize("data", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_have_the_losses_of_one_process(data, tmp_path):
    check_losses(run(losses, 2, tmp_path, data, 1, 6), 1, 6)


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2, 4])
def test_four_ranks_have_the_losses_of_one_process(data, tmp_path):
    check_losses(run(losses, 4, tmp_path, data, 4, 50, limit=500.0), 4, 50)


def test_every_rule_steps_sharded_parameters_as_whole_ones(tmp_path):
    for found in run(rule_steps, 2, tmp_path):
        assert len(found) > 25
        for name, (expected, got) in found.items():
            tolerance = 1e-2 if name == "Muon" else 1e-5  # which orthogonalizes in bfloat16
            torch.testing.assert_close({name: got}, {name: expected}, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_every_layer_computes_the_same_with_sharded_tensors_or_refuses_them(split, tmp_path):
    for found in run(layer_outcomes, 2, tmp_path, split, limit=500.0):
        assert not [f"{name}: {outcome}" for name, outcome in found.items() if outcome.startswith("differs")]
        refused = [name for name, outcome in found.items() if outcome.startswith("refused")]
        assert len(found) > 300 and len(refused) < (45 if split else 20), refused
