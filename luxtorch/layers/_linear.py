"""Layers that scale and add: `Dense` and `Scale`."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import Layer, Parameters, States, show_value
from luxtorch.init import Initializer, glorot_uniform, ones, zeros
from luxtorch.random import fold_in

from ._activations import Activation, activated, as_activation


class Dense(Layer):
    """Multiply by a matrix, add a bias, apply an activation: `activation(x @ weight.T + bias)`.

    Args:
        in_features: The size of the input's last dimension.
        out_features: The size of the output's last dimension.
        activation: A function of a tensor, or the name of one, such as "tanh"; None for none.
        bias: Whether there is a bias.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (out_features, in_features)
        bias: (out_features,), unless `bias=False`

    Shape:
        (..., in_features) to (..., out_features)

    Raises:
        InputError: If the input has another width.
        DTypeError: If the input's dtype is not that of the parameters.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Dense(10, 5, torch.tanh)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(20, 10), ps, st)
        >>> y.shape
        torch.Size([20, 5])

    Source: Lux's `Dense`, `torch.nn.Linear`.
    """

    in_features: int
    out_features: int
    activation: Activation | str | None = None
    _: KW_ONLY
    bias: bool = True
    init_weight: Initializer = glorot_uniform
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        self._set(activation=as_activation(self.activation))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and, if there is one, `bias`."""
        ps = {"weight": self.init_weight(fold_in(key, "weight"), (self.out_features, self.in_features))}
        if self.bias:
            ps["bias"] = self.init_bias(fold_in(key, "bias"), (self.out_features,))
        return ps

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return `(activation(x @ weight.T + bias), st)`."""
        y = F.linear(x, ps["weight"], ps["bias"] if self.bias else None)
        return activated(y, self.activation), st

    def expected_input(self) -> str:
        """Name the width."""
        return f"a tensor of shape (..., {self.in_features})"

    def extra_repr(self) -> str:
        """Return for instance `10 -> 5, tanh`."""
        return _arguments(f"{self.in_features} -> {self.out_features}", self.activation, self.bias)


class Scale(Layer):
    """Multiply by a tensor elementwise, add a bias, apply an activation: `activation(x * weight + bias)`.

    Args:
        *shape: The shape of the weight, that of the input's last dimensions.
        activation: A function of a tensor, or the name of one, such as "tanh"; None for none.
        bias: Whether there is a bias.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: shape
        bias: shape, unless `bias=False`

    Shape:
        (..., *shape) to (..., *shape)

    Raises:
        InputError: If the input's last dimensions are others.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Scale(3)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([1.0, 2.0, 3.0]), ps, st)
        >>> y
        tensor([1., 2., 3.])

    Source: Lux's `Scale`, whose documented initial weight, ones, is ours.
    """

    shape: tuple[int, ...]
    activation: Activation | str | None
    bias: bool
    init_weight: Initializer
    init_bias: Initializer

    def __init__(
        self,
        *shape: int,
        activation: Activation | str | None = None,
        bias: bool = True,
        init_weight: Initializer = ones,
        init_bias: Initializer = zeros,
    ) -> None:
        activation = as_activation(activation)
        self._set(shape=shape, activation=activation, bias=bias, init_weight=init_weight, init_bias=init_bias)

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and, if there is one, `bias`."""
        ps = {"weight": self.init_weight(fold_in(key, "weight"), self.shape)}
        if self.bias:
            ps["bias"] = self.init_bias(fold_in(key, "bias"), self.shape)
        return ps

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return `(activation(x * weight + bias), st)`."""
        y = x * ps["weight"]
        return activated(y + ps["bias"] if self.bias else y, self.activation), st

    def expected_input(self) -> str:
        """Name the last dimensions."""
        return f"a tensor of shape (..., {', '.join(map(str, self.shape))})"

    def extra_repr(self) -> str:
        """Return for instance `3, tanh`."""
        return _arguments(", ".join(map(str, self.shape)), self.activation, self.bias)


def _arguments(sizes: str, activation: Activation | str | None, bias: bool) -> str:
    parts = [sizes, *([show_value(activation)] if activation else []), *([] if bias else ["bias=False"])]
    return ", ".join(parts)
