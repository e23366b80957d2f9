"""Random numbers by torch's private stateless Philox kernels, where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


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


def _aligned(key: Tensor, out: Tensor) -> Tensor:
    """Reshape a batch of keys to (*batch, 1, ..., 2): the kernels want one dimension more than the output has."""
    if key.ndim == 1:
        return key
    batch = key.shape[:-1]
    return key.reshape(*batch, *(1,) * (out.ndim - len(batch)), 2)
