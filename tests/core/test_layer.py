"""Layers as values, containers, wrappers, and setting up."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import luxtorch as lt
from luxtorch import Chain, ContainerLayer, Dense, Dropout, InputError, Layer, WrapperLayer
from luxtorch.core import named_leaves, tree_leaves


class Affine(Layer):
    """A layer of a third party, written against the core alone."""

    size: int
    gain: float = 2.0

    def initial_parameters(self, key):
        return {"shift": lt.random.normal(key, (self.size,))}

    def __call__(self, x, ps, st):
        return self.gain * x + ps["shift"], st


class Pair(ContainerLayer):
    """A container of a third party."""

    first: Layer
    second: Layer
    depth: int = 1

    def __call__(self, x, ps, st):
        y, st_first = self.first(x, ps["first"], st["first"])
        z, st_second = self.second(y, ps["second"], st["second"])
        return z, {"first": st_first, "second": st_second}


class Doubled(WrapperLayer):
    """A wrapper of a third party."""

    layer: Layer

    def __call__(self, x, ps, st):
        y, st = self.layer(x, ps, st)
        return 2 * y, st


class Plain(WrapperLayer):
    """A wrapper that changes nothing."""

    layer: Layer


def names(tree):
    return [name for name, _ in named_leaves(tree)]


def test_a_layer_is_a_frozen_value():
    layer = Affine(3)
    assert layer == Affine(3, gain=2.0) and hash(layer) == hash(Affine(3)) and layer != Affine(4)
    assert layer != lt.Scale(3) and layer != 3  # of another class
    assert pickle.loads(pickle.dumps(layer)) == layer
    assert dataclasses.replace(layer, gain=1.0) == Affine(3, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.size = 4
    with pytest.raises(TypeError, match="abstract"):
        Layer()


@pytest.mark.parametrize(
    "layer", [Affine(3), Pair(Dense(3, 3), Affine(3)), Doubled(Pair(Dense(3, 3), Dropout(0.5))), Plain(Affine(3))]
)
def test_third_party_layers_keep_the_laws(make_key, layer):
    lt.testing.check_layer(layer, lt.random.normal(make_key(), (4, 3)), rng=make_key())


def test_containers_nest_and_wrappers_do_not():
    inner = Pair(Dense(3, 3), Dropout(0.5))
    ps, state = lt.setup(0, inner)
    assert names(ps) == ["first.weight", "first.bias"] and list(state) == ["first", "second"]
    wrapped_ps, wrapped_state = lt.setup(0, Doubled(inner))
    assert names(wrapped_ps) == names(ps) and names(wrapped_state) == names(state)
    assert torch.equal(wrapped_ps["first"]["weight"], ps["first"]["weight"])
    x = torch.ones(2, 3)
    assert torch.equal(Doubled(inner)(x, ps, state)[0], 2 * inner(x, ps, state)[0])
    assert torch.equal(Plain(inner)(x, ps, state)[0], inner(x, ps, state)[0])


def test_a_wrapper_holds_one_layer():
    class Two(WrapperLayer):
        first: Layer
        second: Layer

    with pytest.raises(InputError, match="wrapper[\\s\\S]*2 of them[\\s\\S]*ContainerLayer"):
        lt.setup(0, Two(Dense(1, 1), Dense(1, 1)))


def test_a_layers_initial_values_depend_on_its_path_alone():
    ps, _ = lt.setup(0, Chain(a=Dense(3, 3), b=Dense(3, 3)))
    more, _ = lt.setup(0, Chain(z=Dense(2, 3), a=Dense(3, 3), c=Dense(3, 3), b=Dense(3, 3)))
    assert torch.equal(ps["a"]["weight"], more["a"]["weight"])
    assert torch.equal(ps["b"]["weight"], more["b"]["weight"])
    assert not torch.equal(ps["a"]["weight"], ps["b"]["weight"])


def test_setup_takes_a_seed_a_key_or_a_generator(rng):
    model = Chain(Dense(3, 3), Dropout(0.5))
    seeded, keyed = lt.setup(5, model), lt.setup(lt.random.key(5), model)
    for a, b in zip(tree_leaves(seeded), tree_leaves(keyed), strict=True):
        assert torch.equal(a, b)
    first, second = lt.setup(rng, model)[0], lt.setup(rng, model)[0]
    assert not torch.equal(first["layer_1"]["weight"], second["layer_1"]["weight"])
    assert torch.equal(lt.initial_parameters(5, model)["layer_1"]["weight"], seeded[0]["layer_1"]["weight"])
    assert torch.equal(lt.initial_states(5, model)["layer_2"]["rng"], seeded[1]["layer_2"]["rng"])


def test_an_ensemble_is_set_up_by_vmap(make_key):
    model, keys = Chain(Dense(3, 2), lt.BatchNorm(2), Dropout(0.5)), lt.random.split(make_key(), 16)
    got = torch.vmap(lambda key: lt.setup(key, model))(keys)
    for i, key in enumerate(keys):
        for a, b in zip(tree_leaves(got), tree_leaves(lt.setup(key, model)), strict=True):
            assert torch.equal(a[i], b)
    for drawn in (got[0]["layer_1"]["weight"], got[1]["layer_3"]["rng"]):
        assert len({tuple(model.flatten().tolist()) for model in drawn}) == 16


def test_an_ensemble_is_set_up_in_a_compiled_function(make_key):
    model, keys = Chain(Dense(3, 2), lt.BatchNorm(2), Dropout(0.5)), lt.random.split(make_key(), 3)
    many = torch.vmap(lambda key: lt.setup(key, model))
    got = torch.compile(many, fullgraph=True, backend="aot_eager")(keys)
    for a, b in zip(tree_leaves(got), tree_leaves(many(keys)), strict=True):
        torch.testing.assert_close(a, b)


def test_setup_works_on_every_device(device):
    ps, state = lt.setup(lt.random.key(0, device=device), Chain(Dense(3, 2), lt.BatchNorm(2), Dropout(0.5)))
    assert {leaf.device for leaf in tree_leaves((ps, state))} == {lt.random.key(0, device=device).device}


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.booleans())
def test_lengths_and_shapes_are_found_without_computing(sizes, norm):
    layers = [
        layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (Dense(a, b), lt.BatchNorm(b))[: 1 + norm]
    ]
    model = Chain(*layers)
    ps, state = lt.setup(0, model)
    assert lt.parameter_length(model) == lt.parameter_length(ps) == sum(leaf.numel() for leaf in tree_leaves(ps))
    assert lt.state_length(model) == lt.state_length(state) == sum(leaf.numel() for leaf in tree_leaves(state))
    x = torch.ones(7, sizes[0])
    assert lt.output_shape(model, (7, sizes[0])) == lt.output_shape(model, x) == model(x, ps, state)[0].shape


def test_output_shape_of_a_tree_is_a_tree():
    model = lt.Parallel(None, Dense(3, 2), Dense(4, 5))
    assert lt.output_shape(model, (torch.ones(7, 3), torch.ones(7, 4))) == ((7, 2), (7, 5))


def test_apply_and_stateless_apply(make_key):
    model, x = Chain(Dense(3, 2), Doubled(Dense(2, 2))), lt.random.normal(make_key(), (4, 3))
    ps, state = lt.setup(make_key(), model)
    expected = model(x, ps, state)[0]
    assert torch.equal(lt.apply(model, x, ps, state)[0], expected)
    assert torch.equal(lt.stateless_apply(model, x, ps), expected)
    compiled = torch.compile(lambda x, ps: lt.stateless_apply(model, x, ps), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ps), expected)
    with pytest.raises(InputError, match="without states[\\s\\S]*Dropout"):
        lt.stateless_apply(Chain(Dense(3, 2), Dropout(0.5)), x, ps)


def test_printing_shows_shapes_counts_runs_and_totals():
    model = Chain(Dense(2, 8, torch.tanh), *[Dense(8, 8)] * 3, Doubled(lt.BatchNorm(8)), a_function)
    assert str(model) == repr(model)
    lines = [line.split() for line in str(model).splitlines()]
    assert lines[2][:5] == ["layer_(2-4)", "=", "Dense(8", "->", "8),"] and lines[2][5:9] == ["#", "3", "x", "72"]
    assert lines[3] == ["layer_5", "=", "Doubled("]
    assert "a_function" in str(model)
    assert lines[-1] == f") # total: {24 + 3 * 72 + 16} parameters, 17 states".split()
    assert str(Dense(2, 8)) == "Dense(2 -> 8)    # 24 parameters: weight (8, 2), bias (8,)"
    assert "1_000_000 parameters" in str(Dense(1000, 1000, bias=False))


def a_function(x):
    return x
