"""Frozen parameters: no optimizer moves them, and the rest trains as if they were constants."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.core import InputError, KeyNameError
from luxtorch.surgery._frozen import Frozen, freeze, unfreeze
from luxtorch.surgery._layer_map import layer_map

COMPOSED = {
    "AccumGrad": optim.OptimiserChain(optim.AccumGrad(2), optim.Adam()),
    "ClipGrad": optim.OptimiserChain(optim.ClipGrad(1.0), optim.Adam()),
    "ClipNorm": optim.OptimiserChain(optim.ClipNorm(1.0), optim.Adam()),
    "SignDecay": optim.OptimiserChain(optim.SignDecay(), optim.Adam()),
    "WeightDecay": optim.OptimiserChain(optim.WeightDecay(), optim.Adam()),
    "OptimiserChain": optim.OptimiserChain(optim.ClipGrad(1.0), optim.Momentum()),
    "MixedPrecision": optim.MixedPrecision(optim.Adam()),
    "Muon": optim.Groups({"layer_3.weight": optim.Muon(), "layer_4.weight": optim.Muon()}, rest=optim.AdamW()),
    "Groups": optim.Groups({"layer_4": optim.Descent()}, rest=optim.Adam()),
}
SIMPLE = {
    name: rule()
    for name, rule in vars(optim).items()
    if inspect.isclass(rule) and issubclass(rule, optim.Rule) and rule.hyperparameters and name not in COMPOSED
}
RULES = SIMPLE | COMPOSED
FROZEN = ("layer_1", "layer_4.bias")


@pytest.fixture
def model(make_key):
    layer = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dense(4, 4, torch.tanh), lt.Dense(4, 2))
    return layer, *lt.setup(make_key(), layer)


@pytest.fixture
def x(make_key):
    return lt.random.normal(make_key(), (5, 3))


def loss(layer, x, ps, st):
    y, st = layer(x, ps, st)
    return (y**2).sum() + y.sum(), st


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("rule", RULES)
def test_no_rule_moves_what_is_frozen_and_each_moves_the_rest(model, x, rule, tree):
    layer, ps, st = freeze(*model, *FROZEN)
    start, frozen, ps = lt.flatten_names(ps), lt.flatten_names(st["frozen_params"]), tree(ps)
    opt_state = optim.setup(RULES[rule], ps)
    for _ in range(4):
        grads, st = torch.func.grad(partial(loss, layer, x), has_aux=True)(ps, st)
        opt_state, ps = optim.update(opt_state, ps, grads, value=torch.tensor(1.0), hessian=ps)
    kept = lt.flatten_names(st["frozen_params"])
    assert list(kept) == ["layer_1.weight", "layer_1.bias", "layer_4.bias"]
    assert all(torch.equal(kept[name], leaf) for name, leaf in frozen.items())
    moved = lt.flatten_names(ps)
    assert list(moved) == list(start) and not any(torch.equal(moved[name], leaf) for name, leaf in start.items())

    plain, whole, _ = unfreeze(layer, ps, st)
    assert plain == model[0]
    assert all(torch.equal(lt.flatten_names(whole)[name], leaf) for name, leaf in {**frozen, **moved}.items())


@pytest.mark.parametrize(
    "rule, reference",
    [
        (optim.Descent(0.1), partial(torch.optim.SGD, lr=0.1)),
        (optim.AdamW(0.1, weight_decay=0.3), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)),
    ],
)
def test_the_rest_trains_as_in_torch(make_key, rule, reference):
    layer = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))
    ps, st = lt.setup(make_key(), layer)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter, leaf in zip(module.parameters(), tree_leaves(ps), strict=True):
            parameter.copy_(leaf)
    module[0].requires_grad_(False)
    optimizer = reference([parameter for parameter in module.parameters() if parameter.requires_grad])
    layer, ps, st = freeze(layer, ps, st, "layer_1")
    opt_state = optim.setup(rule, ps)
    for _ in range(5):
        x = lt.random.normal(make_key(), (6, 3))
        optimizer.zero_grad()
        (module(x) ** 2).sum().backward()
        optimizer.step()
        grads = torch.func.grad(lambda ps, x=x: (layer(x, ps, st)[0] ** 2).sum())(ps)
        opt_state, ps = optim.update(opt_state, ps, grads)
    whole = unfreeze(layer, ps, st)[1]
    for parameter, leaf in zip(module.parameters(), tree_leaves(whole), strict=True):
        torch.testing.assert_close(leaf, parameter.detach())


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_steps_leave_frozen_parameters_to_the_bit(model, x, compiled, donate):
    layer, ps, st = freeze(*model, *FROZEN)
    before = tree_map(torch.clone, st["frozen_params"])
    ts = training.TrainState(layer, ps, st, optim.Adam(0.1))

    def objective(layer, ps, st, x):
        value, st = loss(layer, x, ps, st)
        return value, st, ()

    def step(ts, x):
        return training.single_train_step(objective, x, ts, donate=donate)

    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    for _ in range(3):
        ts = step(ts, x)[-1]
    assert all(map(torch.equal, tree_leaves(ts.states["frozen_params"]), tree_leaves(before)))
    assert not torch.equal(ts.states["layer_2"]["running_mean"], model[2]["layer_2"]["running_mean"])


def test_it_trains_as_with_frozen_optimizer_leaves(model, x):
    full = model[1:]
    layer, ps, st = freeze(*model, *FROZEN)
    frozen = optim.setup(optim.Adam(0.1), full[0])
    for path in FROZEN:
        frozen = optim.freeze(frozen, path)
    some = optim.setup(optim.Adam(0.1), ps)
    for _ in range(3):
        grads, new = torch.func.grad(partial(loss, model[0], x), has_aux=True)(*full)
        frozen, full_ps = optim.update(frozen, full[0], grads)
        full = full_ps, new
        grads, st = torch.func.grad(partial(loss, layer, x), has_aux=True)(ps, st)
        some, ps = optim.update(some, ps, grads)
    back = unfreeze(layer, ps, st)[1:]
    assert tree_structure(back) == tree_structure(full)
    torch.testing.assert_close(tree_leaves(back), tree_leaves(full), rtol=0, atol=0)


def test_frozen_parameters_stay_on_the_tape_and_keep_no_vector_alive(model):
    ps = lt.ComponentVector(model[1])
    ps = lt.ComponentVector.from_flat(ps.flat.requires_grad_(), ps.axes)
    layer, rest, st = freeze(model[0], ps, model[2], "layer_1")
    assert rest.requires_grad
    for leaf in tree_leaves(st["frozen_params"]):
        assert leaf.requires_grad and leaf.untyped_storage().nbytes() == leaf.numel() * 4


@pytest.mark.parametrize("inside", [lambda layer: layer, lambda layer: lt.Ensemble(layer, 3), lt.Checkpointed])
def test_a_layer_is_frozen_where_the_model_is_made(make_key, inside, x):
    backbone = Frozen(lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4)), lambda name: name == "layer_1.weight")
    layer = inside(lt.Chain(backbone, lt.Dense(4, 2)))
    ps, st = lt.setup(make_key(), layer)
    assert list(lt.flatten_names(ps))[:2] == ["layer_1.layer_1.bias", "layer_1.layer_2.weight"]
    assert "layer_1.frozen_params.layer_1.weight" in lt.flatten_names(st)
    plain, whole, plain_st = unfreeze(layer, ps, st)
    assert plain == inside(lt.Chain(backbone.layer, lt.Dense(4, 2)))
    torch.testing.assert_close(layer(x, ps, st)[0], plain(x, whole, plain_st)[0])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_parameters_keep_their_digits_in_another_precision(make_key, x, compiled):
    layer = lt.AlternatePrecision(torch.bfloat16, Frozen(lt.Dense(3, 4), "weight"))
    ps, st = lt.setup(make_key(), layer)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    _, new = call(x, ps, st)
    assert torch.equal(new["frozen_params"]["weight"], st["frozen_params"]["weight"])


def test_some_are_made_trainable_again(model):
    layer, ps, st = freeze(*model)
    assert not tree_leaves(ps) and list(ps) == list(model[1])
    layer, ps, st = unfreeze(layer, ps, st, "layer_3", lambda name: name == "layer_1.bias")
    assert list(lt.flatten_names(ps)) == ["layer_1.bias", "layer_3.weight", "layer_3.bias"]
    assert layer == freeze(*model, "layer_1.weight", "layer_2", "layer_4")[0]


def test_freezing_in_steps_is_freezing_at_once(model):
    once, twice = freeze(*model, *FROZEN), freeze(*freeze(*freeze(*model, FROZEN[1]), FROZEN[0]), FROZEN[0])
    assert once[0] == twice[0] and tree_structure(once[1:]) == tree_structure(twice[1:])


def test_each_dense_layer_is_frozen_by_a_map(model, x):
    def change(layer, ps, st, path):
        return freeze(layer, ps, st, "weight") if isinstance(layer, lt.Dense) else (layer, ps, st)

    layer, ps, st = layer_map(change, *model)
    trained = ["layer_1.bias", "layer_2.weight", "layer_2.bias", "layer_3.bias", "layer_4.bias"]
    assert list(lt.flatten_names(ps)) == trained
    torch.testing.assert_close(layer(x, ps, st)[0], model[0](x, *model[1:])[0])
    back = unfreeze(layer, ps, st)
    assert back[0] == model[0] and tree_structure(back[1:]) == tree_structure(model[1:])


def test_a_layer_that_is_called_like_the_frozen_parameters_is_in_nobodys_way(make_key, x):
    layer = lt.Chain(frozen_params=lt.Dense(3, 4), other=lt.Dense(4, 2))
    ps, st = lt.setup(make_key(), layer)
    frozen = freeze(layer, ps, st, "frozen_params")
    assert list(frozen[2]) == ["frozen_params", "other", "frozen_params_"]
    torch.testing.assert_close(frozen[0](x, *frozen[1:])[0], layer(x, ps, st)[0])
    assert tree_structure(unfreeze(*frozen)[1:]) == tree_structure((ps, st))


def test_a_layer_without_parameters_has_nothing_to_freeze():
    assert freeze(lt.NoOpLayer(), {}, {}) == (lt.NoOpLayer(), {}, {})
    assert unfreeze(lt.NoOpLayer(), {}, {}) == (lt.NoOpLayer(), {}, {})
    ps, st = lt.setup(0, Frozen(torch.tanh))
    assert (ps, st) == ({}, {"frozen_params": {}})


def test_the_layers_inside_are_read_through_it(model):
    layer = freeze(*model, "layer_1")[0]
    assert layer.layer_1 == model[0].layer_1
    assert repr(layer).splitlines()[0] == "Frozen('layer_1.weight', 'layer_1.bias',"
    with pytest.raises(AttributeError, match="layer_9"):
        layer.layer_9  # noqa: B018


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: freeze(*m, "layer_1.wieght"), KeyNameError, "Did you mean 'layer_1.weight'?"),
        (lambda m: freeze(*m, "layer_1", "head"), KeyNameError, "No parameter is named 'head'"),
        (lambda m: freeze(*m, lambda name: False), KeyNameError, "true of no parameter"),
        (lambda m: freeze(m[1], m[0], m[2]), InputError, "The order is freeze(layer, ps, st, *paths)"),
        (lambda m: freeze(m[0], m[2], m[1]), KeyNameError, "model.layer_1: The tree lacks the parameter"),
        (lambda m: freeze(m[0], {**m[1], "layer_3": 0}, m[2]), InputError, "model.layer_3: A parameter and a group"),
        (lambda m: freeze(m[0], None, m[2]), InputError, "These are not parameters"),
        (lambda m: unfreeze(*m, "layer_1"), KeyNameError, "No frozen parameter is named 'layer_1'"),
        (lambda m: unfreeze(*freeze(*m, "layer_1"), "layer_2"), KeyNameError, "expected: layer_1.weight, layer_1.bias"),
        (lambda m: Frozen(m[0], "layer_5"), KeyNameError, "No parameter is named 'layer_5'"),
    ],
)
def test_errors_say_what_to_do(model, call, error, words):
    with pytest.raises(error) as caught:
        call(model)
    assert words in str(caught.value)


def test_errors_of_a_call_name_the_place_in_the_trees_that_came(model, x):
    layer, ps, st = freeze(*model, *FROZEN)
    missing = {**st, "frozen_params": {"layer_1": st["frozen_params"]["layer_1"]}}
    with pytest.raises(KeyNameError, match="model.frozen_params .*lacks the state 'layer_4'"):
        layer(x, ps, missing)
    with pytest.raises(KeyNameError, match="model.layer_1 .*no parameter 'bias', 'weight'"):
        layer(x, model[1], st)
    with pytest.raises(InputError, match=r"model.layer_1 \(Dense 3 -> 4, tanh\): The input"):
        layer(x[:, :2], ps, st)
    with pytest.raises(InputError, match=r"model.layer_2.layer_4 \(Dense 4 -> 2\): The parameter 'weight'"):
        wrong = {**ps, "layer_4": {"weight": torch.ones(2, 5)}}
        lt.Chain(torch.tanh, layer)(x, {"layer_1": {}, "layer_2": wrong}, {"layer_1": {}, "layer_2": st})


def test_frozen_parameters_are_not_lost_in_a_change(model):
    def without_bias(layer, ps, st, path):
        return (lt.Dense(3, 4, bias=False), {"weight": ps["weight"]}, st) if path == "layer_1" else (layer, ps, st)

    with pytest.raises(InputError, match=r"'layer_1.bias' would be lost") as caught:
        layer_map(without_bias, *freeze(*model, "layer_1"))
    assert "lt.unfreeze" in str(caught.value)


@given(some.sets(some.sampled_from(range(8))), some.sets(some.sampled_from(range(8))))
def test_any_choice_is_frozen_and_thawed(frozen, thawed):
    layer = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Chain(lt.Dense(4, 4), lt.Scale(4)))
    ps, st = lt.setup(0, layer)
    names = list(lt.flatten_names(ps))
    frozen, thawed = ({names[i] for i in chosen} for chosen in (frozen, thawed))
    triple = (layer, ps, st)
    for name in frozen:  # in no order
        triple = freeze(*triple, name)
    assert list(lt.flatten_names(triple[1])) == [name for name in names if name not in frozen]
    triple = unfreeze(*triple, *(frozen & thawed)) if frozen & thawed else triple
    remaining = [name for name in names if name in frozen - thawed]
    assert triple[0] == (Frozen(layer, *remaining) if remaining else layer)
    assert tree_structure(triple[1:]) == tree_structure(lt.setup(0, triple[0]))
    back = unfreeze(*triple)
    assert tree_structure(back[1:]) == tree_structure((ps, st))
    assert all(map(torch.equal, tree_leaves(back[1:]), tree_leaves((ps, st))))


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_many_models_are_frozen_at_once(model, make_key, x, tree):
    layer, _, st = model
    many = lt.stack([tree(lt.setup(make_key(), layer)[0]) for _ in range(3)])
    states = lt.stack([st] * 3)
    frozen, rest, new = freeze(layer, many, states, *FROZEN)
    inside = torch.vmap(lambda ps, st: freeze(layer, ps, st, *FROZEN)[1:])(many, states)
    assert tree_structure(inside) == tree_structure((rest, new))
    assert all(map(torch.equal, tree_leaves(inside), tree_leaves((rest, new))))
    got = torch.vmap(frozen, in_dims=(None, 0, 0))(x, rest, new)[0]
    torch.testing.assert_close(got, torch.vmap(layer, in_dims=(None, 0, 0))(x, many, states)[0])
    back = unfreeze(frozen, rest, new)[1]
    assert tree_structure(back) == tree_structure(many)
    assert all(map(torch.equal, tree_leaves(back), tree_leaves(many)))


def test_a_frozen_model_is_looked_into_and_becomes_a_module(model, x):
    layer, ps, st = freeze(*model, *FROZEN)
    (y, inside), _ = lt.Perturbed(layer, "layer_3")((x, {}), ps, st)
    torch.testing.assert_close(y, layer(x, ps, st)[0])
    assert inside["layer_3"].shape == (5, 4)
    module = lt.to_torch(layer, ps, st)
    trainable = [name for name, value in module.named_parameters() if value.requires_grad]
    assert sorted(trainable) == sorted(lt.flatten_names(ps))
    assert {name for name, _ in module.named_parameters()} == set(lt.flatten_names(model[1]))
    assert not module.get_parameter("layer_1.weight").requires_grad
    torch.testing.assert_close(module(x), y)
    again = lt.from_torch(module)
    assert again.layer == layer
    assert set(lt.flatten_names(again.ps)) == set(lt.flatten_names(ps))
