"""Normalization of each sample by itself: `LayerNorm`, `RMSNorm` and `GroupNorm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    saved_aside,
    transformed,
)
from luxtorch.core import Layer, Parameters, States, out_of_range, wrong_type
from luxtorch.core._renamed import renamed_option
from luxtorch.core._sharded import settled
from luxtorch.init import Initializer, ones, zeros
from luxtorch.random import fold_in

from ._activations import Activation, activated, as_activation
from ._shared import HALVES, arguments_text, initial_weight_and_bias, parameter, require_size, unfit


def initial_affine(layer: Any, key: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the initial `weight` and `bias` of a normalization, those that it has."""
    return initial_weight_and_bias(layer, key, shape, shape) if layer.affine else {}


def affine_of(layer: Any, ps: Parameters) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of a normalization, None where it has none."""
    if not layer.affine:
        return None, None
    return parameter(ps, "weight"), parameter(ps, "bias") if layer.bias else None


def check_channels(layer: Layer, x: Tensor, channels: int, min_ndim: int) -> None:
    """Raise unless an input has the channels in its second dimension, and enough dimensions."""
    if x.ndim < min_ndim or x.shape[1] != channels:
        fix = "Channels come second: (batch, channels, height, width)."
        raise unfit(layer, x, f"The input must have {channels} channels.", fix=fix)


def group_normalized(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize each sample over groups of channels."""
    if x.dtype not in HALVES or not transformed():
        return F.group_norm(x, groups, weight, bias, eps)
    # torch's differentiable derivative is computed in the input's dtype, where differences cancel.
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)


