"""The lines of a table as HTML that notebooks show: they open and close without a script, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ._lines import MANY, Line, used_columns

# Colors are those of the notebook, but for a red that can be read on white as on black.
_PAGE = "font-family: monospace; max-width: 76em; line-height: 1.5"
# The triangle of a line that opens stands in the margin, so that all labels are in line.
_INSET = "margin-left: 1.2em"
_OPENS = f"{_INSET}; cursor: pointer; list-style-position: outside"
_ROW = "display: flex; gap: 1em; align-items: baseline"
_LABEL = "flex: 1 1 auto; overflow-wrap: anywhere"
_CELL = "flex: none; width: {}em; text-align: {}; white-space: pre"
_BELOW = "margin-left: 0.35em; padding-left: 0.85em; border-left: 1px solid rgba(128, 128, 128, 0.35)"
_HEAD = "border-bottom: 1px solid rgba(128, 128, 128, 0.35); opacity: 0.7"
_FAINT = "opacity: 0.7"
_ALARM = "color: #e5484d; font-weight: bold"


def table(head: Sequence[str], root: Line, depth: int | None = None) -> str:
    """Return a table as HTML: lines with others below them open and close.

    Args:
        head: The names of the columns, of which empty ones are left out.
        root: The first line.
        depth: How many levels below it there are; all if None.
    """
    columns = used_columns(head, root)
    widths = {i: _CELL.format(*((15, "left") if head[i] == "shape" else (6.5, "right"))) for i in columns}
    names = "".join(_span(style, head[i]) for i, style in widths.items())
    top = f'<div style="{_ROW}; {_HEAD}; {_INSET}">{_span(_LABEL, "")}{names}</div>' if columns else ""
    lines = "".join(_lines(root, widths, depth, root.length > MANY, 0))
    return _page(top + lines)


def section(title: str, parts: Sequence[str], note: str = "") -> str:
    """Return parts of a page, made by `table` and `plain`, under a title that opens and closes."""
    head = _span("font-weight: bold", title) + (" " + _span(_FAINT, note) if note else "")
    below = "".join(f'<div style="{_BELOW}; margin-top: 0.5em">{part}</div>' for part in parts)
    return _page(f'<details open><summary style="{_OPENS}">{head}</summary>{below}</details>')


def plain(text: str) -> str:
    """Return text as it is."""
    return f'<pre style="margin: 0; white-space: pre-wrap">{escape(text)}</pre>'


def shown(value: Any) -> str:
    """Return how a value shows itself in a notebook; as text if it has no way of its own."""
    own = getattr(value, "_repr_html_", None)
    return plain(repr(value)) if own is None else str(own())


def _lines(line: Line, widths: dict[int, str], depth: int | None, many: bool, level: int) -> Iterator[str]:
    label = escape(line.label)
    label += f' <span style="{_FAINT}">{escape(line.detail)}</span>' if line.detail else ""
    label += f' <span style="{_ALARM}">{escape(line.alarm)}</span>' if line.alarm else ""
    cells = "".join(_span(style, line.cell(i)) for i, style in widths.items())
    row = f'<div style="{_ROW}"><span style="{_LABEL}">{label}</span>{cells}</div>'
    if not line.below or level == depth:
        yield f'<div style="{_INSET}">{row}</div>'
        return
    # In a big tree, what has nothing below it but tensors waits to be opened.
    is_open = not line.folded and (not many or level == 0 or any(below.below for below in line.below))
    yield f'<details{" open" * is_open}><summary style="{_OPENS}">{row}</summary><div style="{_BELOW}">'
    for below in line.below:
        yield from _lines(below, widths, depth, many, level + 1)
    yield "</div></details>"


def _page(inside: str) -> str:
    return f'<div style="{_PAGE}">{inside}</div>'


def _span(style: str, text: str) -> str:
    return f'<span style="{style}">{escape(text)}</span>'
