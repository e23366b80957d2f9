"""Normalisations as layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from luxtorch.core import Layer
from luxtorch.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

from ._unbatched import Unbatched


def _batch_norm(module: Any) -> Layer:
    momentum, tracked = module.momentum, module.track_running_stats
    momentum = None if momentum is None else float(momentum)
    return BatchNorm(module.num_features, momentum=momentum, track_running_stats=tracked, **_options(module))


def _instance_norm(ndim: int, module: Any) -> Layer | None:
    if not module.affine:  # torch's takes any number of channels then
        return None
    momentum, tracked = float(module.momentum or 0.0), module.track_running_stats
    layer = InstanceNorm(module.num_features, momentum=momentum, track_running_stats=tracked, **_options(module))
    return Unbatched(layer, ndim)


def _group_norm(module: nn.GroupNorm) -> Layer:
    return GroupNorm(module.num_channels, module.num_groups, **_options(module))


def _layer_norm(module: nn.LayerNorm) -> Layer:
    affine = module.elementwise_affine
    bias = module.bias is not None or not affine
    return LayerNorm(module.normalized_shape, eps=module.eps, affine=affine, bias=bias)


def _rms_norm(module: nn.RMSNorm) -> Layer:
    return RMSNorm(module.normalized_shape, eps=module.eps, affine=module.elementwise_affine)


def _options(module: Any) -> dict[str, Any]:
    bias = module.bias is not None or not module.affine
    return {"eps": module.eps, "affine": module.affine, "bias": bias}


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.InstanceNorm1d: partial(_instance_norm, 3),
    nn.InstanceNorm2d: partial(_instance_norm, 4),
    nn.InstanceNorm3d: partial(_instance_norm, 5),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
}
