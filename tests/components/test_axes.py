"""What axes say, and that equal axes are one object."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

from luxtorch.components import Axes, ComponentVector, axes
from luxtorch.core import KeyNameError


def test_what_axes_say(tree):
    layout = axes(tree)
    assert layout.names == tuple(layout) == ("layer_1", "relu", "layer_2", "scale")
    assert layout.keys() == {"layer_1", "relu", "layer_2", "scale"}
    assert len(layout) == 4
    assert layout.size == 13
    assert layout.shapes == {"layer_1.weight": (3, 2), "layer_1.bias": (3,), "layer_2.inner.weight": (3,), "scale": ()}
    assert layout.leaf_sizes == (6, 3, 3, 1)
    assert layout.slice("layer_2") == layout.slice("layer_2.inner.weight") == slice(9, 12)
    assert layout.slice("relu") == slice(9, 9)
    assert layout["layer_1"] == axes(tree["layer_1"])
    assert layout["layer_1.weight"] == (3, 2)
    assert "layer_2.inner" in layout
    assert "layer_2.bias" not in layout


def test_equal_axes_are_one_object(tree):
    layout = axes(tree)
    assert axes(ComponentVector(tree)) is layout
    assert axes(pytree.tree_map(lambda leaf: leaf.double(), tree)) is layout
    assert pickle.loads(pickle.dumps(layout)) is layout
    assert copy.deepcopy(layout) is copy.copy(layout) is layout
    assert hash(layout) == hash(axes(tree))


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2), "a": torch.zeros(3)},
        {"a": torch.zeros(3), "b": torch.zeros(2, 1)},
        {"a": torch.zeros(3), "b": torch.zeros(2), "c": {}},
        {"a": torch.zeros(3), "b": {"c": torch.zeros(2)}},
    ],
)
def test_axes_differ_in_order_shape_and_nesting(other):
    layout = axes({"a": torch.zeros(3), "b": torch.zeros(2)})
    assert axes(other) != layout
    assert layout != "a"


def test_axes_that_nobody_uses_are_forgotten():
    import luxtorch.components._axes as module

    gc.collect()  # what other tests have left behind goes first
    before = len(module._INTERNED)
    layout = axes({"a_name_of_this_test": torch.zeros(17)})
    assert len(module._INTERNED) == before + 1
    del layout
    gc.collect()
    assert len(module._INTERNED) == before


def test_batch_dims_do_not_count():
    assert axes({"a": torch.zeros(5, 2, 3), "b": torch.zeros(5)}, batch_dims=1) is axes(
        {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    )


def test_axes_are_a_constant_in_a_pytree(cv):
    leaves, spec = pytree.tree_flatten({"axes": cv.axes, "cv": cv})
    assert len(leaves) == 1 and leaves[0] is cv.flat
    assert pytree.tree_unflatten(leaves, spec)["axes"] is cv.axes


def test_unknown_name(cv):
    with pytest.raises(KeyNameError, match="There is no component 'layer_1.wieght'") as caught:
        cv.axes["layer_1.wieght"]
    assert "Did you mean 'layer_1.weight'?" in str(caught.value)


def test_long_lists_of_names_are_cut():
    layout = axes({f"layer_{i}": torch.zeros(1) for i in range(50)})
    with pytest.raises(KeyNameError, match=r"'layer_7', \.\.\.$"):
        layout.slice("weight")


def test_repr_reads_as_the_tree():
    layout = axes({"dense": {"weight": torch.zeros(2, 3)}, "relu": {}, "scale": torch.zeros(())})
    assert repr(layout) == "Axes(dense=Axes(weight=(2, 3)), relu=Axes(), scale=())"
    assert isinstance(layout["relu"], Axes)
