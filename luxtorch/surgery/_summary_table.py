"""What `summary` returns: rows, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from luxtorch.core import KeyNameError, suggest

_HEAD = ("layer", "output shape", "parameters", "FLOPs", "weights", "outputs")


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """Hold what a layer is, returns and costs, with all that is inside.

    Attributes:
        path: The path, such as `"encoder.layer_2"`; empty for the model itself. The layer in a wrapper has the path of
            the wrapper, as their trees are the same.
        depth: The level: 0 for the model itself.
        name: The last name in the path.
        layer: The layer, for instance `"Dense(3 -> 2)"`.
        output: The shape of what it returned last, a tree of shapes if that is a tree; None if it was not called.
        calls: How often it was called.
        parameters: The number of parameters.
        states: The number of states.
        flops: The floating point operations of all its calls.
        weight_bytes: The memory of parameters and states.
        output_bytes: The memory of what the innermost layers return in all calls.
    """

    path: str
    depth: int
    name: str
    layer: str
    output: Any
    calls: int
    parameters: int
    states: int
    flops: int
    weight_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Summary:
    """Hold the rows of a table of a model's layers; `print` shows them, and so does a notebook.

    Attributes:
        rows: A row for each layer, outer ones before those inside.
        input_bytes: The memory of the input.
        depth: How many levels are shown; all if None.
        total: The row of the model itself.
    """

    rows: tuple[SummaryRow, ...]
    input_bytes: int
    depth: int | None = None

    @property
    def total(self) -> SummaryRow:
        """The row of the model itself."""
        return self.rows[0]

    def __getitem__(self, path: str) -> SummaryRow:
        """Return the row of a path, that of a wrapper before that of the layer inside.

        Raises:
            KeyNameError: If there is none.
        """
        for row in self.rows:
            if row.path == path:
                return row
        paths = [row.path for row in self.rows]
        raise KeyNameError("No layer has this path.", expected=", ".join(paths[1:]), got=path, fix=suggest(path, paths))

    def __str__(self) -> str:
        cells = [_HEAD, *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
        lines = ["  ".join(map(_aligned, range(len(_HEAD)), row, widths)).rstrip() for row in cells]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([lines[0], rule, *lines[1:], rule, *self._totals()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEAD)
        rows = ["".join(_cell(i, text) for i, text in enumerate(row)) for row in self._cells()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        totals = "<br>".join(map(escape, self._totals()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{totals}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                "  " * row.depth
                + (f"{row.name} = " if row.name else "")
                + _short(row.layer)
                + (f" x{row.calls}" if row.calls > 1 else ""),
                "" if row.output is None else _short(str(row.output)),
                f"{row.parameters:_}" if row.parameters else "",
                amount(row.flops) if row.flops else "",
                amount(row.weight_bytes, "B") if row.weight_bytes else "",
                amount(row.output_bytes, "B") if row.output_bytes else "",
            )
            for row in self.rows
            if self.depth is None or row.depth <= self.depth
        ]

    def _totals(self) -> list[str]:
        row = self.total
        return [
            f"total: {row.parameters:_} parameters, {row.states:_} states, {amount(row.flops, 'FLOPs')} forward",
            f"memory: weights {amount(row.weight_bytes, 'B')}, input {amount(self.input_bytes, 'B')}, "
            f"outputs {amount(row.output_bytes, 'B')}",
        ]


def amount(number: int, unit: str = "") -> str:
    """Return a number with the prefix that fits.

    Example:
        >>> amount(1_234_567, "B"), amount(12, "B")
        ('1.23 MB', '12 B')
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    value, prefix = float(number), 0
    while value >= 999.5 and prefix < len(prefixes) - 1:
        value, prefix = value / 1000, prefix + 1
    return f"{value:.3g} {prefixes[prefix]}{unit}".strip()


def _aligned(i: int, text: str, width: int) -> str:
    return text.ljust(width) if i < 2 else text.rjust(width)


def _cell(i: int, text: str) -> str:
    align = "left" if i < 2 else "right"
    return f'<td style="text-align: {align}; white-space: pre">{escape(text)}</td>'


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
