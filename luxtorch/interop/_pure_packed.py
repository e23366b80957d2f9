"""Packing sequences of different lengths, and padding them, by indices: torch's functions write, or lack rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._torch import pack_padded_sequence, pad_packed_sequence, pad_sequence
from luxtorch._transforms import functional, traced
from luxtorch.core import InputError

from ._keys import Keys


def numbers(lengths: Tensor) -> list[int]:
    """Return lengths as numbers; raise where they have none, for they decide about shapes."""
    if torch.compiler.is_compiling():
        return lengths.tolist()  # where torch.compile breaks its graph, if it may
    if not traced():
        try:
            return lengths.tolist()
        except RuntimeError:  # they are a batch of vmap's
            pass
    raise InputError(
        "How packed sequences lie in memory depends on the numbers of their lengths.",
        expected="lengths that are the same for all that vmap runs, outside of jitted functions",
        got="lengths that are traced, or batched",
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
        raise InputError(
            "The lengths do not fit the sequences that are to be packed.",
            expected=f"{batch} numbers from {time} down to 1",
            got=str(counts),
            fix="Unless they are sorted, say enforce_sorted=False.",
        )
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


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    pad_sequence: _pad_sequence,
    pack_padded_sequence: _pack,
    pad_packed_sequence: _pad,
}
