"""Random numbers by torch's private stateless Philox kernels, where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from luxtorch._torch import outside_transforms, without_modes


@cache
def has_kernels(device_type: str) -> bool:
    """Tell whether torch has its stateless Philox kernels on a kind of device.

    They came to CUDA with torch 2.13 and to the CPU with 2.14, under private names.
    """
    dispatch_key = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}.get(device_type)
    names = ("_philox_key_split", "_philox_key_fold_in", "_philox_uniform_", "_philox_normal_")
    if dispatch_key is None or not all(hasattr(torch.ops.aten, name) for name in names):
        return False
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", dispatch_key) for name in names)


def split(key: Tensor, number: int) -> Tensor:
    """Return `number` keys for each key, of shape (number, *batch, 2)."""
    return torch.ops.aten._philox_key_split(key, number)  # type: ignore[no-any-return]


def fold_in(key: Tensor, data: int) -> Tensor:
    """Return the key that each key and a signed 64-bit integer lead to."""
    return torch.ops.aten._philox_key_fold_in(key, data)  # type: ignore[no-any-return]


def fold_in_tensor(key: Tensor, data: Tensor) -> Tensor:
    """Return the key that each key and one integer on the device lead to."""
    return torch.ops.aten._philox_key_fold_in.Tensor(key, data.to(torch.uint64))  # type: ignore[no-any-return]


def uniform(key: Tensor, shape: Sequence[int], low: float, high: float, dtype: torch.dtype) -> Tensor:
    """Draw uniformly from [low, high); each key of a batch draws its own slice of the output."""
    out = torch.empty(shape, dtype=dtype, device=key.device)
    return torch.ops.aten._philox_uniform_(out, _aligned(key, out), low, high)  # type: ignore[no-any-return]


def normal(key: Tensor, shape: Sequence[int], mean: float, std: float, dtype: torch.dtype) -> Tensor:
    """Draw from a normal distribution; each key of a batch draws its own slice of the output."""
    out = torch.empty(shape, dtype=dtype, device=key.device)
    return torch.ops.aten._philox_normal_(out, _aligned(key, out), mean, std)  # type: ignore[no-any-return]


_BLOCK = 4
"""How many float32 numbers come of one count; the second number of a key is the first count."""


def advanced(key: Tensor, start: int) -> tuple[Tensor, int]:
    """Return a key that draws the float32 numbers from `start` on, after as many others as are returned too."""
    count = torch.tensor([0, start // _BLOCK], device=key.device)
    return (key.view(torch.int64) + count).view(torch.uint64), start % _BLOCK


@cache
def begins_anywhere(device_type: str) -> bool:
    """Tell whether the numbers that a kernel draws depend on the count alone, not on how many are drawn."""
    if not has_kernels(device_type) or device_type == "meta":
        return False
    with outside_transforms(), without_modes():
        key = torch.zeros(2, dtype=torch.uint64, device=device_type)
        drawn = uniform(key, (1000,), 0.0, 1.0, torch.float32)
        later, skipped = advanced(key, 333)
        return torch.equal(uniform(later, (100,), 0.0, 1.0, torch.float32)[skipped:], drawn[333 : 433 - skipped])


def _aligned(key: Tensor, out: Tensor) -> Tensor:
    """Reshape a batch of keys to (*batch, 1, ..., 2): the kernels want one dimension more than the output has."""
    if key.ndim == 1:
        return key
    batch = key.shape[:-1]
    return key.reshape(*batch, *(1,) * (out.ndim - len(batch)), 2)
