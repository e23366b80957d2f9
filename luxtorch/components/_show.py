"""Named values as text and in notebooks, with statistics of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from luxtorch.core._describe import tree_html
from luxtorch.core._table import plain

from ._axes import Axes

# Larger leaves show their shapes alone.
_MOST_ELEMENTS = 100


def vector_text(flat: Any, axes: Axes) -> str:
    """Return a vector as a tree of its components, with the numbers of the smaller ones."""
    if not isinstance(flat, Tensor) or flat.shape[-1:] != (axes.size,):
        return f"ComponentVector({flat!r}, {axes!r})"
    batch = f", batch {tuple(flat.shape[:-1])}" if flat.dim() > 1 else ""
    lines = [f"ComponentVector of {axes.size} elements{batch} ({flat.dtype}, {flat.device})", *_lines(flat, axes, "  ")]
    return "\n".join(lines)


def _lines(flat: Tensor, axes: Axes, indent: str) -> Iterator[str]:
    for name in axes.names:
        child, part = axes[name], flat[..., axes.slice(name)]
        if isinstance(child, Axes):
            yield f"{indent}{name}" if len(child) else f"{indent}{name} (empty)"
            yield from _lines(part, child, indent + "  ")
        elif part.numel() > _MOST_ELEMENTS or part.is_meta:
            yield f"{indent}{name} {child}"
        else:
            head = f"{indent}{name} {child}: "
            yield head + str(part.detach().reshape(part.shape[:-1] + child)).replace("\n", "\n" + " " * len(head))


def matrix_text(data: Any, row_axes: Axes | None, col_axes: Axes | None) -> str:
    """Return a matrix with the names of its sides above its numbers."""
    if not isinstance(data, Tensor):
        return f"ComponentMatrix({data!r}, {row_axes!r}, {col_axes!r})"
    return "\n".join(
        [
            f"ComponentMatrix of shape {tuple(data.shape)} ({data.dtype}, {data.device})",
            f"  rows: {', '.join(row_axes) if row_axes is not None else 'no names'}",
            f"  columns: {', '.join(col_axes) if col_axes is not None else 'no names'}",
            f"  {str(data.detach()).replace(chr(10), chr(10) + '  ')}",
        ]
    )


def vector_html(vector: Any) -> str:
    """Return a vector as a tree of its components."""
    flat = vector.flat
    if not isinstance(flat, Tensor) or flat.shape[-1:] != (vector.axes.size,):
        return plain(repr(vector))  # a tree library has put something else in the place of the elements
    return tree_html(vector)


def matrix_html(data: Any, row_axes: Axes | None, col_axes: Axes | None) -> str:
    """Return a matrix as a tree of its blocks."""
    if not isinstance(data, Tensor):
        return plain(matrix_text(data, row_axes, col_axes))
    columns = _sides(col_axes)
    blocks = {row: {column: data[..., i, j] for column, j in columns} for row, i in _sides(row_axes)}
    return tree_html(blocks, f"ComponentMatrix of shape {tuple(data.shape)}")


def _sides(axes: Axes | None) -> list[tuple[str, slice]]:
    """Return the names at the top of a side, with the rows or columns that they cover."""
    return [(":", slice(None))] if axes is None else [(name, axes.slice(name)) for name in axes]
