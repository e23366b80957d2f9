"""The plain recurrent cell: `RNNCell`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ._activations import Activation, activated, as_activation
from ._fused_rnn import Carry, Kernel
from ._rnn_steps import add_recurrent
from ._weighted_cell import WeightedCell


class RNNCell(WeightedCell):
    """Take one step: `h = activation(x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh)`.

    Args:
        in_features: The size of the input's last dimension.
        hidden_size: The size of the hidden state.
        activation: A function of a tensor, or the name of one, such as "relu"; None for none.
        bias: Whether there are biases.
        train_state: Whether the initial hidden state is learned; it is the same for all sequences then.
        init_weight: The initializer of `weight_ih`.
        init_recurrent_weight: The initializer of `weight_hh`; that of `weight_ih` if None.
        init_bias: The initializer of both biases.
        init_state: The initializer of the initial hidden state, which unless it is zeros or learned is drawn anew for
            each sequence.

    Parameters:
        weight_ih: (hidden_size, in_features)
        weight_hh: (hidden_size, hidden_size)
        bias_ih: (hidden_size,), unless `bias=False`
        bias_hh: (hidden_size,), unless `bias=False`
        hidden_state: (hidden_size,), only with `train_state=True`

    States:
        rng: A key, only if the initial hidden state is drawn.

    Shape:
        x (..., in_features), or a tuple `(x, (h,))` with h (..., hidden_size), to `(h, (h,))`.

    Raises:
        InputError: If the input or the carry has another width.

    Example:
        >>> import torch, luxtorch as lt
        >>> cell = lt.RNNCell(3, 5)
        >>> ps, st = lt.setup(0, cell)
        >>> (y, carry), st = cell(torch.ones(2, 3), ps, st)
        >>> (y, carry), st = cell((torch.ones(2, 3), carry), ps, st)
        >>> y.shape
        torch.Size([2, 5])

    Source: Lux's `RNNCell`, `torch.nn.RNNCell`; Elman, "Finding structure in time", 1990.
    """

    gates: ClassVar[int] = 1

    activation: Activation | str | None = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(activation=as_activation(self.activation))

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next hidden state."""
        return (activated(add_recurrent(projected, carry[0], weights[1]), self.activation),)

    @property
    def kernel(self) -> Kernel | None:
        """The function of torch for the two activations that it knows."""
        if self.activation is torch.tanh:
            return torch.rnn_tanh
        return torch.rnn_relu if self.activation is torch.relu else None
