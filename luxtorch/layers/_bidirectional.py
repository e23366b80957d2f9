"""Two cells over a sequence, one from each end: `BidirectionalRNN`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import ContainerLayer, InputError, Parameters, States

from ._cell import Cell
from ._lengths import before
from ._recurrence import Recurrence, brings_lengths, parts_of

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
        outputs are zeros in the place of padding, before they are merged.

    Raises:
        InputError: If `merge` is something else, or the cells are none.

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
            raise InputError(
                "The outputs cannot be merged so.",
                expected='"cat", a function of two tensors, or None',
                got=f"{merge!r}",
            )
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
        """Return a mask of the steps that count, from the last one on."""
        if steps.dtype == torch.bool:
            return steps.flip(time)
        mask = before(steps, x.shape[time]).flip(0)
        return mask.transpose(0, 1) if time else mask

    def has_lengths(self, x: Any) -> bool:
        """Tell whether an input brings lengths."""
        return brings_lengths(x)

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
