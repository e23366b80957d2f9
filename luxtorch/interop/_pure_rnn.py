"""The recurrent functions of torch under every transform, with a dropout between the layers by a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import functional, transformed
from luxtorch.layers import GRUCell, LSTMCell, RNNCell
from luxtorch.layers._dropout import dropped
from luxtorch.layers.recurrent._cells import WeightedCell
from luxtorch.layers.recurrent._fused import Carry, scanned

from ._keys import Keys
from ._pure_packed import numbers


class _ProjectedLSTMCell(LSTMCell):
    """Be an LSTM whose hidden state is projected, by one weight more; it fits no kernel, and goes step by step."""

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the projected hidden state, and the memory."""
        h, c = super().advance(projected, carry, weights)
        return F.linear(h, weights[-1]), c


Kind: TypeAlias = Callable[..., WeightedCell]


def _cell(kind: Kind, hidden_size: int, bias: bool) -> WeightedCell:
    return kind(1, hidden_size, bias=bias)  # how wide its input is plays no part in the steps


def _over_time(function: Callable[..., Any], kind: Kind) -> Callable[..., tuple[Tensor, ...]]:
    """Return what is called in place of torch's function of a cell over sequences."""

    def over_time(keys: Keys, *args: Any) -> tuple[Tensor, ...]:
        packed = not isinstance(args[3], bool)
        data, hx, weights = (args[0], *args[2:4]) if packed else args[:3]
        biases, layers, dropout, train, bidirectional = args[4:9] if packed else args[3:8]
        carry = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        drops = train and dropout > 0
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (data, *carry, *weights))
        if not drops and not transformed() and (packed or not recorded):
            return function(*args)  # type: ignore[no-any-return]
        projects = len(carry) == 2 and carry[0].shape[-1] != carry[1].shape[-1]
        size = (4 if biases else 2) + projects
        each = [weights[start : start + size] for start in range(0, len(weights), size)]
        swap = not packed and args[8] and data.ndim == 3
        lengths = numbers(args[1]) if packed else None
        xs, last = data.transpose(0, 1) if swap else data, []
        cell = _cell(_ProjectedLSTMCell if projects else kind, carry[-1].shape[-1], biases)
        run = _PackedRun(cell, lengths) if lengths else _Run(cell)
        for layer in range(layers):
            if layer and drops:
                xs = dropped(xs, keys.next(), dropout, tuple(xs.shape))
            ways = []
            for way in range(1 + bidirectional):
                index = layer * (1 + bidirectional) + way
                ys, after = run(xs, tuple(part[index] for part in carry), each[index], bool(way))
                ways.append(ys)
                last.append(after)
            xs = torch.cat(ways, -1) if bidirectional else ways[0]
        return xs.transpose(0, 1) if swap else xs, *(torch.stack(parts) for parts in zip(*last, strict=True))

    return over_time


@dataclass(frozen=True)
class _Run:
    """Run a cell over sequences of one length, (time, ..., features), in either direction."""

    cell: WeightedCell

    def __call__(self, xs: Tensor, carry: Carry, weights: Sequence[Tensor], backward: bool) -> tuple[Tensor, Carry]:
        ys, carry = scanned(self.cell, xs.flip(0) if backward else xs, carry, weights)
        return ys.flip(0) if backward else ys, carry


@dataclass(frozen=True)
class _PackedRun:
    """Run a cell over packed sequences, (all steps, features), of which some end before others."""

    cell: WeightedCell
    running: Sequence[int]

    def __call__(self, xs: Tensor, carry: Carry, weights: Sequence[Tensor], backward: bool) -> tuple[Tensor, Carry]:
        projected = self.cell.project(xs, weights)
        steps = torch.split(projected, list(self.running))
        current, ys = carry, []
        for step in reversed(steps) if backward else steps:
            # The sequences are sorted by length: those that have ended, or not begun when read backward, come last.
            active = tuple(part[: len(step)] for part in current)
            resting = tuple(part[len(step) :] for part in current)
            active = self.cell.advance(step, active, weights)
            ys.append(active[0])
            current = tuple(torch.cat(parts) for parts in zip(active, resting, strict=True))
        return torch.cat(ys[::-1] if backward else ys), current


def _one_step(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """Return what is called in place of torch's function of a cell for one step."""

    def one_step(keys: Keys, x: Tensor, hx: Any, *given: Tensor | None) -> Any:
        if not functional():
            return function(x, hx, *given)
        weights = [weight for weight in given if weight is not None]
        carry = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        cell = _cell(kind, carry[0].shape[-1], len(weights) == 4)
        after = cell.advance(cell.project(x, weights), carry, weights)
        return after[0] if isinstance(hx, Tensor) else after

    return one_step


_TANH, _RELU = partial(RNNCell, activation=torch.tanh), partial(RNNCell, activation=torch.relu)

REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _over_time(torch.lstm, LSTMCell),
    torch.gru: _over_time(torch.gru, GRUCell),
    torch.rnn_tanh: _over_time(torch.rnn_tanh, _TANH),
    torch.rnn_relu: _over_time(torch.rnn_relu, _RELU),
    torch.lstm_cell: _one_step(torch.lstm_cell, LSTMCell),
    torch.gru_cell: _one_step(torch.gru_cell, GRUCell),
    torch.rnn_tanh_cell: _one_step(torch.rnn_tanh_cell, _TANH),
    torch.rnn_relu_cell: _one_step(torch.rnn_relu_cell, _RELU),
}
