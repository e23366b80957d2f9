"""Fractional max pooling, whose kernels have no batching rule, by gathering the windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import fractional_max_pool2d, fractional_max_pool3d
from luxtorch._transforms import functional

from ._keys import Keys


def _pooled(kernel: Callable[..., tuple[Tensor, Tensor]], order: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what is called in place of a kernel; `order` says which sample belongs to which dimension."""

    def pooled(keys: Keys, x: Tensor, window: Any, output: Any, samples: Tensor) -> tuple[Tensor, Tensor]:
        if not functional():
            return kernel(x, window, output, samples)
        dims = len(order)
        sizes, counts = ((given,) * dims if isinstance(given, int) else tuple(given) for given in (window, output))
        # For a batch of one, or for none, there may be more samples than are needed.
        samples = samples[: 1 if x.ndim == dims + 1 else x.shape[0]].reshape(*x.shape[:-dims], dims)
        index = torch.zeros((), dtype=torch.int64, device=x.device)
        for dim in range(dims):
            full = x.shape[dim - dims]
            rows = _windows(samples[..., order[dim]], full, sizes[dim], counts[dim])
            # (..., windows, places in one), where each dimension multiplies the number of both.
            index = index[..., :, None, :, None] * full + rows[..., None, :, None, :] if dim else rows
            index = index.flatten(-2).flatten(-3, -2) if dim else index
        values = x.flatten(-dims).gather(-1, index.flatten(-2)).view(index.shape)
        best = values.argmax(-1, keepdim=True)
        shape = (*x.shape[:-dims], *counts)
        return values.gather(-1, best).view(shape), index.gather(-1, best).view(shape)

    return pooled


def _windows(sample: Tensor, full: int, size: int, count: int) -> Tensor:
    """Return the places that each window covers in one dimension, (..., count, size)."""
    u, numbers = sample[..., None], torch.arange(count, device=sample.device)
    step = (full - size) / (count - 1) if count > 1 else 0.0
    starts = ((numbers + u) * step).long() - (u * step).long()
    starts = torch.where(numbers == count - 1, full - size, starts)
    return starts[..., None] + torch.arange(size, device=sample.device)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    fractional_max_pool2d: _pooled(fractional_max_pool2d, (1, 0)),
    fractional_max_pool3d: _pooled(fractional_max_pool3d, (0, 1, 2)),
}
