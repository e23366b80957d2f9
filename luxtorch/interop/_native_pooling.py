"""Poolings as layers; those that return indices too have none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from luxtorch.core import Layer
from luxtorch.layers import AdaptiveMaxPool, AdaptiveMeanPool, LPPool, MaxPool, MeanPool


def _per_dim(value: Any, dims: int) -> tuple[Any, ...]:
    """Return a number for each dimension, as torch takes a single one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _max_pool(dims: int, module: Any) -> MaxPool | None:
    if module.return_indices:
        return None
    return MaxPool(
        _per_dim(module.kernel_size, dims),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        ceil_mode=module.ceil_mode,
    )


def _mean_pool(dims: int, module: Any) -> MeanPool:
    return MeanPool(
        _per_dim(module.kernel_size, dims),
        stride=module.stride,
        padding=module.padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        divisor_override=getattr(module, "divisor_override", None),
    )


def _lp_pool(dims: int, module: Any) -> LPPool:
    return LPPool(
        _per_dim(module.kernel_size, dims),
        stride=module.stride,
        ceil_mode=module.ceil_mode,
        p=float(module.norm_type),
    )


def _adaptive_max_pool(dims: int, module: Any) -> AdaptiveMaxPool | None:
    return None if module.return_indices else AdaptiveMaxPool(_per_dim(module.output_size, dims))


def _adaptive_mean_pool(dims: int, module: Any) -> AdaptiveMeanPool:
    return AdaptiveMeanPool(_per_dim(module.output_size, dims))


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.MaxPool1d: partial(_max_pool, 1),
    nn.MaxPool2d: partial(_max_pool, 2),
    nn.MaxPool3d: partial(_max_pool, 3),
    nn.AvgPool1d: partial(_mean_pool, 1),
    nn.AvgPool2d: partial(_mean_pool, 2),
    nn.AvgPool3d: partial(_mean_pool, 3),
    nn.LPPool1d: partial(_lp_pool, 1),
    nn.LPPool2d: partial(_lp_pool, 2),
    nn.LPPool3d: partial(_lp_pool, 3),
    nn.AdaptiveMaxPool1d: partial(_adaptive_max_pool, 1),
    nn.AdaptiveMaxPool2d: partial(_adaptive_max_pool, 2),
    nn.AdaptiveMaxPool3d: partial(_adaptive_max_pool, 3),
    nn.AdaptiveAvgPool1d: partial(_adaptive_mean_pool, 1),
    nn.AdaptiveAvgPool2d: partial(_adaptive_mean_pool, 2),
    nn.AdaptiveAvgPool3d: partial(_adaptive_mean_pool, 3),
}
