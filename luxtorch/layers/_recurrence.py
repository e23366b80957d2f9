"""A cell over a whole sequence: `Recurrence`."""

from __future__ import annotations

from dataclasses import KW_ONLY
from functools import partial
from typing import Any

from torch import Tensor

from luxtorch.core import InputError, Parameters, States, WrapperLayer, tree_map

from ._cell import Cell
from ._lengths import Counted, at_ends


class Recurrence(WrapperLayer):
    """Run a cell over a sequence, and return its last output, or all of them.

    The cells of luxtorch run in torch's fused kernels, also inside of a gradient of torch.func. In a compiled function
    a sequence is one operator, however long. Inside of other transforms (vmap, forward mode, a gradient of a gradient)
    they go step by step, and there a long sequence takes long to compile. All give the same numbers.

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

        Lengths are integers, (batch,): of each sequence only so many steps count, the others are padding. They may as
        well be a mask of booleans, in the input's order of dimensions, (batch, time): the steps count where it is True,
        wherever these are. The result is that of each sequence alone, without padding: the carry is the one after its
        last step, and outputs in the place of padding are zeros, as is the last output of a sequence without steps.

    Raises:
        InputError: If the input is no sequence, if it has no steps and so no last output, if a length is out of range
            (on a CPU, outside of compiled functions), or if the cell is none.
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
            raise InputError(
                "The input is no sequence.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}",
                fix="For a single step, call the cell itself.",
            )
        swap = self.batch_first and x.ndim > 2
        xs = x.transpose(0, 1) if swap else x
        if not (xs.shape[0] or self.return_sequence):
            raise InputError(
                "A sequence without steps has no last output.",
                expected="at least one step",
                got=f"a tensor of shape {tuple(x.shape)}",
                fix="With return_sequence=True the output is an empty sequence.",
            )
        counted = None if steps is None else Counted.of(steps, xs, swap)
        if counted is None or not xs.shape[0]:
            (ys, carry), st = self.cell.scan(xs, carry, ps, st)
            y = ys if self.return_sequence else tree_map(lambda leaf: leaf[-1], ys)
        else:
            xs, lengths = counted.in_front(xs), counted.lengths
            (ys, carry), st = self.cell.scan_lengths(xs, lengths, carry, ps, st)
            y = tree_map(counted.in_place if self.return_sequence else partial(at_ends, lengths), ys)
        if swap and self.return_sequence:
            y = tree_map(lambda leaf: leaf.transpose(0, 1), y)
        return ((y, carry) if self.return_carry else y), st

    def has_lengths(self, x: Any) -> bool:
        """Tell whether an input brings lengths."""
        return brings_lengths(x)

    def expected_input(self) -> str:
        """Name the dimensions."""
        features = getattr(self.cell, "in_features", "features")
        order = "batch, time" if self.batch_first else "time, batch"
        shapes = f"({order}, {features}) or (time, {features})"
        return f"a tensor of shape {shapes}, or a tuple of one and a carry, or of these and lengths or a mask"

    def extra_repr(self) -> str:
        """Return for instance `return_sequence=True`."""
        flags = ("return_sequence", "return_carry")
        shown = [] if self.batch_first else ["batch_first=False"]
        return ", ".join(shown + [f"{name}=True" for name in flags if getattr(self, name)])


def parts_of(x: Any) -> tuple[Any, Any, Any]:
    """Return the sequences, the carry and the lengths of an input, None where there are none."""
    parts = x if isinstance(x, tuple) else (x,)
    if not 1 <= len(parts) <= 3:
        raise InputError(
            "The input is a tuple of another length.", expected="(x, carry, lengths)", got=f"a tuple of {len(parts)}"
        )
    x, carry, steps = (*parts, None, None)[:3]
    return x, carry, steps


def brings_lengths(x: Any) -> bool:
    """Tell whether there are lengths in an input."""
    return isinstance(x, tuple) and len(x) == 3 and x[2] is not None


def check_cell(cell: Any) -> None:
    """Raise unless something is a cell."""
    if not isinstance(cell, Cell):
        raise InputError(
            "Only a cell can be run over a sequence.",
            expected="a cell, such as LSTMCell(3, 5)",
            got=f"{cell!r:.80}",
            fix="Derive a cell of your own from lt.Cell.",
        )
