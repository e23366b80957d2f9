"""The cell with a memory behind gates: `LSTMCell`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import ClassVar

import torch
from torch import Tensor

from luxtorch.init import Initializer, zeros

from ._fused_rnn import Carry, Kernel
from ._rnn_steps import lstm_step
from ._weighted_cell import WeightedCell

# What adds this to a sigmoid's input makes it 0 or 1 exactly, in half precision too.
_WIDE = 1e4


class LSTMCell(WeightedCell):
    """Take one step with long short-term memory.

    With the gates i, f, o (sigmoid) and g (tanh) of input and hidden state, `c = f * c + i * g` and `h = o * tanh(c)`.

    Args:
        in_features: The size of the input's last dimension.
        hidden_size: The size of the hidden state and of the memory.
        bias: Whether there are biases.
        train_state: Whether the initial hidden state is learned; it is the same for all sequences then.
        train_memory: The same for the memory.
        init_weight: The initializer of each gate's part of `weight_ih`, or a tuple of four, for i, f, g and o.
        init_recurrent_weight: The same for `weight_hh`; that of `weight_ih` if None.
        init_bias: The same for both biases, which are added.
        init_state: The initializer of the initial hidden state, which unless it is zeros or learned is drawn anew for
            each sequence.
        init_memory: The same for the memory.

    Parameters:
        weight_ih: (4 * hidden_size, in_features), the gates in the order i, f, g, o
        weight_hh: (4 * hidden_size, hidden_size)
        bias_ih: (4 * hidden_size,), unless `bias=False`
        bias_hh: (4 * hidden_size,), unless `bias=False`
        hidden_state: (hidden_size,), only with `train_state=True`
        memory: (hidden_size,), only with `train_memory=True`

    States:
        rng: A key, only if something of the initial carry is drawn.

    Shape:
        x (..., in_features), or a tuple `(x, (h, c))` with both (..., hidden_size), to `(h, (h, c))`.

    Raises:
        InputError: If the input or the carry has another width, or a tuple of initializers another length.

    Example:
        >>> import torch, luxtorch as lt
        >>> cell = lt.LSTMCell(3, 5)
        >>> ps, st = lt.setup(0, cell)
        >>> (y, (h, c)), st = cell(torch.ones(2, 3), ps, st)
        >>> y.shape, c.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))

    Source: Lux's `LSTMCell`, `torch.nn.LSTMCell`; Hochreiter and Schmidhuber, "Long short-term memory", 1997.
    """

    gates: ClassVar[int] = 4

    _: KW_ONLY
    train_memory: bool = False
    init_memory: Initializer = zeros

    def _starts(self) -> dict[str, tuple[Initializer, bool]]:
        return {**super()._starts(), "memory": (self.init_memory, self.train_memory)}

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next hidden state and memory."""
        return lstm_step(projected, carry, weights)

    def closed(self, xs: Tensor, running: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return an input more, which shuts the input gate and opens the forget gate: the memory stays, bit for bit."""
        i, f, *others = torch.zeros_like(weights[0][:, :1]).chunk(self.gates)
        column = torch.cat((i - _WIDE, f + _WIDE, *others))
        ends = running.logical_not().unsqueeze(-1).to(xs.dtype)
        return torch.cat((xs, ends), -1), [torch.cat((weights[0], column), 1), *weights[1:]]

    @property
    def kernel(self) -> Kernel:
        """The function of torch."""
        return torch.lstm
