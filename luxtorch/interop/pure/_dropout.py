"""Dropout, randomized ReLU and fractional max pooling with random numbers from a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch import random as lr
from luxtorch._torch import fractional_max_pool2d, fractional_max_pool3d
from luxtorch._transforms import functional
from luxtorch.core import InputError, described, out_of_range
from luxtorch.layers._dropout import alpha_dropped, dropped

from ._keys import Keys
from ._random import keyed


def _functional_dropout(
    keys: Keys, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    y = _dropout(keys, input, p, training)
    return _write(input, y) if inplace else y


def _dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return dropped(input, keys.next(), p, tuple(input.shape)) if _drops(p, train) else input


def _feature_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return dropped(input, keys.next(), p, _per_feature(input)) if _drops(p, train) else input


def _alpha_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return alpha_dropped(input, keys.next(), p, tuple(input.shape)) if _drops(p, train) else input


def _feature_alpha_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return alpha_dropped(input, keys.next(), p, _per_feature(input)) if _drops(p, train) else input


def _rrelu(keys: Keys, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Tensor:
    slope: Tensor | float = (lower + upper) / 2
    if training:
        slope = lr.uniform(keys.next(), tuple(input.shape), low=lower, high=upper, dtype=input.dtype)
    # Not leaky_relu, whose derivative reads the input, which may have been overwritten.
    return torch.where(input > 0, input, input * slope)


def _drops(p: float, train: bool) -> bool:
    if not 0 <= p <= 1:
        raise out_of_range("p", p, "a probability from 0 to 1")
    return train and p > 0


def _per_feature(input: Tensor) -> tuple[int, ...]:
    if input.ndim < 2:
        raise InputError(
            "The input must have two or more dimensions, of which the second is the channels.", got=described(input)
        )
    return (*input.shape[:2], *(1,) * (input.ndim - 2))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def in_place(keys: Keys, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _write(input, function(keys, input, *args, **kwargs))

    return in_place


def _write(input: Tensor, y: Tensor) -> Tensor:
    if y is input:
        return input
    try:
        return input.copy_(y)
    except RuntimeError:
        # Under vmap over keys, y may be batched where the input is not. Nearly all code uses the result.
        if not functional():
            raise
        return y


_DROPOUTS: dict[Any, Callable[..., Any]] = {
    F.dropout: _functional_dropout,
    torch.dropout: _dropout,
    torch.dropout_: _in_place(_dropout),
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _in_place(_feature_dropout),
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _in_place(_alpha_dropout),
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _in_place(_feature_alpha_dropout),
    torch.rrelu: keyed(torch.rrelu, _rrelu),
    torch.rrelu_: keyed(torch.rrelu_, _in_place(_rrelu)),
}


def _pooled(kernel: Callable[..., tuple[Tensor, Tensor]], order: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the replacement of a kernel; `order` gives the sample that belongs to each dimension."""

    def pooled(keys: Keys, x: Tensor, window: Any, output: Any, samples: Tensor) -> tuple[Tensor, Tensor]:
        if not functional():
            return kernel(x, window, output, samples)
        dims = len(order)
        sizes, counts = ((given,) * dims if isinstance(given, int) else tuple(given) for given in (window, output))
        # For a batch of one, or without a batch, there may be more samples than needed.
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
    """Return the indices that each window covers in one dimension, (..., count, size)."""
    u, numbers = sample[..., None], torch.arange(count, device=sample.device)
    step = (full - size) / (count - 1) if count > 1 else 0.0
    starts = ((numbers + u) * step).long() - (u * step).long()
    starts = torch.where(numbers == count - 1, full - size, starts)
    return starts[..., None] + torch.arange(size, device=sample.device)


_POOLS: dict[Any, Callable[..., Any]] = {
    fractional_max_pool2d: _pooled(fractional_max_pool2d, (1, 0)),
    fractional_max_pool3d: _pooled(fractional_max_pool3d, (0, 1, 2)),
}


REPLACEMENTS: dict[Any, Callable[..., Any]] = {**_DROPOUTS, **_POOLS}
