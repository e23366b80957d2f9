"""The tree of a Jacobian: one block for every output and input, with names where they have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from luxtorch.components import ComponentMatrix, ComponentVector
from luxtorch.core import tree_flatten, tree_unflatten

from ._aux import Tree


def arrange(blocks: Sequence[Sequence[Tensor]], y: Tree, x: Tree) -> Tree:
    """Return the blocks as the tree of the outputs, with a tree of the inputs at each leaf.

    Args:
        blocks: The derivative of each output by each input, of shape `(*output, *input)`.
        y: The outputs.
        x: The inputs.
    """
    outputs, y_spec = tree_flatten(y, is_leaf=_is_vector)
    inputs, x_spec = tree_flatten(x, is_leaf=_is_vector)
    rows = [
        [_named(block, output, input_) for block, input_ in zip(row, inputs, strict=True)]
        for row, output in zip(blocks, outputs, strict=True)
    ]
    return tree_unflatten([tree_unflatten(row, x_spec) for row in rows], y_spec)


def _is_vector(node: Any) -> bool:
    return isinstance(node, ComponentVector)


def _named(
    block: Tensor, output: Tensor | ComponentVector, input_: Tensor | ComponentVector
) -> Tensor | ComponentVector | ComponentMatrix:
    row_axes = output.axes if isinstance(output, ComponentVector) else None
    col_axes = input_.axes if isinstance(input_, ComponentVector) else None
    inner_dims = len(input_.shape)
    if row_axes is not None and inner_dims == 0:
        return ComponentVector.from_flat(block, row_axes)
    if col_axes is not None and block.dim() == 1:
        return ComponentVector.from_flat(block, col_axes)
    # The names of the outputs lie on the rows only where the input takes up one dimension, the columns.
    if inner_dims != 1:
        row_axes = None
    if row_axes is None and col_axes is None:
        return block
    return ComponentMatrix(block, row_axes, col_axes)
