"""The gated cell without a memory: `GRUCell`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ._fused_rnn import Carry, Kernel
from ._rnn_steps import gru_step, project_gru
from ._weighted_cell import WeightedCell


class GRUCell(WeightedCell):
    """Take one step of a gated recurrent unit.

    With the gates r and z (sigmoid) of input and hidden state,
    `n = tanh(x @ W_n.T + b_n + r * (h @ U_n.T + c_n))` and `h = (1 - z) * n + z * h`.

    Args:
        in_features: The size of the input's last dimension.
        hidden_size: The size of the hidden state.
        bias: Whether there are biases.
        train_state: Whether the initial hidden state is learned; it is the same for all sequences then.
        init_weight: The initializer of each gate's part of `weight_ih`, or a tuple of three, for r, z and n.
        init_recurrent_weight: The same for `weight_hh`; that of `weight_ih` if None.
        init_bias: The same for both biases.
        init_state: The initializer of the initial hidden state, which unless it is zeros or learned is drawn anew for
            each sequence.

    Parameters:
        weight_ih: (3 * hidden_size, in_features), the gates in the order r, z, n
        weight_hh: (3 * hidden_size, hidden_size)
        bias_ih: (3 * hidden_size,), unless `bias=False`
        bias_hh: (3 * hidden_size,), unless `bias=False`
        hidden_state: (hidden_size,), only with `train_state=True`

    States:
        rng: A key, only if the initial hidden state is drawn.

    Shape:
        x (..., in_features), or a tuple `(x, (h,))` with h (..., hidden_size), to `(h, (h,))`.

    Raises:
        InputError: If the input or the carry has another width, or a tuple of initializers another length.

    Example:
        >>> import torch, luxtorch as lt
        >>> cell = lt.GRUCell(3, 5)
        >>> ps, st = lt.setup(0, cell)
        >>> (y, (h,)), st = cell(torch.ones(2, 3), ps, st)
        >>> y.shape
        torch.Size([2, 5])

    Source: Lux's `GRUCell`, `torch.nn.GRUCell`; Cho et al., "Learning phrase representations", 2014, for the unit.
    """

    gates: ClassVar[int] = 3

    def project(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the part of the input; `bias_hh` has to wait, as one gate multiplies a part of it."""
        return project_gru(x, weights)

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next hidden state."""
        return gru_step(projected, carry, weights)

    @property
    def kernel(self) -> Kernel:
        """The function of torch."""
        return torch.gru
