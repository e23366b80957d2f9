"""A cell over a whole sequence: `Recurrence`."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from luxtorch.core import InputError, Parameters, States, WrapperLayer, tree_map

from ._cell import Cell


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
        sequence; or a tuple of one and the carry to start from. To (batch, hidden), to the input's order of dimensions
        with `return_sequence=True`.

    Raises:
        InputError: If the input is no sequence, if it has no steps and so no last output, or if the cell is none.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Recurrence(lt.LSTMCell(3, 5)), lt.Dense(5, 1))
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(2, 7, 3), ps, st)
        >>> y.shape
        torch.Size([2, 1])
        >>> all_steps = lt.Recurrence(lt.GRUCell(3, 5), return_sequence=True, return_carry=True)
        >>> (y, carry), st = all_steps(torch.ones(2, 7, 3), *lt.setup(0, all_steps))
        >>> y.shape
        torch.Size([2, 7, 5])

    Source: Lux's `Recurrence`; `torch.nn.RNN`, `LSTM` and `GRU`.
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
        x, carry = x if isinstance(x, tuple) else (x, None)
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
        (ys, carry), st = self.cell.scan(xs, carry, ps, st)
        if not self.return_sequence:
            y = tree_map(lambda leaf: leaf[-1], ys)
        else:
            y = tree_map(lambda leaf: leaf.transpose(0, 1), ys) if swap else ys
        return ((y, carry) if self.return_carry else y), st

    def expected_input(self) -> str:
        """Name the dimensions."""
        features = getattr(self.cell, "in_features", "features")
        order = "batch, time" if self.batch_first else "time, batch"
        return f"a tensor of shape ({order}, {features}) or (time, {features}), or a tuple of one and a carry"

    def extra_repr(self) -> str:
        """Return for instance `return_sequence=True`."""
        flags = ("return_sequence", "return_carry")
        shown = [] if self.batch_first else ["batch_first=False"]
        return ", ".join(shown + [f"{name}=True" for name in flags if getattr(self, name)])


def check_cell(cell: Any) -> None:
    """Raise unless something is a cell."""
    if not isinstance(cell, Cell):
        raise InputError(
            "Only a cell can be run over a sequence.",
            expected="a cell, such as LSTMCell(3, 5)",
            got=f"{cell!r:.80}",
            fix="Derive a cell of your own from lt.Cell.",
        )
