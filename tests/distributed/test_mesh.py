"""Sharded models on meshes of ranks compute what one process does."""

from __future__ import annotations

import re

import pytest
import torch

from .mesh_work import (
    BATCH,
    LENGTH,
    WIDTH,
    WORDS,
    alone,
    collectives,
    compiled_by_inductor,
    gather_events,
    guide,
    held,
    jitted_curves,
    layer_outcomes,
    loaded_by_mesh,
    losses,
    mistakes,
    operations,
    rule_steps,
    saved_by_mesh,
)
from .world import run


def check_losses(results, layers, steps):
    values, ps = alone(layers, steps)
    assert values[-1] < 0.9 * values[0]  # there is something to compare
    for found in results:
        for way in ("eager", "jit", "donated"):
            torch.testing.assert_close(found[way][0], values, rtol=0, atol=1e-5)
            torch.testing.assert_close(found[way][1], ps, rtol=0, atol=1e-4)
            assert not found[f"{way} moved"].numel(), "parameters are not where they were"
        torch.testing.assert_close(found["jit"], found["eager"], rtol=0, atol=1e-5)
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
        assert len(found) > 300 and len(refused) < (40 if split else 20), refused


def test_operations_on_sharded_trees_give_what_they_give_on_whole_ones(tmp_path):
    for found in run(operations, 2, tmp_path):
        for name, (expected, got) in found.items():
            torch.testing.assert_close({name: got}, {name: expected}, rtol=1e-5, atol=1e-6)


SAID = {
    "plain input": r"InputError: model.layer_1[\s\S]*must not meet plain ones[\s\S]*'input' is not sharded",
    "plain parameters": r"must not meet plain ones[\s\S]*'parameters.weight' is not sharded",
    "vector": r"DTypeError: The leaf 'layer_1.weight' must not be sharded",
    "odd size": r"InputError: The size of a dimension[\s\S]*dimension 0 of 'x'[\s\S]*multiple of 2, for Shard",
    "axis twice": r"InputError: An axis of a mesh must not split a tensor twice",
    "parts": r"InputError: The parts of all ranks must have the same[\s\S]*\(2, 2\)[\s\S]*\(3, 2\)",
    "inside of jit": r"place must be called outside",
    "dimension": r"InputError: The dimension that splits 'x' must be one of its 1 dimensions",
    "no rule": r"KeyNameError[\s\S]*No rule says where 'layer_1.bias' goes",
    "no axis": r"There is no axis of the mesh 'modle'[\s\S]*Did you mean 'model'",
    "no placement": r"DTypeError: A rule must be Shard",
    "plain gradient": r"InputError: layer_1.weight: The gradient of a sharded parameter must be sharded",
    "export": r"InputError: A function of sharded tensors cannot be exported",
    "sizes": r"InputError: The axes of a mesh must have room for all ranks[\s\S]*2 ranks[\s\S]*data=2, model=2",
}


def test_ways_to_train_are_the_same_inside_of_jit(tmp_path):
    for found in run(jitted_curves, 2, tmp_path):
        for way, (eager, jitted, programs) in found.items():
            torch.testing.assert_close({way: jitted}, {way: eager}, rtol=0, atol=1e-12)
            assert programs == 1, way


def test_the_next_layer_is_gathered_while_one_computes(tmp_path):
    """See that of a fully sharded model two layers at most are whole, and that messages travel meanwhile."""
    for events in run(gather_events, 2, tmp_path):
        text = " ".join(events)
        # Forward: the second layer is asked for before the first one's product.
        assert text.startswith("gather wait gather product wait gather product wait"), text
        under_way = [events[:i].count("gather") - events[:i].count("wait") for i in range(len(events))]
        assert max(under_way) <= 2 and events.count("gather") == 6, text


def test_mistakes_are_errors_that_say_what_is_wrong(tmp_path):
    for said in run(mistakes, 2, tmp_path):
        assert said.keys() == SAID.keys()
        for name, text in said.items():
            assert re.search(SAID[name], text), text


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_read_by_others_and_by_one_process(tmp_path):
    written = run(saved_by_mesh, 4, tmp_path, 2)[0]
    for ranks, data in ((4, 1), (4, 4), (2, 1)):
        for read in run(loaded_by_mesh, ranks, tmp_path, data):
            assert read.keys() == written.keys()
            assert all(torch.equal(read[name], written[name]) for name in written)
    alone = run(loaded_by_mesh, 1, tmp_path, 1)[0]
    assert all(torch.equal(alone[name], written[name]) for name in written)


def least_bytes(data, model, layers):
    """Return the bytes that go into the collectives of a step at least, by the formulas in docs/distributed.md."""
    activations = BATCH // data * LENGTH * WIDTH * 4
    found = {"all_reduce": [activations] * 4 * layers} if model > 1 else {"all_reduce": []}
    if model > 1:
        found["all_gather_into_tensor"] = [activations // model]  # the features of the embedding
    if data > 1:
        split, copied = 4 * WIDTH**2 + 5 * WIDTH + 4 * WIDTH**2 + 2 * WIDTH - 2 * WIDTH, 6 * WIDTH
        numbers = layers * (split // model + copied) + WORDS * WIDTH // model + WORDS * (WIDTH + 1)
        found["all_reduce"] = [*found["all_reduce"], 4 * numbers, 4, 4]
    return found


@pytest.mark.parametrize(
    ("ranks", "data", "layers"), [(2, 1, 1), (2, 1, 3), pytest.param(4, 2, 2, marks=pytest.mark.slow)]
)
def test_a_step_sends_as_little_as_there_can_be(ranks, data, layers, tmp_path):
    """See that nothing is sent but four sums a layer, the features of the embedding, and what the data axis adds up.

    The sums come after both pairs of dense layers, forward and backward. Over the data axis all gradients go together,
    and the sum of the losses and their number.
    """
    expected = least_bytes(data, ranks // data, layers)
    for found in run(collectives, ranks, tmp_path, data, layers):
        assert sorted(found["all_reduce"]) == sorted(expected["all_reduce"])
        assert found.get("all_gather_into_tensor") == expected.get("all_gather_into_tensor")


@pytest.mark.slow
def test_the_guide_runs_on_two_processes(tmp_path):
    assert run(guide, 2, tmp_path) == [None, None]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_holds_its_share_of_parameters_and_moments(ranks, tmp_path):
    for found in run(held, ranks, tmp_path):
        print({name: f"{part:.3f}" for name, part in found.items()}, "of the bytes are on one of", ranks)
        assert all(abs(part * ranks - 1) < 0.05 for part in found.values()), found


@pytest.mark.slow
def test_inductor_compiles_a_step_on_a_mesh(tmp_path):
    for whole, eager, compiled in run(compiled_by_inductor, 2, tmp_path):
        torch.testing.assert_close(eager, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(compiled, whole, rtol=0, atol=1e-5)
