"""A table whose lines form a tree, and how it is printed; `_html` shows the same lines in a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MANY = 60
"""How many lines are too many to show all of them at once."""


@dataclass(frozen=True)
class Line:
    """Hold a line of a table, with the lines below it.

    Attributes:
        label: What stands first.
        detail: What is said after it, less loudly.
        cells: What stands in the columns, in their order; missing ones are empty.
        alarm: What to worry about, if there is anything.
        below: The lines below.
        folded: Whether the line stands for a run of lines like each other, which are those below.
    """

    label: str
    detail: str = ""
    cells: tuple[str, ...] = ()
    alarm: str = ""
    below: tuple[Line, ...] = ()
    folded: bool = False

    def cell(self, i: int) -> str:
        """Return what stands in a column."""
        return self.cells[i] if i < len(self.cells) else ""

    @property
    def length(self) -> int:
        """How many lines there are, with all below."""
        return 1 + sum(line.length for line in self.below)


def used_columns(head: Sequence[str], root: Line) -> list[int]:
    """Return which columns have anything in them."""
    return [i for i in range(len(head)) if any(line.cell(i) for line in _all(root))]


def text(head: Sequence[str], root: Line, depth: int | None = None) -> str:
    """Return a table as text.

    A run of lines like each other is one line there, with those below it that have something to worry about.

    Args:
        head: The names of the columns, of which empty ones are left out.
        root: The first line.
        depth: How many levels below it to print; all if None.
    """
    columns = used_columns(head, root)
    cells = [["", *(head[i] for i in columns), ""]]
    for level, line in _shown(root, depth):
        label = " ".join(filter(None, (line.label, line.detail)))
        cells.append(["  " * level + label, *(line.cell(i) for i in columns), line.alarm])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_the_left = [name in ("", "shape") for name in cells[0]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, to_the_left, strict=True)
        ).rstrip()
        for row in (cells if columns else cells[1:])
    )


def runs(items: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """Yield the runs of items which are equal and whose names are numbered one after the other.

    Args:
        items: Names, each with what has to be equal.

    Yields:
        `(name, start, length)`: what to call the run, where it starts, and how many items there are in it.

    Example:
        >>> list(runs([("layer_1", "a"), ("layer_2", "b"), ("layer_3", "b"), ("out", "b")]))
        [('layer_1', 0, 1), ('layer_(2-3)', 1, 2), ('out', 3, 1)]
    """
    start = 0
    while start < len(items):
        name, value = items[start]
        length = 1
        numbered = re.fullmatch(r"((?:.*_)?)(\d+)", name)
        if numbered:
            stem, number = numbered[1], int(numbered[2])
            while items[start + length : start + length + 1] == [(f"{stem}{number + length}", value)]:
                length += 1
            name = name if length == 1 else f"{stem}({number}-{number + length - 1})"
        yield name, start, length
        start += length


def _all(line: Line) -> Iterator[Line]:
    yield line
    for below in line.below:
        yield from _all(below)


def _shown(line: Line, depth: int | None, level: int = 0) -> Iterator[tuple[int, Line]]:
    yield level, line
    for below in line.below if level != depth else ():
        if below.alarm or not line.folded:
            yield from _shown(below, depth, level + 1)
