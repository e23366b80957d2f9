"""Normalisations as layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from luxtorch.core import Layer
from luxtorch.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

from ._renamed import Renamed, RenamedBatchNorm
from ._unbatched import Unbatched


def _batch_norm(module: Any) -> Layer | None:
    if not module.track_running_stats or module.momentum is None:
        return None
    momentum = float(module.momentum)
    return RenamedBatchNorm(BatchNorm(module.num_features, eps=module.eps, momentum=momentum, affine=module.affine))


def _instance_norm(ndim: int, module: Any) -> Layer | None:
    # Without parameters torch's takes any number of channels; with statistics it keeps a count that stays zero.
    if not module.affine or module.track_running_stats:
        return None
    return Unbatched(Renamed(InstanceNorm(module.num_features, eps=module.eps, affine=True)), ndim)


def _group_norm(module: nn.GroupNorm) -> Layer:
    return Renamed(GroupNorm(module.num_channels, module.num_groups, eps=module.eps, affine=module.affine))


def _layer_norm(module: nn.LayerNorm) -> Layer:
    affine, bias = module.elementwise_affine, module.bias is not None
    return Renamed(LayerNorm(module.normalized_shape, eps=module.eps, affine=affine, bias=bias))


def _rms_norm(module: nn.RMSNorm) -> Layer:
    return Renamed(RMSNorm(module.normalized_shape, eps=module.eps, affine=module.elementwise_affine))


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
