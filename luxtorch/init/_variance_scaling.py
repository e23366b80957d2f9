"""Variance scaling: initializers that keep the variance of activations from layer to layer, by fan-in and fan-out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from luxtorch._errors import out_of_range, suggest

from ._distributions import centered_normal, centered_uniform
from ._initializer import initializer


@initializer
def glorot_uniform(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, gain: float = 1.0) -> Tensor:
    """Draw uniformly with standard deviation `gain * sqrt(2 / (fan_in + fan_out))` (Xavier initialization).

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the weight, (out, in, *kernel). A vector counts as (n, 1).
        gain: A factor that belongs to the activation, see `calculate_gain`.
        dtype: The dtype; if complex, real and imaginary part have half of the variance each.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`, in [-a, a) with `a = gain * sqrt(6 / (fan_in + fan_out))`. Source: Glorot and Bengio,
        "Understanding the difficulty of training deep feedforward neural networks", 2010; `xavier_uniform_` in torch.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import glorot_uniform
        >>> weight = glorot_uniform(lr.key(0), (2, 4))
        >>> weight.shape, bool(weight.abs().max() <= 1.0)
        (torch.Size([2, 4]), True)
        >>> glorot_uniform(gain=2.0)  # bound, to hand to a layer
        glorot_uniform(gain=2.0)
    """
    return centered_uniform(key, shape, dtype, _glorot_std(shape, gain))


@initializer
def glorot_normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, gain: float = 1.0) -> Tensor:
    """Draw normally with standard deviation `gain * sqrt(2 / (fan_in + fan_out))` (Xavier initialization).

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the weight, (out, in, *kernel). A vector counts as (n, 1).
        gain: A factor that belongs to the activation, see `calculate_gain`.
        dtype: The dtype; if complex, real and imaginary part have half of the variance each.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: as `glorot_uniform`; `xavier_normal_` in torch.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import glorot_normal
        >>> glorot_normal(lr.key(0), (2, 4)).shape
        torch.Size([2, 4])
    """
    return centered_normal(key, shape, dtype, _glorot_std(shape, gain))


@initializer
def kaiming_uniform(
    key: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    gain: float = math.sqrt(2.0),
    mode: Literal["fan_in", "fan_out"] = "fan_in",
) -> Tensor:
    """Draw uniformly with standard deviation `gain / sqrt(fan)` (He initialization).

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the weight, (out, in, *kernel). A vector counts as (n, 1).
        gain: A factor that belongs to the activation, see `calculate_gain`; the default is that of relu.
        mode: The fan: "fan_in" keeps the variance of the forward pass, "fan_out" that of the backward pass.
        dtype: The dtype; if complex, real and imaginary part have half of the variance each.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`, in [-a, a) with `a = gain * sqrt(3 / fan)`. Source: He et al., "Delving deep into
        rectifiers", 2015; `kaiming_uniform_` in torch.

    Raises:
        InputError: If `mode` is not one of the two.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import kaiming_uniform
        >>> bool(kaiming_uniform(lr.key(0), (2, 6)).abs().max() <= 1.0)
        True
    """
    return centered_uniform(key, shape, dtype, _kaiming_std(shape, gain, mode))


@initializer
def kaiming_normal(
    key: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    gain: float = math.sqrt(2.0),
    mode: Literal["fan_in", "fan_out"] = "fan_in",
) -> Tensor:
    """Draw normally with standard deviation `gain / sqrt(fan)` (He initialization).

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the weight, (out, in, *kernel). A vector counts as (n, 1).
        gain: A factor that belongs to the activation, see `calculate_gain`; the default is that of relu.
        mode: The fan: "fan_in" keeps the variance of the forward pass, "fan_out" that of the backward pass.
        dtype: The dtype; if complex, real and imaginary part have half of the variance each.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: as `kaiming_uniform`; `kaiming_normal_` in torch.

    Raises:
        InputError: If `mode` is not one of the two.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import kaiming_normal
        >>> kaiming_normal(mode="fan_out")(lr.key(0), (8, 3, 5, 5)).shape
        torch.Size([8, 3, 5, 5])
    """
    return centered_normal(key, shape, dtype, _kaiming_std(shape, gain, mode))


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return fan_in and fan_out, both at least 1 so that empty weights have a scale too."""
    if len(shape) < 2:
        return 1, max(1, math.prod(shape))
    field = math.prod(shape[2:])
    return max(1, shape[1] * field), max(1, shape[0] * field)


def _glorot_std(shape: tuple[int, ...], gain: float) -> float:
    return gain * math.sqrt(2.0 / sum(_fans(shape)))


def _kaiming_std(shape: tuple[int, ...], gain: float, mode: str) -> float:
    modes = ("fan_in", "fan_out")
    if mode not in modes:
        raise out_of_range("mode", mode, "'fan_in' or 'fan_out'", fix=suggest(mode, modes))
    return gain / math.sqrt(_fans(shape)[modes.index(mode)])


_GAINS = {
    "identity": 1.0,
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4.0,
}


def calculate_gain(activation: str | Callable[..., Any], negative_slope: float = 0.01) -> float:
    """Return the gain that an initializer should use before an activation.

    Args:
        activation: The name of an activation; or the function itself, for instance `torch.tanh`, which is looked up
            by its name. A function that is not in the table has gain 1.
        negative_slope: The slope of leaky_relu below zero; other activations ignore it.

    Returns:
        The gain, as in `torch.nn.init.calculate_gain`.

    Raises:
        InputError: If there is no activation of that name.

    Example:
        >>> import torch
        >>> from luxtorch.init import calculate_gain, glorot_uniform
        >>> calculate_gain(torch.tanh) == calculate_gain("tanh") == 5 / 3
        True
        >>> glorot_uniform(gain=calculate_gain("relu"))
        glorot_uniform(gain=1.4142135623730951)
    """
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", "")
    if name == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + negative_slope**2))
    if isinstance(activation, str) and name not in _GAINS:
        known = [*_GAINS, "leaky_relu"]
        raise out_of_range("activation", name, f"one of {', '.join(known)}", fix=suggest(name, known))
    return _GAINS.get(name, 1.0)