def layer_normalized(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize over the last dimensions, which have the given shape.

    torch's kernel has correct first and second derivatives in reverse mode; in forward mode the second is wrong, and
    in any mode the third.
    """
    if not functional():
        if saved_aside():
            kernel, formula = (partial(each, shape=shape, eps=eps) for each in (_layer_norm, _layer_normalized))
            return kernel_with_formula(kernel, formula, x, weight, bias)
        return differentiate_again(F.layer_norm(x, shape, weight, bias, eps), _layer_norm_formula(shape, eps))
    same = all(tensor is None or tensor.dtype == x.dtype for tensor in (weight, bias))
    # With two dtypes, as under autocast, the kernel's derivative has no batching rule. Its own errors are clear.
    if (same and first_order(x, weight, bias)) or x.shape[-len(shape) :] != shape:
        return F.layer_norm(x, shape, weight, bias, eps)
    return _layer_normalized(x, weight, bias, shape=shape, eps=eps)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _layer_normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    wide = x.float() if x.dtype in HALVES else x
    centered = wide - wide.mean(dims, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


@lru_cache
def _layer_norm_formula(shape: tuple[int, ...], eps: float) -> Callable[[Any], Callable[..., Tensor]]:
    return lambda node: partial(_layer_normalized, shape=shape, eps=eps)


class _LastDimensionsNorm(Layer):
    """Base class of `LayerNorm` and `RMSNorm`."""

    shape: tuple[int, ...]

    def expected_input(self) -> str:
        """Name the last dimensions."""
        return f"a tensor of shape (..., {', '.join(map(str, self.shape))})"

    def extra_repr(self) -> str:
        """Return for instance `32, relu`."""
        return arguments_text(self, *self.shape)


@renamed_option("init_scale", "init_weight")
class LayerNorm(_LastDimensionsNorm):
    """Layer normalization over the last dimensions of each sample, the same in train and in test mode.

    Lux's default is one mean and variance over the whole array, the batch included; here, as in torch, the
    normalized dimensions are always those of `shape`.

    Args:
        shape: The size of the input's last dimension, or the shape of its last dimensions.
        activation: A function of a tensor, or the name of one; None for none.
        eps: Added to the variance.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: shape, unless `affine=False`
        bias: shape, unless `affine=False` or `bias=False`

    Shape:
        (..., *shape) to the same

    Raises:
        InputError: If the input has other last dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.LayerNorm(2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[0.0, 2.0], [30.0, 10.0]]), ps, st)
        >>> y
        tensor([[-1.0000,  1.0000],
                [ 1.0000, -1.0000]])

    Source: Lux's `LayerNorm`, `torch.nn.LayerNorm`; Ba et al., "Layer Normalization", 2016.
    """

    activation: Activation | str | None
    eps: float
    affine: bool
    bias: bool
    init_weight: Initializer
    init_bias: Initializer

    def __init__(
        self,
        shape: int | Sequence[int],
        activation: Activation | str | None = None,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        init_weight: Initializer = ones,
        init_bias: Initializer = zeros,
    ) -> None:
        self._set(
            shape=_last_dimensions(shape), activation=as_activation(activation), eps=eps, affine=affine, bias=bias
        )
        self._set(init_weight=init_weight, init_bias=init_bias)

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and `bias`, if there are any."""
        return initial_affine(self, key, self.shape)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalized input and `st`."""
        y = settled(layer_normalized(x, self.shape, *affine_of(self, ps), self.eps))
        return activated(y, self.activation), st


@renamed_option("init_scale", "init_weight")
class RMSNorm(_LastDimensionsNorm):
    """Root mean square normalization over the last dimensions of each sample.

    Args:
        shape: The size of the input's last dimension, or the shape of its last dimensions.
        eps: Added to the mean square; None for `torch.finfo(dtype).eps`.
        affine: Whether there is a weight.
        init_weight: The initializer of the weight.

    Parameters:
        weight: shape, unless `affine=False`

    Shape:
        (..., *shape) to the same

    Raises:
        InputError: If the input has other last dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.RMSNorm(2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([1.0, 7.0]), ps, st)
        >>> y
        tensor([0.2000, 1.4000])

    Source: Lux's `RMSNorm`, `torch.nn.RMSNorm`; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    eps: float | None
    affine: bool
    init_weight: Initializer

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        eps: float | None = None,
        affine: bool = True,
        init_weight: Initializer = ones,
    ) -> None:
        self._set(shape=_last_dimensions(shape), eps=eps, affine=affine, init_weight=init_weight)

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight`, if there is one."""
        return {"weight": self.init_weight(fold_in(key, "weight"), self.shape)} if self.affine else {}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalized input and `st`."""
        if x.is_complex():  # torch would take the mean of squares for that of absolute squares
            raise wrong_type("The input", x, "real floating-point numbers")
        weight = parameter(ps, "weight") if self.affine else None
        return settled(F.rms_norm(x, self.shape, weight, self.eps)), st


def _last_dimensions(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the normalized shape as a tuple."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or min(sizes) < 1:
        raise out_of_range("shape", shape, "a size, or a tuple of sizes, of at least 1")
    return sizes


@renamed_option("init_scale", "init_weight")
class GroupNorm(Layer):
    """Group normalization: normalize each sample over groups of channels, the same in train and in test mode.

    Args:
        num_channels: The size of the input's second dimension. It comes first, as in Lux; torch has the groups first.
        num_groups: The number of groups; it divides `num_channels`.
        activation: A function of a tensor, or the name of one; None for none.
        eps: Added to the variance.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (num_channels,), unless `affine=False`
        bias: (num_channels,), unless `affine=False` or `bias=False`

    Shape:
        (batch, num_channels, ...) to the same

    Raises:
        InputError: If the groups do not divide the channels, or the input has another number of channels.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.GroupNorm(4, 2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[0.0, 2.0, 10.0, 30.0]]), ps, st)
        >>> y
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])

    Source: Lux's `GroupNorm`, `torch.nn.GroupNorm`; Wu and He, "Group Normalization", 2018.
    """

    num_channels: int
    num_groups: int
    activation: Activation | str | None = None
    _: KW_ONLY
    eps: float = 1e-5
    affine: bool = True
    bias: bool = True
    init_weight: Initializer = ones
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        require_size("num_channels", self.num_channels)
        require_size("num_groups", self.num_groups)
        if self.num_channels % self.num_groups:
            fix = "The channels come first: GroupNorm(num_channels, num_groups); torch has them second."
            raise out_of_range(
                "num_channels", self.num_channels, f"a multiple of num_groups={self.num_groups}", fix=fix
            )
        self._set(activation=as_activation(self.activation))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and `bias`, if there are any."""
        return initial_affine(self, key, (self.num_channels,))

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalized input and `st`."""
        check_channels(self, x, self.num_channels, 2)
        return activated(group_normalized(x, self.num_groups, *affine_of(self, ps), self.eps), self.activation), st

    def expected_input(self) -> str:
        """Name the channels."""
        return f"a tensor of shape (batch, {self.num_channels}, ...)"

    def extra_repr(self) -> str:
        """Return for instance `32, 4, relu`."""
        return arguments_text(self, self.num_channels, self.num_groups)
