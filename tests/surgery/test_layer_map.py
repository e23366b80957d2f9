"""The same change to each layer, and layers read and replaced by path."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_structure

import luxtorch as lt
from luxtorch.core import InputError, KeyNameError
from luxtorch.surgery._frozen import Frozen, freeze
from luxtorch.surgery._layer_map import get_layer, layer_map, replace_layer

MODEL = lt.Chain(
    lt.Dense(3, 4, torch.tanh),
    lt.BatchNorm(4),
    lt.SkipConnection(lt.Chain(lt.Dense(4, 4), lt.Dropout(0.5)), torch.add),
    lt.RepeatedLayer(lt.Dense(4, 4), 2),
    lt.Parallel(torch.add, left=lt.Dense(4, 2), right=lt.Dense(4, 2)),
)


@pytest.fixture
def model(make_key):
    return MODEL, *lt.setup(make_key(), MODEL)


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_paths_lead_to_each_layer_and_its_trees(model, tree):
    layer, ps, st = model
    seen = {}

    def look(layer, ps, st, path):
        seen[path] = (layer, ps, st)
        return layer, ps, st

    same, new_ps, new_st = layer_map(look, layer, tree(ps), st)
    assert same is layer and tree_structure((new_ps, new_st)) == tree_structure((tree(ps), st))
    assert list(seen) == [
        "layer_1", "layer_2", "layer_3.layer_1", "layer_3.layer_2", "layer_4", "layer_5.left", "layer_5.right"
    ]  # fmt: skip
    for path, (part, part_ps, part_st) in seen.items():
        expected = get_layer(layer, ps, st, path)
        assert part in (expected[0], getattr(expected[0], "layer", None))
        assert tree_structure((part_ps, part_st)) == tree_structure(expected[1:])
    # They are torch's paths too, for the same model there.
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    seen.clear()
    layer_map(look, *lt.from_torch(module))
    known = {name for name, inner in module.named_modules() if not list(inner.children())}
    assert set(seen) == known


def test_values_are_changed_layer_by_layer(model, make_key):
    def zeroed(layer, ps, st, path):
        if isinstance(layer, lt.Dense):
            ps = {**ps, "bias": torch.full_like(ps["bias"], float(len(path)))}
        return layer, ps, st

    layer, ps, st = layer_map(zeroed, *model)
    assert layer == MODEL and st == model[2]
    for name, leaf in lt.flatten_names(ps).items():
        before = lt.flatten_names(model[1])[name]
        place, _, last = name.rpartition(".")
        changed = last == "bias" and place != "layer_2"
        assert torch.equal(leaf, torch.full_like(before, float(len(place))) if changed else before)
        assert changed or leaf is before


def test_layers_are_exchanged_with_their_trees(model, make_key):
    def without_norms(layer, ps, st, path):
        return (lt.NoOpLayer(), {}, {}) if isinstance(layer, (lt.BatchNorm, lt.Dropout)) else (layer, ps, st)

    layer, ps, st = layer_map(without_norms, *model)
    assert layer[1] == get_layer(layer, ps, st, "layer_3.layer_2")[0] == lt.NoOpLayer()
    fresh = lt.setup(0, layer)
    assert tree_structure((ps, st)) == tree_structure(fresh)
    x = lt.random.normal(make_key(), (6, 3))
    y = torch.tanh(nn.functional.linear(x, ps["layer_1"]["weight"], ps["layer_1"]["bias"]))
    inner = ps["layer_3"]["layer_1"]
    y = y + nn.functional.linear(y, inner["weight"], inner["bias"])
    for _ in range(2):
        y = nn.functional.linear(y, ps["layer_4"]["weight"], ps["layer_4"]["bias"])
    left, right = (nn.functional.linear(y, *part.values()) for part in ps["layer_5"].values())
    torch.testing.assert_close(layer(x, ps, st)[0], left + right)


def test_a_model_of_one_layer_has_no_path(make_key):
    ps, st = lt.setup(make_key(), lt.Dense(3, 2))
    paths = []
    layer_map(lambda layer, ps, st, path: (paths.append(path), (layer, ps, st))[1], lt.Dense(3, 2), ps, st)
    assert paths == [""]
    assert get_layer(lt.Dense(3, 2), ps, st, "")[0] == lt.Dense(3, 2)


def test_members_of_an_ensemble_are_changed_together(make_key):
    ensemble = lt.Ensemble(lt.Chain(lt.Dense(3, 2), lt.Dropout(0.5)), 4)
    ps, st = lt.setup(make_key(), ensemble)
    doubled = layer_map(lambda layer, ps, st, path: (layer, tree_map(lambda leaf: 2 * leaf, ps), st), ensemble, ps, st)
    assert doubled[0] == ensemble
    for one, two in zip(lt.unstack(ps), lt.unstack(doubled[1]), strict=True):
        assert torch.equal(2 * one["layer_1"]["weight"], two["layer_1"]["weight"])


def test_frozen_parameters_are_seen_changed_and_stay_frozen(model):
    seen = {}

    def doubled(layer, ps, st, path):
        seen[path] = set(ps)
        return layer, tree_map(lambda leaf: 2 * leaf, ps), st

    frozen = freeze(*model, "layer_1.weight")
    layer, ps, st = layer_map(doubled, *frozen)
    assert layer == frozen[0] and seen["layer_1"] == {"weight", "bias"}
    assert torch.equal(st["frozen_params"]["layer_1"]["weight"], 2 * model[1]["layer_1"]["weight"])


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("path", ["layer_1", "layer_3", "layer_3.layer_1", "layer_4", "layer_5.right", ""])
def test_a_replaced_layer_is_the_one_that_is_read(model, make_key, path, tree):
    layer, ps, st = model
    new = lt.Chain(lt.Dense(2, 2), lt.BatchNorm(2))
    trees = lt.setup(make_key(), new)
    changed = replace_layer(layer, tree(ps), st, path, new, *trees)
    assert isinstance(changed[1], tree)
    got = get_layer(*changed, path)
    assert got[0] == new and tree_structure(got[1:]) == tree_structure((tree(trees[0]), trees[1]))
    for name, leaf in lt.flatten_names(got[1]).items():
        assert torch.equal(leaf, lt.flatten_names(trees[0])[name])
    rest = {name: leaf for name, leaf in lt.flatten_names(changed[1]).items() if path and not name.startswith(path)}
    assert set(rest) == {name for name in lt.flatten_names(ps) if path and not name.startswith(path)}
    assert all(torch.equal(leaf, lt.flatten_names(ps)[name]) for name, leaf in rest.items())


def test_a_new_head_on_a_frozen_body_is_trainable(model, make_key):
    frozen, head = freeze(*model), lt.Dense(4, 7)
    layer, ps, st = replace_layer(*frozen, "layer_5", head, *lt.setup(make_key(), head))
    assert isinstance(layer, Frozen) and list(lt.flatten_names(ps)) == ["layer_5.weight", "layer_5.bias"]
    assert layer(lt.random.normal(make_key(), (6, 3)), ps, st)[0].shape == (6, 7)


def keep(layer, ps, st, path):
    return layer, ps, st


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: layer_map(*m, keep), InputError, "f must be a function f(layer, ps, st, path)"),
        (lambda m: layer_map(keep, m[1], m[0], m[2]), InputError, "The order is layer_map(f, layer, ps, st)"),
        (lambda m: layer_map(keep, m[0], m[2], m[1]), KeyNameError, "The order is layer_map(f, layer, ps, st)."),
        (lambda m: layer_map(lambda *part: part, *m), InputError, "model.layer_1: A layer can only"),
        (lambda m: layer_map(lambda *part: None, *m), InputError, "None of type NoneType"),
        (
            lambda m: layer_map(lambda layer, ps, st, path: (layer, {**ps, "wieght": 0}, st), *m),
            KeyNameError,
            "model.layer_1: The layer has no parameter 'wieght'",
        ),
        (
            lambda m: layer_map(lambda layer, ps, st, path: (layer, ps, {}), *m),
            KeyNameError,
            "model.layer_2: The tree lacks the state",
        ),
        (lambda m: get_layer(*m, "layer_6"), KeyNameError, "There is no layer 'layer_6'"),
        (lambda m: get_layer(*m, "layer_1.weight"), KeyNameError, "There is no layer 'layer_1.weight'"),
        (lambda m: get_layer(*m, 3), KeyNameError, "There is no layer '3'"),
        (
            lambda m: replace_layer(*m, "layer_2.x", lt.NoOpLayer(), {}, {}),
            KeyNameError,
            "Did you mean 'layer_2'?",
        ),
        (
            lambda m: replace_layer(*m, "layer_2", lt.Dense(2, 2), {"weight": 0}, {}),
            KeyNameError,
            "model.layer_2: The tree lacks the parameter 'bias'",
        ),
        (lambda m: replace_layer(*m, "layer_2", torch.tanh, {}, {}), InputError, "by a layer with its trees"),
    ],
)
def test_errors_say_what_to_do(model, call, error, words):
    with pytest.raises(error) as caught:
        call(model)
    assert words in str(caught.value)
