"""What the normalising layers share: parameters and statistics, the check of the channels, the arithmetic, prints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import (
    differentiate_again,
    first_order,
    functional,
    kernel_with_formula,
    reverse_alone,
    saved_aside,
    transformed,
)
from luxtorch.core import TRAINING, InputError, Layer, Parameters, Static, show_value
from luxtorch.init import Initializer, ones, zeros
from luxtorch.random import fold_in

from ._activations import Activation, as_activation

HALVES = (torch.float16, torch.bfloat16)
COUNT = "num_batches_tracked"


class FeatureNorm(Layer):
    """Hold what normalisations with a weight, a bias and running statistics for each feature have in common."""

    num_features: int
    activation: Activation | str | None = None
    _: KW_ONLY
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    bias: bool = True
    track_running_stats: bool = True
    init_weight: Initializer = ones
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        self._set(activation=as_activation(self.activation))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and `bias`, if there are any."""
        return initial_affine(self, key, (self.num_features,))

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the running statistics, if they are tracked, and the mode."""
        st: dict[str, Any] = {}
        if self.track_running_stats:
            st["running_mean"] = torch.zeros(self.num_features, device=key.device)
            st["running_var"] = torch.ones(self.num_features, device=key.device)
            st[COUNT] = torch.zeros((), dtype=torch.int64, device=key.device)
        return {**st, TRAINING: Static(True)}


def initial_affine(layer: Any, key: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the first `weight` and `bias` of a normalisation, as far as it has them."""
    if not layer.affine:
        return {}
    ps = {"weight": layer.init_weight(fold_in(key, "weight"), shape)}
    if layer.bias:
        ps["bias"] = layer.init_bias(fold_in(key, "bias"), shape)
    return ps


def affine_of(layer: Any, ps: Parameters) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of a normalisation, None for what it does not have."""
    if not layer.affine:
        return None, None
    return ps["weight"], ps["bias"] if layer.bias else None


def check_channels(layer: Layer, x: Tensor, channels: int, min_ndim: int) -> None:
    """Raise unless an input has the channels in its second dimension, and enough dimensions."""
    if x.ndim < min_ndim or x.shape[1] != channels:
        raise InputError(
            "The input does not have the layer's channels.",
            expected=layer.expected_input(),
            got=f"a tensor of shape {tuple(x.shape)}",
            fix="Channels come second: (batch, channels, height, width).",
        )


def group_normalised(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise each sample over groups of channels."""
    if x.dtype not in HALVES or not transformed():
        return F.group_norm(x, groups, weight, bias, eps)
    # torch computes a derivative that can be differentiated again in the input's dtype, from differences that cancel.
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)


def layer_normalised(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise over the last dimensions, which have the given shape.

    torch's kernel has right first and second derivatives, in reverse mode; by forward mode the second is wrong, and
    by any the third.
    """
    if not functional():
        if saved_aside():
            kernel, formula = (partial(each, shape=shape, eps=eps) for each in (_layer_norm, _layer_normalised))
            return kernel_with_formula(kernel, formula, x, weight, bias)
        return differentiate_again(F.layer_norm(x, shape, weight, bias, eps), _layer_norm_formula(shape, eps))
    same = all(tensor is None or tensor.dtype == x.dtype for tensor in (weight, bias))
    # In two dtypes, as under autocast, the kernel's derivative has no batching rule. It says best what does not fit.
    if (same and first_order(x, weight, bias)) or x.shape[-len(shape) :] != shape:
        return F.layer_norm(x, shape, weight, bias, eps)
    return _layer_normalised(x, weight, bias, shape=shape, eps=eps)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _layer_normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in HALVES else x
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


@lru_cache
def _layer_norm_formula(shape: tuple[int, ...], eps: float) -> Callable[[Any], Callable[..., Tensor]]:
    return lambda node: partial(_layer_normalised, shape=shape, eps=eps)


def euclidean_norm(v: Tensor, dims: list[int] | None, *, keepdim: bool = False) -> Tensor:
    """Return the square root of the sum of squares over some dimensions, or over all; at 0 its derivatives are 0."""
    if reverse_alone():
        norm: Tensor = torch.linalg.vector_norm(v, dim=dims, keepdim=keepdim)
        return norm
    # torch does not differentiate what it computes of a norm in forward mode twice in reverse mode.
    squares = v.square().sum(dims, keepdim=keepdim)
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise each channel by given moments, in operations that every transform knows."""
    shape = (-1, *(1,) * (x.ndim - 2))
    factor = torch.rsqrt(var + eps)
    factor = factor if weight is None else factor * weight
    y = (x - mean.view(shape)) * factor.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def shown(layer: Layer, *sizes: int, activation: Activation | str | None) -> str:
    """Return for instance `32, relu, affine=False`: sizes, activation, and options that are not the default."""
    arguments = inspect.signature(type(layer)).parameters.values()
    options = [each for each in arguments if each.kind is each.KEYWORD_ONLY and not each.name.startswith("init_")]
    values = [(option.name, getattr(layer, option.name), option.default) for option in options]
    changed = [f"{name}={value}" for name, value, default in values if value != default]
    return ", ".join([*map(str, sizes), *([show_value(activation)] if activation else []), *changed])
