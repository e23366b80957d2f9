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

    @property
    def kernel(self) -> Kernel:
        """The function of torch."""
        return torch.lstm
