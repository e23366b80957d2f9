"""Shared parameters: one in ps, and one whatever is done to ps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.core import InputError, KeyNameError
from luxtorch.surgery._frozen import freeze
from luxtorch.surgery._layer_map import get_layer, layer_map, replace_layer
from luxtorch.surgery._shared import Shared, share_parameters, unshare_parameters

TIED = ("embed.weight", "logits.weight")


def language_model() -> lt.Layer:
    return lt.Chain(embed=lt.Embedding(7, 4), mix=lt.Dense(4, 4, torch.tanh), logits=lt.Dense(4, 7))


class TorchModel(nn.Module):
    """The same in torch, tied as torch ties."""

    def __init__(self, ps) -> None:
        super().__init__()
        self.embed, self.mix, self.logits = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.logits.weight = self.embed.weight
        self.load_state_dict({**lt.flatten_names(ps), TIED[1]: lt.flatten_names(ps)[TIED[0]]})

    def forward(self, x):
        return self.logits(torch.tanh(self.mix(self.embed(x))))


@pytest.fixture
def tied(make_key):
    layer = language_model()
    return share_parameters(layer, *lt.setup(make_key(), layer), TIED)


@pytest.fixture
def chain(make_key):
    layer = lt.Chain(*[lt.Dense(3, 3, torch.tanh)] * 4)
    return layer, *lt.setup(make_key(), layer)


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_it_trains_as_tied_weights_do_in_torch(tied, make_key, tree):
    layer, ps, st = tied
    module, ps = TorchModel(ps), tree(ps)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    opt_state = optim.setup(optim.Adam(0.05), ps)
    for _ in range(6):
        x = lt.random.randint(make_key(), (5,), 0, 7)
        target = lt.random.randint(make_key(), (5,), 0, 7)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), target).backward()
        optimizer.step()
        grads = torch.func.grad(
            lambda ps, x=x, target=target: nn.functional.cross_entropy(layer(x, ps, st)[0], target)
        )(ps)
        opt_state, ps = optim.update(opt_state, ps, grads)
    expected = dict(module.named_parameters())
    assert list(lt.flatten_names(ps)) == list(expected)
    for name, leaf in lt.flatten_names(ps).items():
        torch.testing.assert_close(leaf, expected[name].detach())
    whole = unshare_parameters(layer, ps, st)[1]
    assert torch.equal(whole["embed"]["weight"], whole["logits"]["weight"])


def saved(ps, path):
    training.save_checkpoint(path, ps)
    return training.load_checkpoint(path, tree_map(torch.zeros_like, ps))


@pytest.mark.parametrize(
    "change",
    [
        lambda ps, _: lt.ComponentVector(ps).to_dict(),
        lambda ps, _: lt.f64(ps),
        lambda ps, _: lt.to_device(ps, lt.cpu_device()),
        lambda ps, _: tree_map(torch.clone, ps),
        lambda ps, path: saved(ps, path / "checkpoint"),
        lambda ps, path: saved(lt.ComponentVector(ps), path / "checkpoint"),
        lambda ps, _: lt.unstack(lt.stack([ps, ps]))[0],
        lambda ps, _: lt.unflatten_names(lt.flatten_names(ps), like=ps),
    ],
)
def test_whatever_copies_parameters_keeps_them_shared(tied, tmp_path, change):
    layer, ps, st = tied
    copied = change(ps, tmp_path)
    assert list(lt.flatten_names(copied)) == ["embed.weight", "mix.weight", "mix.bias", "logits.bias"]
    moved = lt.unflatten_names({TIED[0]: lt.flatten_names(copied)[TIED[0]] + 1}, like=copied)
    inner = unshare_parameters(layer, moved, st)[1]
    assert torch.equal(inner["logits"]["weight"], moved["embed"]["weight"])


def test_whole_layers_and_several_places_are_shared(chain, make_key):
    layer, ps, st = share_parameters(*chain, ("layer_2", "layer_1", "layer_4"))
    assert list(lt.flatten_names(ps)) == ["layer_2.weight", "layer_2.bias", "layer_3.weight", "layer_3.bias"]
    assert lt.parameter_length(layer) == lt.parameter_length(ps) == 24
    x = lt.random.normal(make_key(), (2, 3))
    whole = chain[1]
    two = {**whole, "layer_1": whole["layer_2"], "layer_4": whole["layer_2"]}
    assert torch.equal(layer(x, ps, st)[0], chain[0](x, two, st)[0])
    # The values of the first place are the ones that stay.
    plain, back, _ = unshare_parameters(layer, ps, st)
    assert plain == chain[0] and tree_structure(back) == tree_structure(whole)
    assert all(map(torch.equal, tree_leaves(back), tree_leaves(two)))


def test_unshared_parameters_have_memory_of_their_own(tied):
    _, ps, _ = unshare_parameters(*tied)
    pointers = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(ps)]
    assert len(set(pointers)) == len(pointers) == 5


def test_groups_are_disjoint_and_several(chain):
    layer, ps, st = share_parameters(*chain, ("layer_1.weight", "layer_2.weight"), ["layer_3", "layer_4"])
    assert list(lt.flatten_names(ps)) == ["layer_1.weight", "layer_1.bias", "layer_2.bias", "layer_3.weight", "layer_3.bias"]  # fmt: skip  # noqa: E501
    again = share_parameters(layer, ps, st, ("layer_1.bias", "layer_3.bias"))
    assert unshare_parameters(*again)[0] == chain[0]


def test_a_model_is_made_with_shared_parameters(make_key, tied):
    layer = Shared(language_model(), TIED)
    assert layer == tied[0]
    ps, st = lt.setup(make_key(), layer)
    assert tree_structure((ps, st)) == tree_structure(tied[1:])
    assert "layer_3 = Dense(3 -> 3, tanh)," in repr(Shared(lt.Chain(*[lt.Dense(3, 3, torch.tanh)] * 3), ("layer_1", "layer_3")))  # fmt: skip  # noqa: E501


def test_a_change_keeps_them_shared_or_is_an_error(chain):
    shared = share_parameters(*chain, ("layer_1", "layer_3"))

    def scaled(layer, ps, st, path):
        return layer, tree_map(lambda leaf: 2 * leaf, ps), st

    layer, ps, _ = layer_map(scaled, *shared)
    assert layer == shared[0]
    assert all(map(torch.equal, tree_leaves(ps), tree_leaves(tree_map(lambda leaf: 2 * leaf, shared[1]))))

    def scaled_apart(layer, ps, st, path):
        return scaled(layer, ps, st, path) if path == "layer_3" else (layer, ps, st)

    with pytest.raises(InputError, match="'layer_1.weight' and 'layer_3.weight' are shared") as caught:
        layer_map(scaled_apart, *shared)
    assert "lt.unshare_parameters" in str(caught.value)
    with pytest.raises(InputError, match="are shared"):
        replace_layer(*shared, "layer_3", lt.NoOpLayer(), {}, {})
    changed = replace_layer(*shared, "layer_2", lt.NoOpLayer(), {}, {})
    assert list(lt.flatten_names(changed[1]))[:2] == ["layer_1.weight", "layer_1.bias"]
    assert get_layer(*shared, "layer_3")[1]["weight"] is shared[1]["layer_1"]["weight"]


@pytest.mark.parametrize(
    "groups, error, words",
    [
        ((), InputError, "no group"),
        (("layer_1", "layer_2"), InputError, "Put the paths of a group in parentheses."),
        ((("layer_1",),), InputError, "at least two"),
        ((("layer_1", None),), InputError, "at least two"),
        ((("layer_1", "layer_7"),), KeyNameError, "No parameter is named 'layer_7'"),
        ((("layer_1", "layer_1"),), InputError, "must not overlap"),
        ((("layer_1", "layer_2"), ("layer_3", "layer_2")), InputError, "'layer_2.weight' in both"),
        ((("layer_1", "layer_2.weight"),), InputError, "The parameters of 'layer_1' and 'layer_2.weight' differ."),
        ((("layer_1.bias", "layer_2.weight"),), InputError, "layer_2.weight (3, 3), torch.float32"),
    ],
)
def test_errors_say_what_is_wrong_with_the_groups(chain, groups, error, words):
    with pytest.raises(error) as caught:
        share_parameters(*chain, *groups)
    assert words in str(caught.value)


def test_errors_of_a_call_name_the_place(chain):
    layer, ps, st = share_parameters(*chain, ("layer_1", "layer_3"))
    x = torch.ones(2, 3)
    with pytest.raises(KeyNameError, match=r"model.layer_3 .*no parameter 'bias', 'weight'"):
        layer(x, chain[1], st)
    with pytest.raises(KeyNameError, match=r"model.layer_1 .*lacks the parameter 'weight'"):
        layer(x, {**ps, "layer_1": {"bias": ps["layer_1"]["bias"]}}, st)
    with pytest.raises(KeyNameError, match="No parameter is named 'layer_3.bias'"):
        freeze(layer, ps, st, "layer_3.bias")
