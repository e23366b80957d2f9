"""What the normalising layers share: the check of the channels, the arithmetic, and how they print."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, Layer, show_value

from ._activations import Activation

HALVES = (torch.float16, torch.bfloat16)


def check_channels(layer: Layer, x: Tensor, channels: int, min_ndim: int) -> None:
    """Raise unless an input has the channels in its second dimension, and enough dimensions."""
    if x.ndim < min_ndim or x.shape[1] != channels:
        raise InputError(
            "The input does not have the layer's channels.",
            expected=layer.expected_input(),
            got=f"a tensor of shape {tuple(x.shape)}",
            fix="Channels come second: (batch, channels, height, width).",
        )


def group_normalised(x: Tensor, groups: int, scale: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise each sample over groups of channels."""
    if x.dtype not in HALVES or not transformed():
        return F.group_norm(x, groups, scale, bias, eps)
    # torch computes a derivative that can be differentiated again in the input's dtype, from differences that cancel.
    scale, bias = (None if tensor is None else tensor.float() for tensor in (scale, bias))
    return F.group_norm(x.float(), groups, scale, bias, eps).to(x.dtype)


def normalised(x: Tensor, mean: Tensor, var: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise each channel by given moments, in operations that every transform knows."""
    shape = (-1, *(1,) * (x.ndim - 2))
    factor = torch.rsqrt(var + eps)
    factor = factor if scale is None else factor * scale
    y = (x - mean.view(shape)) * factor.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def shown(layer: Layer, *sizes: int, activation: Activation | str | None, **defaults: object) -> str:
    """Return for instance `32, relu, affine=False`: sizes, activation, and options that are not the default."""
    changed = [
        f"{name}={getattr(layer, name)}" for name, default in defaults.items() if getattr(layer, name) != default
    ]
    return ", ".join([*map(str, sizes), *([show_value(activation)] if activation else []), *changed])
