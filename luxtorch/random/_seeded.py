"""Random numbers by a `torch.Generator` seeded from the key, where torch has no stateless kernels.

The bits differ from those of the kernels; nothing else does. On the CPU torch's generator takes 32 bits of a
seed, so that two of some 65,000 keys can be expected to draw the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

_WORD = 2**64


def split(key: Tensor, number: int) -> Tensor:
    """Return `number` keys for each key, of shape (number, *batch, 2)."""
    if key.device.type == "meta":
        return key.new_empty((number, *key.shape))
    return torch.stack([fold_in(key, i) for i in range(number)])


def fold_in(key: Tensor, data: int) -> Tensor:
    """Return the key that each key and a signed 64-bit integer lead to."""
    if key.device.type == "meta":
        return torch.empty_like(key)
    words = [_hashed(pair, data % _WORD) for pair in _pairs(key)]
    return torch.tensor(words, dtype=torch.uint64, device=key.device).reshape(key.shape)


def fold_in_tensor(key: Tensor, data: Tensor) -> Tensor:
    """Return the key that each key and one integer on the device lead to."""
    return fold_in(key, 0 if data.device.type == "meta" else int(data.item()))


def uniform(key: Tensor, shape: Sequence[int], low: float, high: float, dtype: torch.dtype) -> Tensor:
    """Draw uniformly from [low, high); each key of a batch draws its own slice of the output."""

    def fill(out: Tensor, generator: torch.Generator) -> Tensor:
        return out.uniform_(low, high, generator=generator)

    return _draw(fill, key, shape, dtype)


def normal(key: Tensor, shape: Sequence[int], mean: float, std: float, dtype: torch.dtype) -> Tensor:
    """Draw from a normal distribution; each key of a batch draws its own slice of the output."""

    def fill(out: Tensor, generator: torch.Generator) -> Tensor:
        return out.normal_(mean, std, generator=generator)

    return _draw(fill, key, shape, dtype)


def _draw(
    fill: Callable[[Tensor, torch.Generator], Tensor], key: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=key.device)
    if key.device.type == "meta":
        return out
    # A batch of keys lines up with the leading dimensions of the output, where 1 stands for any size.
    batch, rest = tuple(shape[: key.ndim - 1]), tuple(shape[key.ndim - 1 :])
    slices = out.view(math.prod(batch), *rest)
    for row, pair in zip(slices, _pairs(key.expand(*batch, 2)), strict=True):
        fill(row, torch.Generator(key.device).manual_seed(_hashed(pair, _WORD)[0]))
    return out


def _pairs(key: Tensor) -> Iterator[list[int]]:
    return iter(key.reshape(-1, 2).tolist())


def _hashed(pair: Sequence[int], data: int) -> tuple[int, int]:
    """Mix a key with a number below 2^64 (2^64 itself marks a draw) into two 64-bit words."""
    message = b"".join(word.to_bytes(9, "little") for word in (*pair, data))
    digest = blake2b(message, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
