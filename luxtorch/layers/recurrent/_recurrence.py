"""Layers that run cells over sequences: `Recurrence`, `BidirectionalRNN`, `StackedCell`, `StatefulRecurrentCell`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import (
    ContainerLayer,
    InputError,
    Layer,
    Parameters,
    States,
    WrapperLayer,
    described,
    out_of_range,
    tree_map,
)
from luxtorch.core._call_errors import wrong_names
from luxtorch.layers._dropout import Dropout
from luxtorch.layers._shared import arguments_text, unfit

from ._base import Cell, StepMask, at_last_step, running_steps


class Recurrence(WrapperLayer):
    """Run a cell over a sequence, and return its last output, or all of them.

    The cells of luxtorch run in torch's fused kernels, also inside a gradient of torch.func; in a compiled function
    these are one operator. Any other cell, and inside of other transforms (vmap, forward mode, a gradient of a
    gradient) any cell, runs step by step: in `lt.jit` by `lt.scan`, so that a long sequence is one operator too, which
    compiles in the time of a step; in `torch.compile` it is unrolled. All give the same numbers.

    Args:
        cell: The cell.
        batch_first: Whether the batch comes before the time, in the input and in the output.
        return_sequence: Whether the output is that of all steps, stacked, instead of the last one.
        return_carry: Whether the output is a tuple, the last carry its second element.

    Parameters:
        Those of the cell, not nested.

    States:
        Likewise.

    Shape:
        (batch, time, features), (time, batch, features) with `batch_first=False`, or (time, features) for a single
        sequence; or a tuple of one and the carry to start from, or `(x, carry, lengths)`, of which the carry may be
        None. To (batch, hidden), to the input's order of dimensions with `return_sequence=True`.

        Lengths are integers, (batch,): the number of steps of each sequence, the others are padding. Or they are a mask
        of booleans, in the input's order of dimensions, (batch, time), with True anywhere for the steps that count. The
        result is that of each sequence alone, without padding: the carry is the one after its last step, and outputs
        at padded steps are zeros, as is the last output of a sequence without steps.

    Raises:
        InputError: If the input is not a sequence, if it has no steps and so no last output, if a length is out of
            range (on a CPU, outside compiled functions), or if the cell is not a `Cell`.
        DTypeError: If lengths are neither integers nor booleans.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Recurrence(lt.LSTMCell(3, 5)), lt.Dense(5, 1))
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(2, 7, 3), ps, st)
        >>> y.shape
        torch.Size([2, 1])
        >>> y, st = model((torch.ones(2, 7, 3), None, torch.tensor([7, 4])), ps, st)
        >>> torch.allclose(y[1], model(torch.ones(4, 3), ps, st)[0], atol=1e-6)
        True
        >>> all_steps = lt.Recurrence(lt.GRUCell(3, 5), return_sequence=True, return_carry=True)
        >>> (y, carry), st = all_steps(torch.ones(2, 7, 3), *lt.setup(0, all_steps))
        >>> y.shape
        torch.Size([2, 7, 5])

    Source: Lux's `Recurrence`; `torch.nn.RNN`, `LSTM` and `GRU`; `torch.nn.utils.rnn` for the lengths.
    """

    cell: Cell
    _: KW_ONLY
    batch_first: bool = True
    return_sequence: bool = False
    return_carry: bool = False

    def __post_init__(self) -> None:
        check_cell(self.cell)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output, with the last carry if asked for, and the new state."""
        x, carry, steps = parts_of(x)
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise unfit(self, x, "The input must be a sequence.", fix="For a single step, call the cell itself.")
        swap = self.batch_first and x.ndim > 2
        xs = x.transpose(0, 1) if swap else x
        if not (xs.shape[0] or self.return_sequence):
            raise InputError(
                "A sequence must have at least one step for a last output.",
                got=described(x),
                fix="With return_sequence=True the output is an empty sequence.",
            )
        mask = None if steps is None else StepMask.of(steps, xs, swap)
        if mask is None or not xs.shape[0]:
            (ys, carry), st = self.cell.scan(xs, carry, ps, st)
            y = ys if self.return_sequence else tree_map(lambda leaf: leaf[-1], ys)
        else:
            xs, lengths = mask.pack(xs), mask.lengths
            (ys, carry), st = self.cell.scan_lengths(xs, lengths, carry, ps, st)
            y = tree_map(mask.unpack if self.return_sequence else partial(at_last_step, lengths), ys)
        if swap and self.return_sequence:
            y = tree_map(lambda leaf: leaf.transpose(0, 1), y)
        return ((y, carry) if self.return_carry else y), st

    def has_lengths(self, x: Any) -> bool:
        """Return whether an input includes lengths."""
        return has_lengths_in(x)

    def expected_input(self) -> str:
        """Name the dimensions."""
        features = getattr(self.cell, "in_features", "features")
        order = "batch, time" if self.batch_first else "time, batch"
        shapes = f"({order}, {features}) or (time, {features})"
        return f"a tensor of shape {shapes}, or a tuple of one and a carry, or of these and lengths or a mask"

    def extra_repr(self) -> str:
        """Return for instance `return_sequence=True`."""
        return arguments_text(self)


