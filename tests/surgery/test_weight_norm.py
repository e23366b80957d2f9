"""Weights taken apart into lengths and directions, in a whole model, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import luxtorch as lt
from luxtorch import optim
from luxtorch.core import InputError, KeyNameError
from luxtorch.surgery._frozen import freeze
from luxtorch.surgery._layer_map import remove_weight_norm, weight_norm
from luxtorch.surgery._shared import share_parameters

MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.LayerNorm(4), lt.Dense(4, 2))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_it_trains_as_in_torch(make_key, dim):
    ps, st = lt.f64(lt.setup(make_key(), MODEL))
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter, leaf in zip(module.parameters(), tree_leaves(ps), strict=True):
            parameter.copy_(leaf)
    for number in (0, 3):
        parametrizations.weight_norm(module[number], dim=dim)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    layer, ps, st = weight_norm(MODEL, ps, st, dim=dim)
    opt_state = optim.setup(optim.Descent(0.1), ps)
    for _ in range(4):
        x = lt.random.normal(make_key(), (5, 3), dtype=torch.float64)
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
        grads = torch.func.grad(lambda ps, x=x: layer(x, ps, st)[0].square().sum())(ps)
        opt_state, ps = optim.update(opt_state, ps, grads)
    plain, whole, _ = remove_weight_norm(layer, ps, st)
    assert plain == MODEL
    for number, name in ((0, "layer_1"), (3, "layer_3")):
        torch.testing.assert_close(whole[name]["weight"], module[number].weight.detach())
        torch.testing.assert_close(ps[name]["normalized"]["weight_g"], module[number].parametrizations.weight.original0)


def test_it_is_what_the_layer_would_be(make_key):
    key = make_key()
    ps, st = lt.setup(key, MODEL)
    layer, ps, st = weight_norm(MODEL, ps, st, "layer_1", lambda name: name == "layer_3.weight", dim=None)
    expected = lt.Chain(lt.WeightNorm(MODEL[0], dim=None), MODEL[1], lt.WeightNorm(MODEL[2], dim=None))
    assert layer == expected
    leaves, others = lt.flatten_names(ps), lt.flatten_names(lt.setup(key, expected)[0])
    assert list(leaves) == list(others) and all(torch.equal(leaves[name], others[name]) for name in leaves)


class Affine(lt.ContainerLayer):
    """A container with a parameter of its own."""

    inner: lt.Dense

    def initial_parameters(self, key):
        return {**super().initial_parameters(key), "weight": lt.random.normal(key, (3, 3))}

    def __call__(self, x, ps, st):
        y, inner = self.inner(x @ ps["weight"], ps["inner"], st["inner"])
        return y, {"inner": inner}


def test_a_containers_own_parameter_is_for_the_container(make_key):
    layer = Affine(lt.Dense(3, 3))
    ps, st = lt.setup(make_key(), layer)
    changed, new, _ = weight_norm(layer, ps, st, "inner")
    assert changed.inner == lt.WeightNorm(lt.Dense(3, 3)) and new["weight"] is ps["weight"]
    with pytest.raises(InputError, match="'weight' is not the parameter of a layer that can be wrapped"):
        weight_norm(layer, ps, st)


def zeros(ps, st):
    return weight_norm(MODEL, lt.unflatten_names({"layer_3.weight": torch.zeros(2, 4)}, like=ps), st)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda ps, st: weight_norm(MODEL, ps, st, "layer_9"), KeyNameError, "No parameter is named 'layer_9'"),
        (lambda ps, st: weight_norm(MODEL, ps, st, "layer_1.bias"), InputError, "None of the parameters is a matrix"),
        (zeros, InputError, "model.layer_3: The initial value of 'weight'"),
        (lambda ps, st: weight_norm(MODEL, ps, st, dim=2), InputError, "must be from -2 to 1"),
        (lambda ps, st: weight_norm(MODEL, lt.stack([ps, ps]), st), InputError, "has the wrong shape"),
        (
            lambda ps, st: weight_norm(*freeze(MODEL, ps, st, "layer_1.bias")),
            InputError,
            "'layer_1.bias' would be lost",
        ),
        (
            lambda ps, st: weight_norm(*share_parameters(MODEL, ps, st, ("layer_1.bias", "layer_2.bias"))),
            InputError,
            "'layer_1.bias' and 'layer_2.bias' are shared",
        ),
    ],
)
def test_errors_say_what_to_do(make_key, call, error, words):
    with pytest.raises(error) as caught:
        call(*lt.setup(make_key(), MODEL))
    assert words in str(caught.value)


def test_what_is_frozen_or_shared_elsewhere_is_in_nobodys_way(make_key):
    triple = freeze(MODEL, *lt.setup(make_key(), MODEL), "layer_1")
    layer, ps, st = weight_norm(*triple, "layer_3")
    assert list(lt.flatten_names(st["frozen_params"])) == ["layer_1.weight", "layer_1.bias"]
    assert list(ps["layer_3"]) == ["normalized", "unnormalized"] and remove_weight_norm(layer, ps, st)[0] == triple[0]
