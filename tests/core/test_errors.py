"""Errors: each names the layer's path, what was expected, what came, and the fix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import luxtorch as lt
from luxtorch import (
    BatchNorm,
    Chain,
    Dense,
    DTypeError,
    InputError,
    KeyNameError,
    LayerError,
    LuxtorchError,
    Parallel,
    SkipConnection,
    WrappedFunction,
)

MODEL = Chain(
    Dense(4, 8, torch.tanh), Chain(BatchNorm(8), Dense(8, 5)), SkipConnection(Dense(5, 5), torch.add), Dense(5, 2)
)
X = torch.ones(6, 4)


@pytest.fixture
def trees():
    return copy.deepcopy(lt.setup(0, MODEL))


def failing(kind, *arguments):
    with pytest.raises(kind) as info:
        MODEL(*arguments)
    assert isinstance(info.value, LuxtorchError)
    return str(info.value)


def test_a_wrong_width(trees):
    text = failing(InputError, torch.ones(6, 7), *trees)
    assert text.startswith("model.layer_1 (Dense 4 -> 8, tanh): ")
    assert "(..., 4)" in text and "(6, 7)" in text


def test_a_wrong_width_between_layers(trees):
    model = Chain(Dense(4, 8), Chain(Dense(7, 5)))
    with pytest.raises(InputError, match="^model.layer_2.layer_1 \\(Dense 7 -> 5\\)"):
        model(X, *lt.setup(0, model))


@pytest.mark.parametrize("tree", [0, 1])
def test_missing_misspelt_and_extra_names(trees, tree):
    name = ("bias", "running_var")[tree]
    target = trees[tree]["layer_2"][("layer_2", "layer_1")[tree]]
    where = ("model.layer_2.layer_2 (Dense 8 -> 5)", "model.layer_2.layer_1 (BatchNorm 8)")[tree]
    value = target.pop(name)
    text = failing(KeyNameError, X, *trees)
    assert text.startswith(where) and f"lacks the {('parameter', 'state')[tree]} '{name}'" in text
    target[name + "_"] = value
    text = failing(KeyNameError, X, *trees)
    assert text.startswith(where) and f"has no {('parameter', 'state')[tree]} '{name}_'" in text
    assert f"Did you mean '{name}'?" in text
    target[name] = value
    assert failing(KeyNameError, X, *trees).startswith(where)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_a_wrong_dtype(trees, dtype):
    text = failing(DTypeError, X.to(dtype), *trees)
    assert text.startswith("model.layer_1 (Dense 4 -> 8, tanh)")
    assert str(dtype) in text and "x.to(torch.float32)" in text


def test_a_layer_used_before_setup(trees):
    for arguments in ((X,), (X, trees[0]), (X, None, None), (X, torch.ones(3), {})):
        assert "lt.setup(0, model)" in failing(InputError, *arguments)


def test_a_parameter_of_a_wrong_shape(trees):
    trees[0]["layer_3"]["weight"] = torch.zeros(2, 2)
    text = failing(InputError, X, *trees)
    assert text.startswith("model.layer_3 (Dense 5 -> 5)") and "(5, 5)" in text and "(2, 2)" in text


def test_what_a_user_function_raises_is_located_and_kept_as_the_cause():
    def broken(x):
        return x.no_such_method()

    model = Chain(a=Dense(4, 4), b=broken)
    with pytest.raises(
        LayerError, match="^model.b \\(WrappedFunction broken\\): AttributeError.*no_such_method"
    ) as info:
        model(X, *lt.setup(0, model))
    assert isinstance(info.value.__cause__, AttributeError)


def test_other_exceptions_pass_untouched():
    class Signal(Exception):
        pass

    def signalling(x):
        raise Signal

    model = Chain(signalling)
    with pytest.raises(Signal):
        model(X, *lt.setup(0, model))


def test_equal_layers_are_told_apart_by_their_trees(make_key):
    same = Dense(4, 4)
    model = Chain(*[same] * 3, Parallel(None, same, same))
    ps, st = lt.setup(make_key(), model)
    ps["layer_4"]["layer_2"]["weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match="^model.layer_4.layer_2 "):
        model(X, ps, st)
    ps, st = lt.setup(make_key(), model)
    ps["layer_3"]["weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match="^model.layer_3 "):
        model(X, ps, st)


def test_errors_inside_transforms_are_located(trees):
    ps, st = trees

    def loss(ps, x):
        return MODEL(x, ps, st)[0].sum()

    for call in (torch.func.grad(loss), lambda ps, x: torch.vmap(lambda ps: loss(ps, x))(stacked(ps))):
        with pytest.raises(InputError, match="^model.layer_1 "):
            call(ps, torch.ones(6, 7))


def stacked(tree):
    return torch.utils._pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), tree)


def test_the_order_of_setup():
    with pytest.raises(InputError, match="lt.setup\\(rng, model\\)"):
        lt.setup(MODEL, 0)
    with pytest.raises(InputError, match="of type Linear"):
        lt.setup(0, torch.nn.Linear(2, 2))


def test_errors_pickle_with_all_they_say(trees):
    with pytest.raises(InputError) as info:
        MODEL(torch.ones(6, 7), *trees)
    assert str(pickle.loads(pickle.dumps(LuxtorchError("p", expected="e", got="g", fix="f", where="w")))) == (
        "w: p\n  expected: e\n  got:      g\n  fix:      f"
    )
    assert isinstance(info.value, ValueError) and isinstance(KeyNameError("x"), KeyError)


def test_a_wrapped_function_says_what_it_got():
    with pytest.raises(LayerError, match="float32 tensor of shape \\(6, 4\\)"):
        WrappedFunction(lambda x: x @ x)(X, {}, {})