def parts_of(x: Any) -> tuple[Any, Any, Any]:
    """Return the sequences, the carry and the lengths of an input, None where there are none."""
    parts = x if isinstance(x, tuple) else (x,)
    if not 1 <= len(parts) <= 3:
        raise InputError("The input must be x or a tuple (x, carry, lengths).", got=described(parts))
    x, carry, steps = (*parts, None, None)[:3]
    return x, carry, steps


def has_lengths_in(x: Any) -> bool:
    """Return whether an input includes lengths."""
    return isinstance(x, tuple) and len(x) == 3 and x[2] is not None


def check_cell(cell: Any) -> None:
    """Raise unless a value is a cell."""
    if not isinstance(cell, Cell):
        fix = "Derive a cell of your own from lt.Cell."
        raise out_of_range("cell", cell, "an lt.Cell, such as LSTMCell(3, 5)", fix=fix)


Merge = Callable[[Tensor, Tensor], Any]


class BidirectionalRNN(ContainerLayer):
    """Run a cell over a sequence from its start, another from its end, and merge their outputs at each step.

    Args:
        cell: The cell that starts at the first step.
        backward_cell: The cell that starts at the last step; one like `cell`, with parameters of its own, if None.
        merge: "cat", to put both outputs side by side; a function of both; or None, to return both in a tuple.
        batch_first: Whether the batch comes before the time, in the input and in the output.
        return_carry: Whether the output is a tuple, its second element the tuple of both cells' last carries.

    Parameters:
        forward_rnn: Those of the cell.
        backward_rnn: Those of the backward cell.

    States:
        Likewise.

    Shape:
        (batch, time, features), (time, batch, features) with `batch_first=False`, or (time, features) for a single
        sequence; or a tuple of one and a tuple of both carries to start from, or `(x, carries, lengths)`, of which the
        carries may be None. To the same order of dimensions, with the width of both outputs together.

        Lengths, or a mask, are those of `Recurrence`: the backward cell starts at the last step that counts, and both
        outputs are zeros at padded steps, before they are merged.

    Raises:
        InputError: If `merge` is something else, or the cells are not cells.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.BidirectionalRNN(lt.LSTMCell(3, 5))
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(2, 7, 3), ps, st)
        >>> y.shape
        torch.Size([2, 7, 10])

    Source: Lux's `BidirectionalRNN`, `torch.nn.LSTM(bidirectional=True)`; Schuster and Paliwal, "Bidirectional
    recurrent neural networks", 1997.
    """

    forward_rnn: Recurrence
    backward_rnn: Recurrence
    merge: Merge | str | None
    return_carry: bool

    def __init__(
        self,
        cell: Cell,
        backward_cell: Cell | None = None,
        merge: Merge | str | None = "cat",
        *,
        batch_first: bool = True,
        return_carry: bool = False,
    ) -> None:
        if isinstance(merge, type) or not (merge is None or merge == "cat" or callable(merge)):
            raise out_of_range("merge", merge, '"cat", a function of two tensors, or None')
        cells = (cell, cell if backward_cell is None else backward_cell)
        forward, backward = (
            Recurrence(each, batch_first=batch_first, return_sequence=True, return_carry=True) for each in cells
        )
        self._set(forward_rnn=forward, backward_rnn=backward, merge=merge, return_carry=return_carry)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the merged outputs, with both carries if asked for, and the new states."""
        x, carries, steps = parts_of(x)
        start, end = (None, None) if carries is None else carries
        time = 1 if self.forward_rnn.batch_first and x.ndim > 2 else 0
        (y, last), new_forward = self.forward_rnn((x, start, steps), ps["forward_rnn"], st["forward_rnn"])
        flipped = x.flip(time), end, None if steps is None else self._flipped(steps, time, x)
        (z, first), new_backward = self.backward_rnn(flipped, ps["backward_rnn"], st["backward_rnn"])
        merged = self._merged(y, z.flip(time))
        new = {"forward_rnn": new_forward, "backward_rnn": new_backward}
        return ((merged, (last, first)) if self.return_carry else merged), new

    def _flipped(self, steps: Tensor, time: int, x: Tensor) -> Tensor:
        """Return the mask of the steps that count, in reverse order."""
        if steps.dtype == torch.bool:
            return steps.flip(time)
        mask = running_steps(steps, x.shape[time]).flip(0)
        return mask.transpose(0, 1) if time else mask

    def has_lengths(self, x: Any) -> bool:
        """Return whether an input includes lengths."""
        return has_lengths_in(x)

    def _merged(self, y: Tensor, z: Tensor) -> Any:
        if self.merge is None:
            return y, z
        return self.merge(y, z) if callable(self.merge) else torch.cat((y, z), -1)

    def expected_input(self) -> str:
        """Name the dimensions."""
        return self.forward_rnn.expected_input()

    def extra_repr(self) -> str:
        """Return for instance `merge=add`."""
        shown = [] if self.merge == "cat" else [f"merge={getattr(self.merge, '__name__', None)}"]
        shown += [] if self.forward_rnn.batch_first else ["batch_first=False"]
        return ", ".join(shown + (["return_carry=True"] if self.return_carry else []))


class StackedCell(ContainerLayer, Cell):
    """A stack of cells: each takes the output of the one below as its input.

    Over a whole sequence, one cell runs after another, and one key decides the dropout of all steps; called step by
    step, each step has a key of its own.

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
        InputError: If there are no cells, or one of them is not a cell.

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
            raise InputError("StackedCell must have at least one cell.", got="none")
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
        """Return the initial carries of the cells: those after a sequence without steps."""
        (_, carry), st = self.scan(x[None][:0], None, ps, st)
        return carry, st

    def step(self, x: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the last cell's output, the cells' carries, and their states."""
        return self._run_levels(self.cells, x, carry, ps, st)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the last cell's output, the cells' carries, and their states."""
        x, carry = x if isinstance(x, tuple) else (x, None)
        return self._run_levels(self.cells, x, carry, ps, st)

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the last cell's outputs, the cells' carries, and their states."""
        return self._run_levels(self._levels, xs, carry, ps, st)

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return the same of sequences of different lengths."""
        return self._run_levels(self._levels, xs, carry, ps, st, lengths)

    @cached_property
    def _levels(self) -> tuple[Recurrence, ...]:
        options = {"batch_first": False, "return_sequence": True, "return_carry": True}
        return tuple(Recurrence(cell, **options) for cell in self.cells)

    def _run_levels(
        self, levels: tuple[Layer, ...], x: Any, carry: Any, ps: Parameters, st: States, lengths: Tensor | None = None
    ) -> tuple[tuple[Any, Any], States]:
        carries = (None,) * len(levels) if carry is None else carry
        if len(carries) != len(levels):
            raise InputError(
                "The carry of a stack must be a tuple, with one element for each cell.",
                expected=f"a tuple of length {len(levels)}",
                got=described(carries),
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


_OWN = ("carry", "started")


class StatefulRecurrentCell(WrapperLayer):
    """Keep a cell's carry in the state, so that the cell is called on one input after another.

    The first call starts with the cell's initial carry. `lt.update_state(st, "started", torch.tensor(False))` makes the
    next call a first one again. States are made for one size of batch; for another, make others with
    `lt.initial_states`, the parameters stay.

    A state is detached, and so gradients reach no step before the last: to train through time, use `Recurrence`, or
    the cell itself.

    Args:
        cell: The cell.
        batch_size: The size of the batch; None for single inputs, without a batch.

    Parameters:
        Those of the cell, not nested.

    States:
        Those of the cell, not nested, and:
        carry: The carry of the last call; zeros before the first one. The parts of a tuple are named "0", "1", ...
        started: Whether there was a call, a boolean tensor.

    Shape:
        (batch_size, features), or (features,), to what the cell returns, without the carry.

    Raises:
        InputError: If the batch has another size.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.StatefulRecurrentCell(lt.GRUCell(3, 5), batch_size=2)
        >>> ps, st = lt.setup(0, model)
        >>> first, st = model(torch.ones(2, 3), ps, st)
        >>> second, st = model(torch.ones(2, 3), ps, st)
        >>> again, st = model(torch.ones(2, 3), ps, lt.update_state(st, "started", torch.tensor(False)))
        >>> torch.equal(first, second), torch.equal(first, again)
        (False, True)

    Source: Lux's `StatefulRecurrentCell`, whose carry is None before the first call.
    """

    cell: Cell
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_cell(self.cell)
        if not isinstance(getattr(self.cell, "in_features", None), int):
            raise InputError(
                "The cell must have a field or property in_features, to make its carry.", got=type(self.cell).__name__
            )

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the cell's states, and a carry of zeros."""
        ps, st = self.cell.initial_parameters(key), self.cell.initial_states(key)
        carry, _ = self.cell.initial_carry(torch.zeros(self._shape(), device=key.device), ps, st)
        started = torch.zeros((), dtype=torch.bool, device=key.device)
        return {**st, "carry": _as_dict(tree_map(torch.zeros_like, carry)), "started": started}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the cell's output, and the state with the new carry."""
        if not isinstance(x, Tensor) or tuple(x.shape) != self._shape():
            fix = "Make a StatefulRecurrentCell with this batch_size, and its states with lt.initial_states."
            raise unfit(self, x, "The input must have the shape that the state was made for.", fix=fix)
        own: States = {name: value for name, value in st.items() if name not in _OWN}
        start, own = self.cell.initial_carry(x, ps, own)
        carry = tree_map(
            lambda a, b: torch.where(st["started"], a.to(b.dtype), b), _from_dict(start, st["carry"]), start
        )
        (y, carry), own = self.cell((x, carry), ps, own)
        carry = tree_map(lambda new, old: new.detach().to(old.dtype), _as_dict(carry), st["carry"])
        return y, {**own, "carry": carry, "started": torch.ones_like(st["started"])}

    def _shape(self) -> tuple[int, ...]:
        features: int = self.cell.in_features  # type: ignore[attr-defined]
        return (features,) if self.batch_size is None else (self.batch_size, features)

    def expected_input(self) -> str:
        """Name the shape."""
        return f"a tensor of shape {self._shape()}"

    def extra_repr(self) -> str:
        """Return for instance `batch_size=8`."""
        return "" if self.batch_size is None else f"batch_size={self.batch_size}"


def _as_dict(carry: Any) -> Any:
    """Return a carry in the form of states: a tuple as a dict."""
    return {str(i): _as_dict(part) for i, part in enumerate(carry)} if isinstance(carry, tuple) else carry


def _from_dict(carry: Any, groups: Any, path: tuple[str, ...] = ("carry",)) -> Any:
    """Return the carry from its form as states, given one of the same structure."""
    if not isinstance(carry, tuple):
        return groups
    names = [str(i) for i in range(len(carry))]
    error = wrong_names(
        groups if isinstance(groups, Mapping) else {},
        frozenset(names),
        "state",
        "Make them with lt.initial_states.",
    )
    if error is not None:
        error.inside = path
        raise error
    parts = [_from_dict(part, groups[name], (*path, name)) for name, part in zip(names, carry, strict=True)]
    return type(carry)(*parts) if hasattr(carry, "_fields") else tuple(parts)
