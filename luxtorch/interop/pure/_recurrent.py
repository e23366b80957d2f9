"""LSTM, GRU and RNN functions of torch under every transform, and packed sequences by indexing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._torch import pack_padded_sequence, pad_packed_sequence, pad_sequence
from luxtorch._transforms import functional, traced, transformed
from luxtorch.core import InputError, out_of_range
from luxtorch.layers import GRUCell, LSTMCell, RNNCell
from luxtorch.layers._dropout import dropped
from luxtorch.layers.recurrent._cells import WeightedCell
from luxtorch.layers.recurrent._fused import Carry, scanned

from ._keys import Keys


def numbers(lengths: Tensor) -> list[int]:
    """Return lengths as numbers, which shapes depend on; raise if they cannot be read."""
    if torch.compiler.is_compiling():
        return lengths.tolist()  # a graph break of torch.compile, if allowed
    if not traced():
        try:
            return lengths.tolist()
        except RuntimeError:  # they are batched by vmap
            pass
    raise InputError(
        "Lengths of packed sequences must not be traced by lt.jit or batched by vmap, as shapes depend on them.",
        fix="Leave the padding in, by lt.Recurrence or lt.BidirectionalRNN with lengths; or call the model without "
        "lt.jit, and vmap it over inputs of the same lengths.",
    )


def _pack(keys: Keys, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    if not functional() and (torch.compiler.is_compiling() or not traced()):
        return pack_padded_sequence(input, lengths, batch_first)
    counts = numbers(lengths)
    xs = input.transpose(0, 1) if batch_first else input
    time, batch = xs.shape[:2]
    if len(counts) != batch or sorted(counts, reverse=True) != counts or not 1 <= counts[-1] <= counts[0] <= time:
        expected, fix = f"{batch} numbers from {time} down to 1", "If they are not sorted, pass enforce_sorted=False."
        raise out_of_range("The lengths", counts, expected, fix=fix)
    running = torch.arange(counts[0])[:, None] < torch.tensor(counts)
    order = running.flatten().nonzero().squeeze(1)
    return xs.flatten(0, 1).index_select(0, order.to(xs.device)), running.sum(1)


def _pad(
    keys: Keys, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    if not functional():
        return pad_packed_sequence(data, batch_sizes, batch_first, padding_value, total_length)
    sizes = numbers(batch_sizes)
    running = torch.arange(sizes[0]) < F.pad(torch.tensor(sizes), (0, total_length - len(sizes)))[:, None]
    places = (running.flatten().cumsum(0) - 1).to(data.device)
    found = data.index_select(0, places).reshape(*running.shape, *data.shape[1:])
    padded = torch.where(running.to(data.device).reshape(*running.shape, *(1,) * (data.ndim - 1)), found, padding_value)
    return padded.transpose(0, 1) if batch_first else padded, running.sum(0)


def _pad_sequence(
    keys: Keys,
    sequences: Any,
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: Any = "right",
) -> Tensor:
    if not functional():
        return pad_sequence(sequences, batch_first, padding_value, padding_side)
    longest = max(x.shape[0] for x in sequences)

    def padded(x: Tensor) -> Tensor:
        missing = longest - x.shape[0]
        ends = (missing, 0) if padding_side == "left" else (0, missing)
        return F.pad(x, (*(0, 0) * (x.ndim - 1), *ends), value=padding_value)

    return torch.stack(list(map(padded, sequences)), 0 if batch_first else 1)


_PACKED: dict[Any, Callable[..., Any]] = {
    pad_sequence: _pad_sequence,
    pack_padded_sequence: _pack,
    pad_packed_sequence: _pad,
}


class _ProjectedLSTMCell(LSTMCell):
    """Compute an LSTM with a projected hidden state, step by step, as no kernel has the projection."""

    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the projected hidden state, and the memory."""
        h, c = super().advance(projected, carry, weights)
        return F.linear(h, weights[-1]), c


Kind: TypeAlias = Callable[..., WeightedCell]


def _cell(kind: Kind, hidden_size: int, bias: bool) -> WeightedCell:
    return kind(1, hidden_size, bias=bias)  # the width of the input does not matter for the steps


def _over_time(function: Callable[..., Any], kind: Kind) -> Callable[..., tuple[Tensor, ...]]:
    """Return the replacement of a torch function that runs a cell over sequences."""

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
    """Run a cell over packed sequences, (all steps, features), of different lengths."""

    cell: WeightedCell
    running: Sequence[int]

    def __call__(self, xs: Tensor, carry: Carry, weights: Sequence[Tensor], backward: bool) -> tuple[Tensor, Carry]:
        projected = self.cell.project(xs, weights)
        steps = torch.split(projected, list(self.running))
        current, ys = carry, []
        for step in reversed(steps) if backward else steps:
            # Sequences are sorted by length: those that have ended, or backward not begun, come last.
            active = tuple(part[: len(step)] for part in current)
            resting = tuple(part[len(step) :] for part in current)
            active = self.cell.advance(step, active, weights)
            ys.append(active[0])
            current = tuple(torch.cat(parts) for parts in zip(active, resting, strict=True))
        return torch.cat(ys[::-1] if backward else ys), current


def _one_step(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """Return the replacement of a torch function for one step of a cell."""

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

_RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: _over_time(torch.lstm, LSTMCell),
    torch.gru: _over_time(torch.gru, GRUCell),
    torch.rnn_tanh: _over_time(torch.rnn_tanh, _TANH),
    torch.rnn_relu: _over_time(torch.rnn_relu, _RELU),
    torch.lstm_cell: _one_step(torch.lstm_cell, LSTMCell),
    torch.gru_cell: _one_step(torch.gru_cell, GRUCell),
    torch.rnn_tanh_cell: _one_step(torch.rnn_tanh_cell, _TANH),
    torch.rnn_relu_cell: _one_step(torch.rnn_relu_cell, _RELU),
}


REPLACEMENTS: dict[Any, Callable[..., Any]] = {**_PACKED, **_RECURRENT}
