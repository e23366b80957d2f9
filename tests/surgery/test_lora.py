"""Low-rank changes: what they compute, what they train, and the plain model that they become."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

import luxtorch as lt
from luxtorch import optim
from luxtorch.core import InputError, KeyNameError
from luxtorch.init import zeros
from luxtorch.surgery._frozen import freeze, unfreeze
from luxtorch.surgery._layer_map import get_layer, layer_map, replace_layer
from luxtorch.surgery._lora import LoRA, lora, merge_lora

KINDS = {
    "Dense": (lambda: lt.Dense(6, 5, torch.tanh), (3, 6), {"weight": (5, 6)}),
    "Conv": (lambda: lt.Conv((3, 2), 4, 6, groups=2), (2, 4, 5, 5), {"weight": (6, 12)}),
    "ConvTranspose": (lambda: lt.ConvTranspose((3,), 4, 2), (2, 4, 5), {"weight": (4, 6)}),
    "attention": (
        lambda: lt.MultiHeadAttention(8, 2),
        (2, 3, 8),
        {f"{name}_proj.weight": (8, 8) for name in ("q", "k", "v", "out")},
    ),
    "LSTM": (lambda: lt.Recurrence(lt.LSTMCell(3, 4)), (2, 5, 3), {"weight_ih": (16, 3), "weight_hh": (16, 4)}),
    "Sequential": (
        lambda: lt.from_torch(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5)))[0],
        (3, 6),
        {"0.weight": (5, 6)},
    ),
    "module": (lambda: lt.from_torch(nn.TransformerEncoderLayer(8, 2, 6))[0], (2, 3, 8), None),
}


def trained(layer, ps, st, make_key, shape, steps=3):
    """Return parameters after some steps."""
    opt_state = optim.setup(optim.Adam(0.1), ps)
    for _ in range(steps):
        x = lt.random.normal(make_key(), shape)
        grads = torch.func.grad(lambda ps, x=x: layer(x, ps, st)[0].square().sum())(ps)
        opt_state, ps = optim.update(opt_state, ps, grads)
    return ps


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_model_trains_its_factors_and_merges_into_the_same(make_key, kind, tree):
    make, shape, matrices = KINDS[kind]
    layer = make()
    ps, st = lt.setup(make_key(), layer)
    st, x = lt.test_mode(st), lt.random.normal(make_key(), shape)
    adapted, few, new = lora(layer, tree(ps), st, rng=make_key(), rank=2, alpha=3.0)
    torch.testing.assert_close(adapted(x, few, new)[0], layer(x, ps, st)[0], rtol=0, atol=0)
    leaves = lt.flatten_names(few)
    for name, (rows, columns) in (matrices or {}).items():
        assert leaves[f"{name}.lora_A"].shape == (2, columns) and leaves[f"{name}.lora_B"].shape == (rows, 2)
    assert not matrices or len(leaves) == 2 * len(matrices)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in leaves)
    assert not any(leaf.any() for name, leaf in leaves.items() if name.endswith("_B"))

    few = trained(adapted, few, new, make_key, shape)
    plain, merged, plain_st = merge_lora(adapted, few, new)
    assert plain == layer and tree_structure((merged, plain_st)) == tree_structure((tree(ps), st))
    torch.testing.assert_close(plain(x, merged, plain_st)[0], adapted(x, few, new)[0])
    # What has changed is of low rank; what was frozen has not changed.
    before = lt.flatten_names(ps)
    for name, leaf in lt.flatten_names(merged).items():
        if f"{name}.lora_A" not in leaves:
            assert torch.equal(leaf, before[name])
            continue
        change = (leaf - before[name]).flatten(1)
        assert change.abs().max() > 0.01 and torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
        parts = lt.flatten_names(few)
        expected = 3.0 / 2 * (parts[f"{name}.lora_B"] @ parts[f"{name}.lora_A"])
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


def test_the_numbers_are_those_of_the_paper(make_key):
    layer = lt.Dense(6, 5)
    ps, st = lt.setup(make_key(), layer)
    adapted, few, st = lora(layer, ps, st, rng=make_key(), rank=3, alpha=6.0, init_weight=lt.init.normal(std=1.0))
    few = tree_map(lambda leaf: lt.random.normal(make_key(), leaf.shape), few)
    x = lt.random.normal(make_key(), (4, 6))
    a, b = few["weight"]["lora_A"], few["weight"]["lora_B"]
    expected = F.linear(x, ps["weight"], ps["bias"]) + 2.0 * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(adapted(x, few, st)[0], expected)


def test_the_first_factor_is_drawn_from_the_key_alone(make_key):
    layer = lt.Chain(lt.Dense(300, 50), lt.Dense(50, 300))
    ps, st = lt.setup(make_key(), layer)
    key = make_key()
    one, two, other = (lora(layer, ps, st, rng=rng)[1] for rng in (key, key, make_key()))
    assert all(map(torch.equal, tree_leaves(one), tree_leaves(two)))
    a, b = (ps["layer_1"]["weight"]["lora_A"] for ps in (one, other))
    assert not torch.equal(a, b) and not torch.equal(a[:, :50], one["layer_2"]["weight"]["lora_A"])
    assert a.std().item() == pytest.approx(300**-0.5, rel=0.05)
    doubled = lora(layer, lt.f64(ps), st, rng=key)[1]
    assert {leaf.dtype for leaf in tree_leaves(doubled)} == {torch.float64}
    constant = lora(layer, ps, st, rng=key, init_weight=zeros)[1]
    assert not any(leaf.any() for leaf in tree_leaves(constant))
    generator = torch.Generator().manual_seed(0)
    first, second = (lora(layer, ps, st, rng=generator)[1] for _ in range(2))
    assert not torch.equal(first["layer_1"]["weight"]["lora_A"], second["layer_1"]["weight"]["lora_A"])


def test_some_weights_are_adapted_and_others_trained_as_a_whole(make_key):
    layer = lt.Chain(lt.Dense(4, 4, torch.tanh), lt.Dense(4, 4, torch.tanh), lt.Dense(4, 2))
    ps, st = lt.setup(make_key(), layer)
    adapted = unfreeze(*lora(layer, ps, st, "layer_1", lambda name: name == "layer_2.weight", rng=0, rank=1), "layer_3")
    assert list(lt.flatten_names(adapted[1])) == [
        "layer_1.weight.lora_A", "layer_1.weight.lora_B", "layer_2.weight.lora_A", "layer_2.weight.lora_B",
        "layer_3.weight", "layer_3.bias",
    ]  # fmt: skip
    few = trained(*adapted, make_key, (5, 4))
    plain, merged, _ = merge_lora(adapted[0], few, adapted[2])
    assert plain == layer and torch.equal(merged["layer_3"]["bias"], few["layer_3"]["bias"])
    assert torch.equal(merged["layer_1"]["bias"], ps["layer_1"]["bias"])


def test_what_was_frozen_before_is_adapted_all_the_same(make_key):
    layer = lt.Chain(lt.Dense(4, 4, torch.tanh), lt.Dense(4, 2))
    ps, st = lt.setup(make_key(), layer)
    direct, indirect = lora(layer, ps, st, rng=0), lora(*freeze(layer, ps, st, "layer_1"), rng=0)
    assert direct[0] == indirect[0]
    assert all(map(torch.equal, tree_leaves(direct[1:]), tree_leaves(indirect[1:])))


def test_a_part_of_a_model_is_adapted_by_itself(make_key):
    layer = lt.Chain(lt.Dense(4, 4, torch.tanh), lt.Dense(4, 2))
    ps, st = lt.setup(make_key(), layer)
    part = lora(*get_layer(layer, ps, st, "layer_1"), rng=0, rank=2)
    adapted = replace_layer(layer, ps, st, "layer_1", *part)
    assert list(lt.flatten_names(adapted[1]))[2:] == ["layer_2.weight", "layer_2.bias"]
    back = merge_lora(*adapted)
    assert back[0] == layer and all(map(torch.equal, tree_leaves(back[1]), tree_leaves(ps)))


def test_many_adaptations_of_one_model_at_once(make_key):
    layer = lt.Dense(4, 3)
    ps, st = lt.setup(make_key(), layer)
    keys = lt.random.split(make_key(), 5)
    adapted, _, new = lora(layer, ps, st, rng=keys[0], rank=2)
    many = torch.vmap(lambda key: lora(layer, ps, st, rng=key, rank=2)[1])(keys)
    many = tree_map(lambda leaf: leaf + 1, many)
    x = lt.random.normal(make_key(), (2, 4))
    y = torch.vmap(lambda few: adapted(x, few, new)[0])(many)
    for i, few in enumerate(lt.unstack(many)):
        torch.testing.assert_close(y[i], adapted(x, few, new)[0])


def test_a_layer_inside_is_not_changed_by_the_way(make_key):
    adapted = lora(lt.Dense(4, 3), *lt.setup(make_key(), lt.Dense(4, 3)), rng=0)
    assert layer_map(lambda *part: part[:3], *adapted)[0] == adapted[0]
    with pytest.raises(InputError, match="inside LoRA cannot be changed") as caught:
        layer_map(lambda layer, ps, st, path: (layer, {**ps}, st), *adapted)
    assert "lt.merge_lora" in str(caught.value)


LAYER = lt.Chain(lt.Dense(4, 3), lt.BatchNorm(3))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda ps, st: lora(LAYER, ps, st, "layer_3", rng=0), KeyNameError, "No parameter is named 'layer_3'"),
        (lambda ps, st: lora(LAYER, ps, st, "layer_2", rng=0), InputError, "None of the parameters is a matrix"),
        (lambda ps, st: lora(LAYER, ps, st, rng=0, rank=0), InputError, "rank must be a whole number of at least 1"),
        (lambda ps, st: lora(LAYER, ps, st, rng=0, rank=True), InputError, "a whole number of at least 1"),
        (lambda ps, st: lora(LAYER, st, ps, rng=0), KeyNameError, "lora(layer, ps, st, *paths, rng=...)"),
        (lambda ps, st: lora(LAYER, lt.stack([ps, ps]), st, rng=0), InputError, "'layer_1.weight' has the wrong shape"),
        (lambda ps, st: lora(*lora(LAYER, ps, st, rng=0), rng=0), InputError, "adapted already"),
        (lambda ps, st: merge_lora(LAYER, ps, st), InputError, "Nothing in the model is adapted"),
        (lambda ps, st: LoRA(lt.NoOpLayer()), InputError, "no parameters"),
    ],
)
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error) as caught:
        call(*lt.setup(0, LAYER))
    assert words in str(caught.value)


def test_errors_of_a_call_name_the_place(make_key):
    ps, st = lt.setup(make_key(), lt.Dense(4, 3))
    adapted, few, new = lora(lt.Dense(4, 3), ps, st, rng=0, rank=2)
    x = torch.ones(2, 4)
    with pytest.raises(KeyNameError, match=r"model.weight .*lacks the parameter 'lora_B'"):
        adapted(x, {"weight": {"lora_A": few["weight"]["lora_A"]}}, new)
    with pytest.raises(InputError, match=r"model.weight .*A parameter and a group"):
        adapted.layer(x, ps, st)
