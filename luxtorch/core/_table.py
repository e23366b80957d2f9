"""Tables whose lines form a tree, as text and as HTML with foldable lines for notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MANY = 60
"""The largest number of lines that are all shown at first."""


@dataclass(frozen=True)
class Line:
    """Hold a line of a table, with the lines below it.

    Attributes:
        label: The label at the start.
        detail: A less prominent text after it.
        cells: The columns, in their order; missing ones are empty.
        alarm: A warning, such as the number of NaNs; may be empty.
        below: The lines below.
        folded: Whether the line stands for a run of equal lines, which are those below.
    """

    label: str
    detail: str = ""
    cells: tuple[str, ...] = ()
    alarm: str = ""
    below: tuple[Line, ...] = ()
    folded: bool = False

    def cell(self, i: int) -> str:
        """Return the text of a column."""
        return self.cells[i] if i < len(self.cells) else ""

    @property
    def length(self) -> int:
        """The number of lines, with all below."""
        return 1 + sum(line.length for line in self.below)


def _used(head: Sequence[str], root: Line) -> list[int]:
    """Return the columns that are not empty."""
    return [i for i in range(len(head)) if any(line.cell(i) for line in _all(root))]


def text(head: Sequence[str], root: Line, depth: int | None = None) -> str:
    """Return a table as text.

    A run of equal lines is shown as one, with those below it that have a warning.

    Args:
        head: The names of the columns, of which empty ones are left out.
        root: The first line.
        depth: The number of levels below it to print; all if None.
    """
    columns = _used(head, root)
    rows = [["", *(head[i] for i in columns), ""]]
    for level, line in _shown(root, depth):
        label = " ".join(filter(None, (line.label, line.detail)))
        rows.append(["  " * level + label, *(line.cell(i) for i in columns), line.alarm])
    return "\n".join(aligned(rows, [name in ("", "shape") for name in rows[0]])[0 if columns else 1 :])


def aligned(rows: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """Return rows of cells as lines of text, each column as wide as its widest cell.

    Args:
        rows: The rows.
        left: For each column, whether its cells are left-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if to_the_left else cell.rjust(width)
            for cell, width, to_the_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def runs(items: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """Yield the runs of equal items whose names are numbered consecutively.

    Args:
        items: Names, each with a value that has to be equal.

    Yields:
        `(name, start, length)`: the name of the run, its start, and its number of items.

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


# Colors are those of the notebook, except for a red that is readable on white and black.
_PAGE = "font-family: monospace; max-width: 76em; line-height: 1.5"
# The triangle of a foldable line is in the margin, so that all labels are aligned.
_INSET = "margin-left: 1.2em"
_OPENS = f"{_INSET}; cursor: pointer; list-style-position: outside"
_ROW = "display: flex; gap: 1em; align-items: baseline"
_LABEL = "flex: 1 1 auto; overflow-wrap: anywhere"
_CELL = "flex: none; width: {}em; text-align: {}; white-space: pre"
_BELOW = "margin-left: 0.35em; padding-left: 0.85em; border-left: 1px solid rgba(128, 128, 128, 0.35)"
_HEAD = "border-bottom: 1px solid rgba(128, 128, 128, 0.35); opacity: 0.7"
_FAINT = "opacity: 0.7"
_ALARM = "color: #e5484d; font-weight: bold"


def html(head: Sequence[str], root: Line, depth: int | None = None) -> str:
    """Return a table as HTML: lines with others below them open and close.

    Args:
        head: The names of the columns, of which empty ones are left out.
        root: The first line.
        depth: The number of levels below it; all if None.
    """
    columns = _used(head, root)
    widths = {i: _CELL.format(*((15, "left") if head[i].endswith("shape") else (6.5, "right"))) for i in columns}
    names = "".join(_span(style, head[i]) for i, style in widths.items())
    top = f'<div style="{_ROW}; {_HEAD}; {_INSET}">{_span(_LABEL, "")}{names}</div>' if columns else ""
    lines = "".join(_html_lines(root, widths, depth, root.length > MANY, 0))
    return _page(top + lines)


def section(title: str, parts: Sequence[str], note: str = "") -> str:
    """Return parts of a page, made by `html` and `plain`, under a title that opens and closes."""
    head = _span("font-weight: bold", title) + (" " + _span(_FAINT, note) if note else "")
    below = "".join(f'<div style="{_BELOW}; margin-top: 0.5em">{part}</div>' for part in parts)
    return _page(f'<details open><summary style="{_OPENS}">{head}</summary>{below}</details>')


def plain(text: str) -> str:
    """Return text as preformatted HTML."""
    return f'<pre style="margin: 0; white-space: pre-wrap">{_escaped(text)}</pre>'


def shown(value: Any) -> str:
    """Return the HTML of a value for notebooks; its repr if it has none."""
    own = getattr(value, "_repr_html_", None)
    return plain(repr(value)) if own is None else str(own())


def _html_lines(line: Line, widths: dict[int, str], depth: int | None, many: bool, level: int) -> Iterator[str]:
    label = _escaped(line.label)
    label += f' <span style="{_FAINT}">{_escaped(line.detail)}</span>' if line.detail else ""
    label += f' <span style="{_ALARM}">{_escaped(line.alarm)}</span>' if line.alarm else ""
    cells = "".join(_span(style, line.cell(i)) for i, style in widths.items())
    row = f'<div style="{_ROW}"><span style="{_LABEL}">{label}</span>{cells}</div>'
    if not line.below or level == depth:
        yield f'<div style="{_INSET}">{row}</div>'
        return
    # In a big tree, groups of tensors alone are closed at first.
    is_open = not line.folded and (not many or level == 0 or any(below.below for below in line.below))
    yield f'<details{" open" * is_open}><summary style="{_OPENS}">{row}</summary><div style="{_BELOW}">'
    for below in line.below:
        yield from _html_lines(below, widths, depth, many, level + 1)
    yield "</div></details>"


def _page(inside: str) -> str:
    return f'<div style="{_PAGE}">{inside}</div>'


def _span(style: str, text: str) -> str:
    return f'<span style="{style}">{_escaped(text)}</span>'


def _escaped(text: str) -> str:
    from html import escape  # its import takes as long as that of all printing here

    return escape(text)
