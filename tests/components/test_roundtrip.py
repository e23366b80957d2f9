"""From random trees to flat vectors and back, bit for bit."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad

from luxtorch.components import ComponentVector, axes, label_to_index, labels

NAMES = st.text(st.characters(exclude_characters=".[]", exclude_categories=["Cs"]), min_size=1, max_size=4)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
SHAPE_TREES = st.recursive(SHAPES, lambda child: st.dictionaries(NAMES, child, max_size=3), max_leaves=8)
TREES_OF_SHAPES = st.dictionaries(NAMES, SHAPE_TREES, max_size=4)
BATCHES = st.sampled_from([(), (2,), (0,), (2, 3)])


def fill(shapes, batch=(), start=0.0):
    """Return a tree of tensors that are all different numbers."""
    tree, count = {}, start
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            tree[name], count = fill(shape, batch, count)
        else:
            size = prod(batch) * prod(shape)
            tree[name] = torch.arange(count, count + size, dtype=torch.float64).reshape((*batch, *shape))
            count += size
    return tree, count


def leaves_of(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def assert_same(tree, other):
    assert list(tree) == list(other)
    for name, value in tree.items():
        if isinstance(value, dict):
            assert_same(value, other[name])
        else:
            assert value.shape == other[name].shape
            assert torch.equal(value, other[name])


@settings(deadline=None, max_examples=150)
@given(shapes=TREES_OF_SHAPES, batch=BATCHES)
def test_tree_to_vector_to_tree(shapes, batch):
    tree, _ = fill(shapes, batch)
    cv = ComponentVector(tree, batch_dims=len(batch))
    found = list(leaves_of(tree))
    assert_same(tree, cv.to_dict())
    assert [name for name, _ in found] == list(cv.axes.shapes)
    if found:
        assert torch.equal(
            cv.flat, torch.cat([leaf.reshape(*batch, prod(leaf.shape[len(batch) :])) for _, leaf in found], -1)
        )
    for name, leaf in found:
        assert torch.equal(cv[name], leaf)
        assert torch.equal(cv.flat[..., cv.axes.slice(name)].reshape(leaf.shape), leaf)


@settings(deadline=None, max_examples=50)
@given(shapes=TREES_OF_SHAPES)
def test_from_flat_shares_and_equals(shapes):
    cv = ComponentVector(fill(shapes)[0])
    again = ComponentVector.from_flat(cv.flat, cv.axes)
    assert again.flat is cv.flat
    assert_same(cv.to_dict(), again.to_dict())
    assert axes(cv.to_dict()) is cv.axes


@settings(deadline=None, max_examples=50)
@given(shapes=TREES_OF_SHAPES)
def test_labels_and_indices_are_inverse(shapes):
    cv = ComponentVector(fill(shapes)[0])
    names = labels(cv)
    assert len(names) == cv.axes.size
    for i, name in enumerate(names):
        index = label_to_index(cv, name)
        assert torch.equal(cv.flat[index].reshape(()), cv.flat[i])


@settings(deadline=None, max_examples=30)
@given(shapes=TREES_OF_SHAPES)
def test_gradient_lands_in_the_right_places(shapes):
    cv = ComponentVector(fill(shapes)[0])

    def weighted(cv):
        return sum(((i + 1) * leaf.sum() for i, (_, leaf) in enumerate(leaves_of(cv.to_dict()))), cv.flat.sum() * 0)

    grads = grad(weighted)(cv)
    assert grads.axes is cv.axes
    for i, (name, leaf) in enumerate(leaves_of(grads.to_dict())):
        assert torch.equal(leaf, torch.full_like(leaf, i + 1)), name


@pytest.mark.parametrize("seq", [list, tuple])
def test_lists_and_tuples_become_numbered_groups(seq):
    tree = {"layers": seq([{"w": torch.ones(2)}, {}, torch.zeros(1)])}
    cv = ComponentVector(tree)
    assert cv["layers"].keys() == {"0", "1", "2"}
    assert torch.equal(cv["layers.0.w"], torch.ones(2))
    assert list(cv.to_dict()["layers"]) == ["0", "1", "2"]


def test_a_vector_among_the_leaves_is_a_group(cv):
    both = ComponentVector({"a": cv, "b": torch.ones(2)})
    assert both.axes["a"] is cv.axes
    assert torch.equal(both["a"].flat, cv.flat)
    assert torch.equal(ComponentVector(cv).flat, cv.flat)
    assert ComponentVector(cv).flat.data_ptr() != cv.flat.data_ptr()
