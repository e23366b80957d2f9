"""Named values in notebooks, with statistics of their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from luxtorch.core._html import plain
from luxtorch.core._outline import tree_html

from ._axes import Axes

if TYPE_CHECKING:
    from ._matrix import ComponentMatrix
    from ._vector import ComponentVector


def vector_html(vector: ComponentVector) -> str:
    """Return a vector as a tree of its components."""
    flat = vector.flat
    if not isinstance(flat, Tensor) or flat.shape[-1:] != (vector.axes.size,):
        return plain(repr(vector))  # a tree library has put something else in the place of the elements
    return tree_html(vector)


def matrix_html(matrix: ComponentMatrix) -> str:
    """Return a matrix as a tree of its blocks."""
    data = matrix.data
    if not isinstance(data, Tensor):
        return plain(repr(matrix))
    columns = _sides(matrix.col_axes)
    blocks = {row: {column: data[..., i, j] for column, j in columns} for row, i in _sides(matrix.row_axes)}
    return tree_html(blocks, f"ComponentMatrix of shape {tuple(data.shape)}")


def _sides(axes: Axes | None) -> list[tuple[str, slice]]:
    """Return the names at the top of a side, with the rows or columns that they cover."""
    return [(":", slice(None))] if axes is None else [(name, axes.slice(name)) for name in axes]
