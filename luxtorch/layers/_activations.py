"""Activation functions by name: those of Lux, with torch's numerics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone
from luxtorch.core import InputError, suggest

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a tensor, elementwise as a rule."""


def hardsigmoid(x: Tensor) -> Tensor:
    """Return `clamp(x / 6 + 1 / 2, 0, 1)`.

    Example:
        >>> import torch
        >>> hardsigmoid(torch.tensor([-4.0, 0.0, 4.0]))
        tensor([0.0000, 0.5000, 1.0000])

    Source: `torch.nn.functional.hardsigmoid`, whose derivative knows no forward mode.
    """
    return F.relu6(x + 3) / 6


def lisht(x: Tensor) -> Tensor:
    """Return `x * tanh(x)`.

    Example:
        >>> import torch
        >>> lisht(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.7616, 0.0000, 0.7616])

    Source: Roy et al., "LiSHT", 2019; `NNlib.lisht`.
    """
    return x * torch.tanh(x)


def logcosh(x: Tensor) -> Tensor:
    """Return `log(cosh(x))`, without overflow.

    Example:
        >>> import torch
        >>> logcosh(torch.tensor([0.0, 1.0, 1000.0]))
        tensor([0.0000e+00, 4.3378e-01, 9.9931e+02])

    Source: `NNlib.logcosh`.
    """
    return x + F.softplus(-2 * x) - math.log(2)


def logsigmoid(x: Tensor) -> Tensor:
    """Return `log(sigmoid(x))`, without overflow.

    Example:
        >>> import torch
        >>> logsigmoid(torch.tensor([0.0, -1000.0]))
        tensor([-6.9315e-01, -1.0000e+03])

    Source: `torch.nn.functional.logsigmoid`, whose derivative by forward mode does not nest under vmap.
    """
    return F.logsigmoid(x) if reverse_alone() else -F.softplus(-x, 1.0, 40.0)


def trelu(x: Tensor) -> Tensor:
    """Return `x` where it is above 1, and 0 elsewhere.

    Example:
        >>> import torch
        >>> trelu(torch.tensor([0.5, 1.5]))
        tensor([0.0000, 1.5000])

    Source: Konda et al., "Zero-bias autoencoders", 2014; `NNlib.trelu`, `torch.nn.Threshold(1, 0)`.
    """
    return F.threshold(x, 1.0, 0.0)


ACTIVATIONS: dict[str, Activation | None] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "hardsigmoid": hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "identity": None,
    "leaky_relu": F.leaky_relu,
    "leakyrelu": F.leaky_relu,
    "lisht": lisht,
    "logcosh": logcosh,
    "logsigmoid": logsigmoid,
    "mish": F.mish,
    "relu": torch.relu,
    "relu6": F.relu6,
    "selu": torch.selu,
    "sigmoid": torch.sigmoid,
    "sigmoid_fast": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "swish": F.silu,
    "tanh": torch.tanh,
    "tanh_fast": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "thresholdrelu": trelu,
    "trelu": trelu,
}
"""The activations that a layer takes by name: Lux's names, and torch's where they differ."""


def as_activation(activation: Activation | str | None) -> Activation | None:
    """Return the function that a name stands for, and a function as it is.

    Args:
        activation: A function of a tensor, one of the names in `ACTIVATIONS`, or None for none.

    Raises:
        InputError: If no activation has that name, or it is something else altogether.

    Example:
        >>> import torch
        >>> as_activation("tanh") is torch.tanh
        True
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise InputError(
                f"No activation is called '{activation}'.",
                expected=f"a function of a tensor, or one of {', '.join(ACTIVATIONS)}",
                fix=suggest(activation, ACTIVATIONS),
            )
        return ACTIVATIONS[activation]
    if activation is not None and not callable(activation):
        raise InputError(
            "The activation is no function.", expected="a function of a tensor, a name or None", got=repr(activation)
        )
    return activation


def activated(y: Tensor, activation: Activation | str | None) -> Tensor:
    """Return an output after a layer's activation, if it has one."""
    return y if activation is None else activation(y)  # type: ignore[operator]  # a layer keeps no names
