"""Modes and setting states by name."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import BatchNorm, Chain, Dense, Dropout, KeyNameError, Static

MODEL = Chain(Dense(3, 4), Chain(BatchNorm(4), Dropout(0.5)))


def test_models_start_in_train_mode_and_switching_leaves_the_original():
    _, st = lt.setup(0, MODEL)
    tested = lt.test_mode(st)
    assert st["layer_2"]["layer_1"]["training"] == st["layer_2"]["layer_2"]["training"] == Static(True)
    assert tested["layer_2"]["layer_1"]["training"] == tested["layer_2"]["layer_2"]["training"] == Static(False)
    assert lt.train_mode(tested)["layer_2"]["layer_1"]["training"] == Static(True)
    assert tested["layer_2"]["layer_1"]["running_mean"] is st["layer_2"]["layer_1"]["running_mean"]
    assert lt.test_mode({}) == {}


def test_update_state_sets_every_entry_of_a_name():
    _, st = lt.setup(0, Chain(BatchNorm(2), BatchNorm(2)))
    new = lt.update_state(st, "running_mean", torch.ones(2))
    for layer in ("layer_1", "layer_2"):
        assert new[layer]["running_mean"].tolist() == [1, 1] and st[layer]["running_mean"].tolist() == [0, 0]
    with pytest.raises(KeyNameError, match="'runing_mean'[\\s\\S]*Did you mean 'running_mean'"):
        lt.update_state(st, "runing_mean", torch.ones(2))


def test_a_static_value_is_structure_everywhere():
    tree = {"flag": Static(True), "x": torch.ones(3)}
    assert torch.utils._pytree.tree_leaves(tree) == [tree["x"]]
    gradient, aux = torch.func.grad(lambda x: (x.sum(), {**tree, "x": x}), has_aux=True)(tree["x"])
    assert aux["flag"] == Static(True) and gradient.tolist() == [1, 1, 1]
    assert torch.vmap(lambda t: {**t, "x": t["x"] + 1})(tree)["flag"] == Static(True)
    assert repr(Static("a")) == "Static('a')" and not Static(0)


def test_states_are_saved_and_loaded_as_plain_data(tmp_path):
    _, st = lt.setup(0, MODEL)
    torch.save(lt.test_mode(st), tmp_path / "states.pt")
    loaded = torch.load(tmp_path / "states.pt", weights_only=True)
    assert loaded["layer_2"]["layer_1"]["training"] == Static(False)
    assert torch.equal(loaded["layer_2"]["layer_2"]["rng"], st["layer_2"]["layer_2"]["rng"])


def test_the_mode_is_part_of_the_graph():
    ps, st = lt.setup(0, MODEL)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(lambda x, ps, st: MODEL(x, ps, st), fullgraph=True, backend=backend)
    x = torch.ones(5, 3)
    for state in (st, lt.test_mode(st), st, lt.test_mode(st)):
        call(x, ps, state)
    assert len(graphs) == 2
