"""Modules that move values around as layers: flattening, padding, shuffling and upsampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from luxtorch.core import Layer
from luxtorch.layers import FlattenLayer, Pad, Upsample, WrappedFunction

from ._function import function


def _flatten(module: nn.Flatten) -> FlattenLayer:
    return FlattenLayer(module.start_dim, module.end_dim)


def _unflatten(module: nn.Unflatten) -> Layer | None:
    if not isinstance(module.dim, int):  # a named dimension
        return None
    return WrappedFunction(function(torch.unflatten, dim=module.dim, sizes=tuple(module.unflattened_size)))


def _pad(mode: str, module: Any) -> Pad:
    flat = module.padding
    # torch's numbers begin with those of the last dimension.
    pairs = tuple(zip(flat[-2::-2], flat[::-2], strict=True))
    return Pad(pairs, mode, value=getattr(module, "value", 0) if mode == "constant" else 0)


def _upsample(module: nn.Upsample) -> Upsample | None:
    if module.recompute_scale_factor:
        return None
    return Upsample(
        module.mode,
        scale_factor=module.scale_factor,
        size=module.size,
        align_corners=bool(module.align_corners),
    )


# luxtorch's own shuffles take any number of dimensions after the channels; torch's take two, and any before.
def _pixel_shuffle(module: nn.PixelShuffle) -> WrappedFunction:
    return WrappedFunction(function(F.pixel_shuffle, upscale_factor=module.upscale_factor))


def _pixel_unshuffle(module: nn.PixelUnshuffle) -> WrappedFunction:
    return WrappedFunction(function(F.pixel_unshuffle, downscale_factor=module.downscale_factor))


_MODES = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}

CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.PixelShuffle: _pixel_shuffle,
    nn.PixelUnshuffle: _pixel_unshuffle,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    **{kind: partial(_pad, mode) for mode, kinds in _MODES.items() for kind in kinds},
}
