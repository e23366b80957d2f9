"""The recurrent functions of torch under every transform, with a dropout between the layers by a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import functional, transformed
from luxtorch.layers._dropout import dropped
from luxtorch.layers._fused_rnn import Carry, Kernel, scanned
from luxtorch.layers._weighted_cell import add_recurrent

from ._keys import Keys


@dataclass(frozen=True)
class _Plain:
    """Take the steps of a cell without gates, as `luxtorch.layers._fused_rnn` wants them."""

    gates: ClassVar[int] = 1
    carried: ClassVar[int] = 1

    kernel: Kernel | None
    activation: Callable[[Tensor], Tensor] = torch.tanh

    def project(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return F.linear(x, weights[0], weights[2] + weights[3] if len(weights) >= 4 else None)

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        return (self.activation(add_recurrent(projected, carry[0], weights[1])),)


@dataclass(frozen=True)
class _GRU:
    """Take the steps of a GRU."""

    gates: ClassVar[int] = 3
    carried: ClassVar[int] = 1

    kernel: Kernel | None

    def project(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return F.linear(x, weights[0], weights[2] if len(weights) >= 4 else None)

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        size = carry[0].shape[-1]
        recurrent = F.linear(carry[0], weights[1], weights[3] if len(weights) >= 4 else None)
        r, z = (projected[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid().chunk(2, -1)
        n = (projected[..., 2 * size :] + r * recurrent[..., 2 * size :]).tanh()
        return (n + z * (carry[0] - n),)


@dataclass(frozen=True)
class _LSTM(_Plain):
    """Take the steps of an LSTM, whose hidden state may be projected by one weight more."""

    gates: ClassVar[int] = 4
    carried: ClassVar[int] = 2

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        i, f, g, o = add_recurrent(projected, carry[0], weights[1]).chunk(4, -1)
        c = f.sigmoid() * carry[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (F.linear(h, weights[-1]) if len(weights) % 2 else h), c


_Cell = _Plain | _GRU

RNN_TANH, RNN_RELU = _Plain(torch.rnn_tanh), _Plain(torch.rnn_relu, torch.relu)
GRU, LSTM = _GRU(torch.gru), _LSTM(torch.lstm)
PROJECTED = _LSTM(None)
"""An LSTM with a projection, for which there is no kernel of one layer that could serve step by step too."""


def _over_time(cell: _Cell) -> Callable[..., tuple[Tensor, ...]]:
    """Return what is called in place of torch's function of a cell over sequences."""

    def over_time(keys: Keys, *args: Any) -> tuple[Tensor, ...]:
        packed = not isinstance(args[3], bool)
        data, hx, weights = (args[0], *args[2:4]) if packed else args[:3]
        biases, layers, dropout, train, bidirectional = args[4:9] if packed else args[3:8]
        carry = tuple(hx) if cell.carried == 2 else (hx,)
        drops = train and dropout > 0
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (data, *carry, *weights))
        if not drops and not transformed() and (packed or not recorded):
            return cell.kernel(*args)  # type: ignore[misc, no-any-return]
        projects = cell.carried == 2 and carry[0].shape[-1] != carry[1].shape[-1]
        size = (4 if biases else 2) + projects
        each = [weights[start : start + size] for start in range(0, len(weights), size)]
        swap = not packed and args[8] and data.ndim == 3
        lengths = args[1].tolist() if packed else None
        xs, last = data.transpose(0, 1) if swap else data, []
        run = _PackedRun(PROJECTED if projects else cell, lengths) if lengths else _Run(PROJECTED if projects else cell)
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

    cell: _Cell

    def __call__(self, xs: Tensor, carry: Carry, weights: Sequence[Tensor], backward: bool) -> tuple[Tensor, Carry]:
        ys, carry = scanned(self.cell, xs.flip(0) if backward else xs, carry, weights)
        return ys.flip(0) if backward else ys, carry


@dataclass(frozen=True)
class _PackedRun:
    """Run a cell over packed sequences, (all steps, features), of which some end before others."""

    cell: _Cell
    running: Sequence[int]

    def __call__(self, xs: Tensor, carry: Carry, weights: Sequence[Tensor], backward: bool) -> tuple[Tensor, Carry]:
        projected = self.cell.project(xs, weights)
        ends = list(accumulate(self.running))
        steps = [projected[end - size : end] for end, size in zip(ends, self.running, strict=True)]
        current, ys = carry, []
        for step in reversed(steps) if backward else steps:
            # The sequences are sorted by length: those that have ended, or not begun when read backward, come last.
            active = tuple(part[: len(step)] for part in current)
            resting = tuple(part[len(step) :] for part in current)
            active = self.cell.advance(step, active, weights)
            ys.append(active[0])
            current = tuple(torch.cat(parts) for parts in zip(active, resting, strict=True))
        return torch.cat(ys[::-1] if backward else ys), current


def _one_step(cell: _Cell, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called in place of torch's function of a cell for one step."""

    def one_step(keys: Keys, x: Tensor, hx: Any, *given: Tensor | None) -> Any:
        if not functional():
            return function(x, hx, *given)
        weights = [weight for weight in given if weight is not None]
        carry = cell.advance(cell.project(x, weights), tuple(hx) if cell.carried == 2 else (hx,), weights)
        return carry if cell.carried == 2 else carry[0]

    return one_step


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _over_time(LSTM),
    torch.gru: _over_time(GRU),
    torch.rnn_tanh: _over_time(RNN_TANH),
    torch.rnn_relu: _over_time(RNN_RELU),
    torch.lstm_cell: _one_step(LSTM, torch.lstm_cell),
    torch.gru_cell: _one_step(GRU, torch.gru_cell),
    torch.rnn_tanh_cell: _one_step(RNN_TANH, torch.rnn_tanh_cell),
    torch.rnn_relu_cell: _one_step(RNN_RELU, torch.rnn_relu_cell),
}
