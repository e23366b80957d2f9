"""Many models of one kind as one layer, against the models one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_structure

import luxtorch as lt
from luxtorch import Chain, Dense, InputError, KeyNameError
from luxtorch.core import named_leaves, stack, tree_leaves, tree_map, unstack
from luxtorch.layers import Ensemble

MODEL = Chain(Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5), Dense(4, 2))

FORMS = {
    "Ensemble": (Ensemble(MODEL, 4), [(5, 3)]),
    "Ensemble of one": (Ensemble(Dense(3, 2), 1), [(5, 3), (3,)]),
    "Ensemble of functions": (Ensemble(torch.tanh, 3), [(5, 3)]),
    "Ensemble of ensembles": (Ensemble(Ensemble(Dense(3, 2), 2), 3), [(5, 3)]),
    "Ensemble in a chain": (Chain(Ensemble(Dense(3, 2, torch.sin), 4), torch.sum), [(5, 3)]),
    "Ensemble with an input each": (Ensemble(Chain(Dense(3, 2), lt.Dropout(0.5)), 4, same_input=False), [(4, 5, 3)]),
    "Ensemble of functions with an input each": (Ensemble(torch.tanh, 4, same_input=False), [(4, 5, 3)]),
    "Ensemble of a tuple": (Ensemble(lt.Parallel(torch.add, Dense(3, 2), Dense(2, 2)), 3), [((5, 3), (5, 2))]),
    "Ensemble of convolutions": (Ensemble(Chain(lt.Conv((3, 3), 2, 3), lt.GroupNorm(3, 1)), 2), [(2, 2, 4, 4)]),
    "Ensemble of recurrences": (Ensemble(lt.Recurrence(lt.LSTMCell(3, 4)), 2), [(5, 2, 3)]),
    "Ensemble of attention": (Ensemble(lt.MultiHeadAttention(4, num_heads=2), 2), [(2, 3, 4)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


@pytest.mark.parametrize("mode", [lt.train_mode, lt.test_mode])
@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("name", [name for name, (layer, _) in FORMS.items() if type(layer) is Ensemble])
def test_members_are_the_models_one_by_one(make_key, draw, name, tree, mode):
    layer, (spec, *_) = FORMS[name]
    ps, st = lt.setup(make_key(), layer)
    tree = tree if tree_leaves(ps) else dict
    x, st = draw(spec), mode(st)
    y, new = layer(x, tree(ps), st)
    members = unstack((ps, st)) if tree_leaves((ps, st)) else [({}, {})] * layer.n
    assert len(members) == layer.n
    for i, (own_ps, own_st) in enumerate(members):
        one = x if layer.same_input else tree_map(lambda leaf, i=i: leaf[i], x)
        expected, expected_st = layer.layer(one, own_ps, own_st)
        torch.testing.assert_close(tree_map(lambda leaf, i=i: leaf[i], y), expected)
        own_new = tree_map(lambda leaf, i=i: leaf[i], new)
        assert tree_structure(own_new) == tree_structure(expected_st)
        torch.testing.assert_close(tree_leaves(own_new), tree_leaves(expected_st))


def test_members_are_what_setup_makes_of_keys(make_key):
    key = make_key()
    ps = lt.initial_parameters(key, Ensemble(MODEL, 4))
    for member, own in zip(unstack(ps), lt.random.split(key, 4), strict=True):
        expected = lt.initial_parameters(own, MODEL)
        assert all(map(torch.equal, tree_leaves(member), tree_leaves(expected)))
    weights = ps["layer_1"]["weight"]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 4


def test_no_initial_tensor_shares_memory_among_members(make_key):
    for _, leaf in named_leaves(lt.setup(make_key(), Ensemble(MODEL, 4))):
        assert leaf.is_contiguous() and leaf.untyped_storage().nbytes() == leaf.nbytes


def test_each_member_drops_its_own(make_key):
    layer = Ensemble(lt.Dropout(0.5), 8)
    ps, st = lt.setup(make_key(), layer)
    y, new = layer(torch.ones(64), ps, st)
    again, _ = layer(torch.ones(64), ps, new)
    assert len({tuple(row) for row in torch.cat([y, again]).tolist()}) == 16


def test_modules_of_torch_become_an_ensemble(rng):
    """Against `torch.func.stack_module_state` and vmapped `functional_call`, which nobody here wrote."""
    modules = [nn.Linear(3, 2) for _ in range(4)]
    x = torch.randn(5, 3, generator=rng)
    ps = stack([dict(module.named_parameters()) for module in modules])
    parameters, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    call = torch.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))
    layer = Ensemble(Dense(3, 2), 4)
    y, _ = layer(x, ps, {})
    assert torch.equal(y, call(parameters, buffers, x))
    assert torch.equal(ps["weight"], parameters["weight"])


def test_it_is_trained_as_any_model(make_key):
    x = lt.random.normal(make_key(), (32, 3))
    target = x.sum(-1, keepdim=True).sin()
    model = Ensemble(Chain(Dense(3, 16, torch.tanh), Dense(16, 1)), 8)
    ps, st = lt.setup(make_key(), model)

    def loss(ps):
        return (model(x, ps, st)[0] - target).square().mean((1, 2))

    start = loss(ps)
    for _ in range(50):
        grads = torch.func.grad(lambda ps: loss(ps).sum())(ps)
        ps = tree_map(lambda leaf, grad: leaf - 0.1 * grad, ps, grads)
    assert bool((loss(ps) < start / 2).all())


def test_members_do_not_influence_each_other(make_key):
    model, x = Ensemble(MODEL, 3), lt.random.normal(make_key(), (5, 3))
    ps, st = lt.setup(make_key(), model)
    grads = torch.func.grad(lambda ps: model(x, ps, st)[0][1].square().sum())(ps)
    for _, leaf in named_leaves(grads):
        assert not leaf[0].any() and not leaf[2].any()
    assert grads["layer_1"]["weight"][1].any()


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "8", Dense(1, 1)])
def test_it_takes_a_number(n):
    with pytest.raises(InputError, match="(?s)n must be (at least 1|an integer)"):
        Ensemble(Dense(3, 2), n)


def test_errors_name_the_place(make_key):
    layer, x = Ensemble(MODEL, 4), torch.ones(5, 3)
    ps, st = lt.setup(make_key(), layer)
    one = lt.setup(make_key(), MODEL)
    with pytest.raises(InputError, match=r"model.layer_1 \(Dense 3 -> 4, tanh\)(?s:.*)\(5, 7\)"):
        layer(torch.ones(5, 7), ps, st)
    with pytest.raises(InputError, match=r"(?s)model \(Ensemble n=4\).*'layer_1.weight'.*\(4, 4, 3\).*lt.stack"):
        layer(x, *lt.setup(make_key(), Ensemble(MODEL, 3)))
    with pytest.raises(InputError, match=r"(?s)'layer_1.bias' must be a stack of 4.*\(4, 4\).*shape \(\)"):
        layer(x, {**ps, "layer_1": {**ps["layer_1"], "bias": torch.ones(())}}, st)
    with pytest.raises(InputError, match=r"(?s)state 'layer_2.running_mean'.*\(4, 4\).*\(3, 4\)"):
        layer(x, ps, lt.update_state(st, "running_mean", torch.zeros(3, 4)))
    with pytest.raises(KeyNameError, match="(?s)model.layer_2.*no parameter 'gain'"):
        layer(x, {**ps, "layer_2": {**ps["layer_2"], "gain": torch.ones(())}}, st)
    with pytest.raises(KeyNameError, match="(?s)model.layer_2.*lacks the parameter 'bias', 'weight'"):
        layer(x, {**ps, "layer_2": {}}, st)
    with pytest.raises(InputError, match=r"(?s)a stack of 4 inputs.*\(5, 3\)"):
        Ensemble(MODEL, 4, same_input=False)(x, ps, st)
    with pytest.raises(lt.LuxtorchError):
        Ensemble(MODEL, 2)(x, *one)


def test_it_prints_the_stacked_shapes():
    lines = str(Ensemble(Chain(Dense(3, 2), lt.Dropout(0.5)), 4, same_input=False)).splitlines()
    assert lines[0] == "Ensemble(n=4, same_input=False,"
    assert "32 parameters: weight (4, 2, 3), bias (4, 2)" in lines[2]
    assert lines[-1].endswith("total: 32 parameters, 8 states")
    assert lt.output_shape(Ensemble(Dense(3, 2), 4), (7, 3)) == (4, 7, 2)
