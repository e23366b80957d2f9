"""A cell made of cells: `StackedCell`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from luxtorch.core import ContainerLayer, InputError, Layer, Parameters, States

from ._cell import Cell
from ._dropout import Dropout
from ._recurrence import Recurrence, check_cell


class StackedCell(ContainerLayer, Cell):
    """Put cells on top of each other: each takes the output of the one below as its input.

    Over a whole sequence, one level runs after another, and one key decides what is dropped of all steps; called step
    by step, each step has a key of its own.

    Args:
        *cells: The cells, the one that takes the input first.
        dropout: The probability with which an output is dropped on its way up while training.

    Parameters:
        Those of each cell, under `layer_1`, `layer_2`, ...; with a dropout, nothing under `dropout`.

    States:
        Likewise; with a dropout, its own under `dropout`.

    Shape:
        What the first cell takes to what the last one returns; the carry is a tuple of those of the cells.

    Raises:
        InputError: If there are no cells, or something else among them.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Recurrence(lt.StackedCell(lt.LSTMCell(3, 5), lt.LSTMCell(5, 5), dropout=0.1))
        >>> ps, st = lt.setup(0, model)
        >>> list(ps)
        ['layer_1', 'layer_2', 'dropout']
        >>> y, st = model(torch.ones(2, 7, 3), ps, st)
        >>> y.shape
        torch.Size([2, 5])

    Source: `torch.nn.LSTM(num_layers=2, dropout=0.1)`; in Lux, a `Chain` of `Recurrence`s.
    """

    cells: tuple[Cell, ...]
    dropout: Dropout

    def __init__(self, *cells: Cell, dropout: float = 0.0) -> None:
        if not cells:
            raise InputError("StackedCell needs cells.", expected="StackedCell(cell, ...)", got="none")
        for cell in cells:
            check_cell(cell)
        self._set(cells=cells, dropout=Dropout(dropout))

    @property
    def in_features(self) -> Any:
        """The width of the first cell's input."""
        return self.cells[0].in_features  # type: ignore[attr-defined]

    def children(self) -> Mapping[str, Layer]:
        """Return the cells by name, and the dropout if there is one."""
        named: dict[str, Layer] = {f"layer_{i}": cell for i, cell in enumerate(self.cells, 1)}
        return {**named, "dropout": self.dropout} if self.dropout.p > 0 else named

    def initial_carry(self, x: Tensor, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return those of the cells: what they carry after a sequence without steps."""
        (_, carry), st = self.scan(x[None][:0], None, ps, st)
        return carry, st

    def step(self, x: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the last cell's output, the cells' carries, and their states."""
        return self._upwards(self.cells, x, carry, ps, st)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the last cell's output, the cells' carries, and their states."""
        x, carry = x if isinstance(x, tuple) else (x, None)
        return self._upwards(self.cells, x, carry, ps, st)

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the last cell's outputs, the cells' carries, and their states."""
        return self._upwards(self._levels, xs, carry, ps, st)

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return the same of sequences of different lengths."""
        return self._upwards(self._levels, xs, carry, ps, st, lengths)

    @cached_property
    def _levels(self) -> tuple[Recurrence, ...]:
        options = {"batch_first": False, "return_sequence": True, "return_carry": True}
        return tuple(Recurrence(cell, **options) for cell in self.cells)

    def _upwards(
        self, levels: tuple[Layer, ...], x: Any, carry: Any, ps: Parameters, st: States, lengths: Tensor | None = None
    ) -> tuple[tuple[Any, Any], States]:
        carries = (None,) * len(levels) if carry is None else carry
        if len(carries) != len(levels):
            raise InputError(
                "The carry of a stack is a tuple, an element to each cell.",
                expected=f"a tuple of {len(levels)}",
                got=f"a tuple of {len(carries)}",
            )
        new, last = dict(st), []
        for i, (level, start) in enumerate(zip(levels, carries, strict=True), 1):
            if i > 1 and self.dropout.p > 0:
                x, new["dropout"] = self.dropout(x, ps["dropout"], new["dropout"])
            name = f"layer_{i}"
            more = () if lengths is None else (lengths,)
            (x, end), new[name] = level((x, start, *more), ps[name], st[name])
            last.append(end)
        return (x, tuple(last)), new

    def expected_input(self) -> str:
        """Name the width of the first cell's input."""
        features = getattr(self.cells[0], "in_features", "features")
        return f"a tensor of shape (..., {features}), or a tuple of one and a tuple of the cells' carries"

    def extra_repr(self) -> str:
        """Return nothing: the children are shown by themselves."""
        return ""
