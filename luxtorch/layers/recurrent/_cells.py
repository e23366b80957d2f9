"""`RNNCell`, `LSTMCell`, `GRUCell`, and their base class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import InputError, Parameters, States, described, out_of_range
from luxtorch.core._sharded import beside
from luxtorch.init import Initializer, glorot_uniform, zeros
from luxtorch.layers._activations import Activation, activated, as_activation
from luxtorch.layers._shared import arguments_text, require_size, unfit
from luxtorch.random import fold_in, split

from ._base import Cell, at_last_step, running_steps, zero_padding
from ._fused import Carry, Kernel, add_recurrent, gru_step, lstm_step, project, project_gru, scanned

GateInitializer: TypeAlias = Initializer | tuple[Initializer, ...]
"""An initializer for each gate by itself, or a tuple with one for each."""


class WeightedCell(Cell):
    """Base class of torch's cells: two weights, two biases, and an initial carry that is zeros, drawn or learned."""

    gates: ClassVar[int]
    """How many blocks of `hidden_size` rows the weights have."""

    in_features: int
    hidden_size: int
    _: KW_ONLY
    bias: bool = True
    train_state: bool = False
    init_weight: GateInitializer = glorot_uniform
    init_recurrent_weight: GateInitializer | None = None
    init_bias: GateInitializer = zeros
    init_state: Initializer = zeros

    def __post_init__(self) -> None:
        for name in ("in_features", "hidden_size"):
            require_size(name, getattr(self, name))
        if self.init_recurrent_weight is None:
            self._set(init_recurrent_weight=self.init_weight)
        for name in ("init_weight", "init_recurrent_weight", "init_bias"):
            init = getattr(self, name)
            if isinstance(init, list | tuple):
                if len(init) != self.gates:
                    raise out_of_range(name, init, f"one initializer, or a tuple of {self.gates}, one for each gate")
                self._set(**{name: tuple(init)})

    @property
    @abstractmethod
    def kernel(self) -> Kernel | None:
        """The fused function of torch for a whole sequence, if there is one for this cell."""

    def project(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the projection of the input, for one step or for many at once."""
        return project(x, weights)

    @abstractmethod
    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next carry, from what `project` returns and from the carry."""

    def _carry_parts(self) -> dict[str, tuple[Initializer, bool]]:
        """Return the initializer of each tensor of the carry, and whether it is learned."""
        return {"hidden_state": (self.init_state, self.train_state)}

    def _drawn(self) -> bool:
        return any(init != zeros and not learned for init, learned in self._carry_parts().values())

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the weights, the biases if there are any, and the learned part of the carry."""
        size = self.hidden_size
        recurrent = self.init_recurrent_weight or self.init_weight
        ps = {
            "weight_ih": self._by_gate(key, "weight_ih", self.init_weight, (size, self.in_features)),
            "weight_hh": self._by_gate(key, "weight_hh", recurrent, (size, size)),
        }
        if self.bias:
            ps |= {name: self._by_gate(key, name, self.init_bias, (size,)) for name in ("bias_ih", "bias_hh")}
        starts = self._carry_parts().items()
        return ps | {name: init(fold_in(key, name), (size,)) for name, (init, learned) in starts if learned}

    def _by_gate(self, key: Tensor, name: str, init: GateInitializer, shape: tuple[int, ...]) -> Tensor:
        inits = init if isinstance(init, tuple) else (init,) * self.gates
        keys = split(fold_in(key, name), self.gates)
        return torch.cat([draw(keys[i], shape) for i, draw in enumerate(inits)])

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the key of the first carry, if one is drawn."""
        return {"rng": key.clone()} if self._drawn() else {}

    def initial_carry(self, x: Tensor, ps: Parameters, st: States) -> tuple[tuple[Tensor, ...], States]:
        """Return zeros, numbers drawn for each sequence, or the learned ones, the same for all."""
        key, new = None, st
        if self._drawn():
            key, rng = split(st["rng"])
            new = {"rng": rng}
        shape = (*x.shape[:-1], self.hidden_size)
        carry = []
        for name, (init, learned) in self._carry_parts().items():
            if learned:
                carry.append(ps[name].expand(shape))
            elif key is None or init == zeros:
                carry.append(ps["weight_hh"].new_zeros(shape))
            else:
                drawn = init(fold_in(key, name), shape).to(ps["weight_hh"].dtype)
                carry.append(beside(drawn, x))
        return tuple(carry), new

    def step(self, x: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the next hidden state as output, the next carry, and `st`."""
        carry, weights = self._check_carry(x, carry, x.shape[:-1]), self._weights(ps)
        carry = self.advance(self.project(x, weights), carry, weights)
        return (carry[0], carry), st

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the hidden states of all steps, the last carry, and the new state."""
        carry, st = self._start(xs, carry, ps, st)
        return scanned(self, xs, self._check_carry(xs, carry, xs.shape[1:-1]), self._weights(ps)), st

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return the hidden states, zeros after the ends; the carries at the ends; and the new state.

        All sequences run to the last step, so that a fused kernel can be used.
        """
        carry, st = self._start(xs, carry, ps, st)
        carry = self._check_carry(xs, carry, xs.shape[1:-1])
        xs, weights = self.freeze_padding(xs, running_steps(lengths, xs.shape[0]), self._weights(ps))
        ys, last = scanned(self, xs, carry, weights)
        return (zero_padding(lengths, ys), (at_last_step(lengths, ys, carry[0]), *last[1:])), st

    def freeze_padding(self, xs: Tensor, running: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return inputs and weights that keep the carry, apart from the hidden state, constant after the ends.

        Args:
            xs: The inputs, (time, ..., features).
            running: Which of the steps come before the ends, (time, ...).
            weights: The weights.
        """
        return xs, weights

    def _weights(self, ps: Parameters) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        return [ps[name] for name in names]

    def _check_carry(self, x: Tensor, carry: Any, batch: torch.Size) -> Carry:
        """Return the carry for a batch; raise if it or the input has another width."""
        if x.shape[-1:] != (self.in_features,):
            raise unfit(self, x, f"The input must have {self.in_features} features.")
        shape = (*batch, self.hidden_size)
        try:
            if isinstance(carry, tuple) and len(carry) == len(self._carry_parts()):
                return tuple(part if part.shape == shape else part.expand(shape) for part in carry)
        except RuntimeError:
            pass
        raise InputError(
            "The carry must have the shape of the hidden state.",
            expected=f"{self._carry_text()} of shape {shape}",
            got=", ".join(map(described, carry if isinstance(carry, tuple) else (carry,))),
            fix="Pass (x, carry) with the carry that the cell returned: (y, carry), st = cell(x, ps, st).",
        )

    def _carry_text(self) -> str:
        return "(h,)" if len(self._carry_parts()) == 1 else "(h, c)"

    def expected_input(self) -> str:
        """Name the widths of the input and of the carry."""
        return (
            f"a tensor of shape (..., {self.in_features}), or a tuple of one and a carry {self._carry_text()} "
            f"of shape (..., {self.hidden_size})"
        )

    def extra_repr(self) -> str:
        """Return for instance `3 -> 5, bias=False`."""
        return arguments_text(self, f"{self.in_features} -> {self.hidden_size}")


class RNNCell(WeightedCell):
    """Elman RNN cell: `h = activation(x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh)`.

    Args:
        in_features: The size of the input's last dimension.
        hidden_size: The size of the hidden state.
        activation: A function of a tensor, or the name of one, such as "relu"; None for none.
        bias: Whether there are biases.
        train_state: Whether the initial hidden state is learned; it is the same for all sequences then.
        init_weight: The initializer of `weight_ih`.
        init_recurrent_weight: The initializer of `weight_hh`; that of `weight_ih` if None.
        init_bias: The initializer of both biases.
        init_state: The initializer of the initial hidden state, which unless it is zeros or learned is drawn again for
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
        """The fused function of torch for tanh or relu."""
        if self.activation is torch.tanh:
            return torch.rnn_tanh
        return torch.rnn_relu if self.activation is torch.relu else None


# Added to a sigmoid's input, it gives exactly 0 or 1, in half precision too.
_WIDE = 1e4


class LSTMCell(WeightedCell):
    """Long short-term memory (LSTM) cell.

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
        init_state: The initializer of the initial hidden state, which unless it is zeros or learned is drawn again for
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

    def _carry_parts(self) -> dict[str, tuple[Initializer, bool]]:
        return {**super()._carry_parts(), "memory": (self.init_memory, self.train_memory)}

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next hidden state and memory."""
        return lstm_step(projected, carry, weights)

    def freeze_padding(self, xs: Tensor, running: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Append an input that closes the input gate and opens the forget gate: the memory is constant, bit for bit."""
        i, f, *others = torch.zeros_like(weights[0][:, :1]).chunk(self.gates)
        column = torch.cat((i - _WIDE, f + _WIDE, *others))
        ends = running.logical_not().unsqueeze(-1).to(xs.dtype)
        return torch.cat((xs, ends), -1), [torch.cat((weights[0], column), 1), *weights[1:]]

    @property
    def kernel(self) -> Kernel:
        """The fused function of torch."""
        return torch.lstm


class GRUCell(WeightedCell):
    """Gated recurrent unit (GRU) cell.

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
        init_state: The initializer of the initial hidden state, which unless it is zeros or learned is drawn again for
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
        """Return the projection of the input, without `bias_hh`, part of which the reset gate multiplies."""
        return project_gru(x, weights)

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next hidden state."""
        return gru_step(projected, carry, weights)

    @property
    def kernel(self) -> Kernel:
        """The fused function of torch."""
        return torch.gru
