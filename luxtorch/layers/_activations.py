"""Activation functions by name, and the activation layers `GLU` and `PReLU`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone, transformed
from luxtorch.core import InputError, Layer, Parameters, States, out_of_range, suggest

from ._shared import require_size, unfit

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a tensor, elementwise as a rule."""


def hardsigmoid(x: Tensor) -> Tensor:
    """Return `clamp(x / 6 + 1 / 2, 0, 1)`.

    Example:
        >>> import torch
        >>> hardsigmoid(torch.tensor([-4.0, 0.0, 4.0]))
        tensor([0.0000, 0.5000, 1.0000])

    Source: `torch.nn.functional.hardsigmoid`, which has no forward-mode derivative.
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

    Source: `torch.nn.functional.logsigmoid`, whose forward-mode derivative does not nest under vmap.
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
    """Return an activation function by name; a function is returned unchanged.

    Args:
        activation: A function of a tensor, one of the names in `ACTIVATIONS`, or None for none.

    Raises:
        InputError: If no activation has that name, or it is not a function.

    Example:
        >>> import torch
        >>> as_activation("tanh") is torch.tanh
        True
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise InputError(
                f"There is no activation '{activation}'.",
                expected=f"a function of a tensor, or one of {', '.join(ACTIVATIONS)}",
                fix=suggest(activation, ACTIVATIONS),
            )
        return ACTIVATIONS[activation]
    if activation is not None and not callable(activation):
        raise out_of_range("activation", activation, "a function of a tensor, the name of one, or None")
    return activation


def activated(y: Tensor, activation: Activation | str | None) -> Tensor:
    """Apply a layer's activation, if it has one."""
    return y if activation is None else activation(y)  # type: ignore[operator]  # a layer keeps no names


class GLU(Layer):
    """Gated linear unit: split the input in halves along a dimension, and return `a * sigmoid(b)`.

    Args:
        dim: The dimension to halve.

    Shape:
        (..., 2 * size, ...) to (..., size, ...)

    Raises:
        InputError: If the dimension's size is odd, or the input has no such dimension.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.GLU()(torch.tensor([1.0, 2.0, 0.0, 0.0]), {}, {})
        >>> y
        tensor([0.5000, 1.0000])

    Source: `torch.nn.GLU`, `glu` in NNlib; Dauphin et al., "Language modeling with gated convolutional networks", 2017.
    """

    dim: int = -1

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the gated half and `st`."""
        return gated(x, self.dim), st

    def expected_input(self) -> str:
        """Name the dimension."""
        return f"a tensor whose size is even along dimension {self.dim}"


def gated(x: Tensor, dim: int = -1) -> Tensor:
    """Return `a * sigmoid(b)` of the two halves of a tensor along a dimension."""
    # torch's forward-mode derivatives of its kernel cannot be differentiated again. Its own errors are clear.
    if reverse_alone() or not -x.ndim <= dim < x.ndim or x.shape[dim] % 2:
        return F.glu(x, dim)
    half, gate = x.chunk(2, dim)
    return half * gate.sigmoid()


class PReLU(Layer):
    """Parametric ReLU: keep positive values, and multiply negative ones by a parameter.

    Args:
        num_parameters: The number of channels, for one parameter each; or 1, for one parameter in all.
        init: The initial value.

    Parameters:
        weight: (num_parameters,)

    Shape:
        (batch, num_parameters, ...) to the same; with one parameter, any shape.

    Raises:
        InputError: If there are no parameters, or the input has another second dimension.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.PReLU())
        >>> y, st = lt.PReLU()(torch.tensor([-1.0, 2.0]), ps, st)
        >>> y
        tensor([-0.2500,  2.0000])

    Source: `torch.nn.PReLU`; He et al., "Delving deep into rectifiers", 2015.
    """

    num_parameters: int = 1
    init: float = 0.25

    def __post_init__(self) -> None:
        require_size("num_parameters", self.num_parameters)

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight`."""
        return {"weight": torch.full((self.num_parameters,), self.init, device=key.device)}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the input with its negative part multiplied, and `st`."""
        weight = ps["weight"]
        if self.num_parameters > 1 and (x.ndim < 2 or x.shape[1] != self.num_parameters):
            raise unfit(self, x, f"The input must have {self.num_parameters} channels, one for each parameter.")
        if not transformed():
            return F.prelu(x, weight), st
        # torch's kernel has no correct batching rule for weights.
        weight = weight.reshape(-1, *[1] * (x.ndim - 2)) if self.num_parameters > 1 else weight[0]
        return torch.where(x > 0, x, weight * x), st

    def expected_input(self) -> str:
        """Name the number of channels, if it matters."""
        return "a tensor" if self.num_parameters == 1 else f"a tensor of shape (batch, {self.num_parameters}, ...)"
