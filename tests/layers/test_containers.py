"""Containers: names, splicing, indexing, what goes where."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import Chain, Dense, InputError, Parallel, SkipConnection, WrappedFunction


def test_names_are_given_or_made():
    assert Chain(Dense(1, 2), torch.tanh, [Dense(2, 3), (Dense(3, 4),)]).names == tuple(
        f"layer_{i}" for i in range(1, 5)
    )
    assert Chain(a=Dense(1, 2), b=torch.tanh).names == ("a", "b")
    nested = Chain(Chain(Dense(1, 2)), Dense(2, 3))
    assert list(lt.setup(0, nested)[0]) == ["layer_1", "layer_2"]
    assert Chain(torch.tanh)[0] == WrappedFunction(torch.tanh)


def test_a_chain_is_a_sequence_whose_slices_keep_their_names():
    model = Chain(Dense(1, 2), Dense(2, 3), Dense(3, 4))
    assert len(model) == 3 and list(model) == [Dense(1, 2), Dense(2, 3), Dense(3, 4)]
    assert model[1] == model["layer_2"] == model.layer_2 == model[-2] == Dense(2, 3)
    assert model[1:].names == ("layer_2", "layer_3")
    ps, st = lt.setup(0, model)
    x = torch.ones(5, 1)
    head, tail = model[:1], model[1:]
    y, _ = head(x, {"layer_1": ps["layer_1"]}, {"layer_1": {}})
    part = {name: ps[name] for name in tail.names}
    assert torch.equal(tail(y, part, {name: {} for name in part})[0], model(x, ps, st)[0])
    with pytest.raises(InputError, match="'layer_9'[\\s\\S]*layer_3"):
        model["layer_9"]
    with pytest.raises(AttributeError, match="layer_22.*Did you mean 'layer_2'"):
        _ = model.layer_22
    assert not hasattr(model, "__array__")


@pytest.mark.parametrize("wrong", [3, None, Dense, "relu"])
def test_what_is_no_layer_is_refused(wrong):
    with pytest.raises(InputError, match="must be a layer"):
        Chain(Dense(1, 2), wrong)


def test_names_are_all_or_none_and_without_dots():
    with pytest.raises(InputError, match="all layers must be named, or none"):
        Chain(Dense(1, 2), b=Dense(2, 3))
    with pytest.raises(InputError, match="or contain dots"):
        Chain(**{"a.b": Dense(1, 2)})


def test_parallel_splits_tuples_and_copies_the_rest(make_key):
    model = Parallel(None, Dense(3, 2), Dense(3, 2))
    ps, st = lt.setup(make_key(), model)
    x, z = lt.random.normal(make_key(), (4, 3)), lt.random.normal(make_key(), (4, 3))
    one = [Dense(3, 2)(value, ps[name], {})[0] for value, name in ((x, "layer_1"), (x, "layer_2"), (z, "layer_2"))]
    got = model(x, ps, st)[0]
    assert isinstance(got, tuple) and torch.equal(got[0], one[0]) and torch.equal(got[1], one[1])
    assert torch.equal(model((x, z), ps, st)[0][1], one[2])
    summed = Parallel(torch.sub, Dense(3, 2), Dense(3, 2))
    assert torch.equal(summed(x, ps, st)[0], one[0] - one[1])
    with pytest.raises(InputError, match="length 2[\\s\\S]*length 3"):
        model((x, x, x), ps, st)


def test_connections_that_are_layers_get_one_tuple_and_names(make_key):
    join = Parallel(torch.mul, Dense(2, 5), Dense(2, 5))
    model = Parallel(join, a=Dense(3, 2), b=Dense(3, 2))
    ps, st = lt.setup(make_key(), model)
    assert list(ps) == ["layers", "connection"] and list(ps["layers"]) == ["a", "b"]
    x = lt.random.normal(make_key(), (4, 3))
    ys = Parallel(None, a=Dense(3, 2), b=Dense(3, 2))(x, ps["layers"], st["layers"])[0]
    assert torch.equal(model(x, ps, st)[0], join(ys, ps["connection"], st["connection"])[0])


def test_a_skip_connection_passes_output_then_input(make_key):
    model = SkipConnection(Dense(3, 3), torch.sub)
    ps, st = lt.setup(make_key(), model)
    assert list(ps) == ["weight", "bias"]
    x = lt.random.normal(make_key(), (4, 3))
    assert torch.equal(model(x, ps, st)[0], Dense(3, 3)(x, ps, {})[0] - x)
    joined = SkipConnection(Dense(3, 3), Parallel(torch.sub, lt.NoOpLayer(), lt.NoOpLayer()))
    ps, st = lt.setup(make_key(), joined)
    assert list(ps) == list(st) == ["layers", "connection"]
    assert torch.equal(joined(x, ps, st)[0], Dense(3, 3)(x, ps["layers"], {})[0] - x)


@pytest.mark.parametrize("build", [lambda: Parallel(3, Dense(1, 1)), lambda: SkipConnection(Dense(1, 1), 3)])
def test_a_connection_combines(build):
    with pytest.raises(InputError, match="connection"):
        build()
    with pytest.raises(InputError, match="at least one layer"):
        Parallel(torch.add)
