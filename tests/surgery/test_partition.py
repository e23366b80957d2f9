"""Parts of trees: disjoint, complete, and put together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.utils._pytree import tree_structure

import luxtorch as lt
from luxtorch.core import DTypeError, InputError, KeyNameError
from luxtorch.surgery._partition import combine, partition

NAMES = some.sampled_from(["a", "b", "weight", "bias"])
LEAVES = some.builds(torch.full, some.just((2,)), some.floats(-9, 9))
TREES = some.dictionaries(
    NAMES,
    some.recursive(LEAVES, lambda entry: some.dictionaries(NAMES, entry, max_size=3), max_leaves=8),
    min_size=1,
    max_size=4,
).filter(lt.flatten_names)


@given(TREES, some.data())
def test_parts_are_disjoint_and_complete(tree, data):
    names = list(lt.flatten_names(tree))
    number = {name: data.draw(some.integers(0, 2), label=name) for name in names}
    used = sorted(set(number.values()) - {2})
    paths = [lambda name, i=i: number[name] == i for i in used] or [lambda name: True]
    parts = partition(tree, *paths)
    assert len(parts) == len(paths) + 1
    for part, i in zip(parts, [*(used or [2]), 2 if used else None], strict=True):
        assert list(lt.flatten_names(part)) == [name for name in names if number[name] == i]
    order = data.draw(some.permutations(parts))
    whole = combine(*order, like=tree)
    assert tree_structure(whole) == tree_structure(tree)
    assert all(leaf is lt.flatten_names(tree)[name] for name, leaf in lt.flatten_names(whole).items())
    assert set(lt.flatten_names(combine(*order))) == set(names)


@pytest.fixture
def model(make_key):
    layer = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5), lt.Dense(4, 2))
    return layer, *lt.setup(make_key(), layer)


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_a_gradient_by_one_part_is_a_part_of_the_gradient(model, make_key, tree):
    layer, ps, st = model
    ps, x = tree(ps), lt.random.normal(make_key(), (5, 3))
    parts = partition(ps, "layer_4", lambda name: name == "layer_1.bias")
    assert all(isinstance(part, tree) for part in parts)

    def loss(ps):
        return layer(x, ps, st)[0].square().sum()

    full = lt.flatten_names(torch.func.grad(loss)(ps))
    for i, part in enumerate(parts):
        grads = torch.func.grad(lambda part, i=i: loss(combine(*parts[:i], part, *parts[i + 1 :], like=ps)))(part)
        assert list(lt.flatten_names(grads)) == list(lt.flatten_names(part))
        for name, grad in lt.flatten_names(grads).items():
            torch.testing.assert_close(grad, full[name])


@pytest.mark.slow
@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_parts_are_made_and_combined_in_a_compiled_function(model, tree):
    def halved(ps):
        biases, rest = partition(ps, lambda name: name.endswith("bias"))
        return combine(lt.core.tree_map(lambda leaf: leaf / 2, biases), rest, like=ps)

    ps = tree(model[1])
    whole = torch.compile(halved, fullgraph=True, backend="aot_eager")(ps)
    assert tree_structure(whole) == tree_structure(ps)
    for name, leaf in lt.flatten_names(ps).items():
        expected = leaf / 2 if name.endswith("bias") else leaf
        assert torch.equal(lt.flatten_names(whole)[name], expected)


def test_batched_vectors_are_divided_too(model):
    layer, ps, _ = model
    batch = lt.stack([lt.ComponentVector(ps), lt.ComponentVector(ps)])
    head, rest = partition(batch, "layer_4")
    assert head["layer_4"].weight.shape == (2, 2, 4) and head.shape == (2, 10)
    whole = combine(head, rest, like=batch)
    assert whole.axes == batch.axes and torch.equal(whole.flat, batch.flat)


def test_states_are_divided_and_modes_belong_to_the_rest(model):
    _, _, st = model
    averages, rest = partition(st, lambda name: "running" in name)
    assert averages["layer_2"].keys() == {"running_mean", "running_var"} and averages["layer_3"] == {}
    assert rest["layer_2"].keys() == {"num_batches_tracked", "training"}
    assert tree_structure(combine(averages, rest, like=st)) == tree_structure(st)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda ps: partition(ps), InputError, "partition needs at least one path"),
        (lambda ps: partition("layer_1", ps), DTypeError, "Paths come after the tree"),
        (lambda ps: partition(ps, "layer_9"), KeyNameError, "No tensor is named 'layer_9'"),
        (lambda ps: partition(ps, "layer_1", "layer_1.bias"), InputError, "layer_1.bias: A tensor belongs to two"),
        (lambda ps: combine(), InputError, "combine needs at least one tree"),
        (lambda ps: combine(ps, None), DTypeError, "None of type NoneType"),
        (lambda ps: combine(ps, {"layer_1": {"bias": 0}}), InputError, "'layer_1.bias' stands in two"),
        (lambda ps: combine(ps, {"layer_1": 0}), InputError, "'layer_1' stands in two"),
    ],
)
def test_errors_say_what_to_do(model, call, error, words):
    with pytest.raises(error) as caught:
        call(model[1])
    assert words in str(caught.value)
