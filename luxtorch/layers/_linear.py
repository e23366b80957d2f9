"""Linear layers: `Dense`, `Scale` and `Bilinear`."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import Layer, Parameters, States
from luxtorch.core._sharded import is_sharded
from luxtorch.init import Initializer, glorot_uniform, ones, zeros

from ._activations import Activation, activated, as_activation
from ._shared import arguments_text, initial_weight_and_bias, linear, parameter, require_size, unfit


class Dense(Layer):
    """Fully connected (linear) layer: `activation(x @ weight.T + bias)`.

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
        return initial_weight_and_bias(self, key, (self.out_features, self.in_features), (self.out_features,))

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return `(activation(x @ weight.T + bias), st)`."""
        y = linear(x, ps["weight"], parameter(ps, "bias") if self.bias else None)
        return activated(y, self.activation), st

    def expected_input(self) -> str:
        """Name the width."""
        return f"a tensor of shape (..., {self.in_features})"

    def extra_repr(self) -> str:
        """Return for instance `10 -> 5, tanh`."""
        return arguments_text(self, f"{self.in_features} -> {self.out_features}")


class Scale(Layer):
    """Elementwise scale and bias: `activation(x * weight + bias)`.

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
        InputError: If the input has other last dimensions.

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
        return initial_weight_and_bias(self, key, self.shape, self.shape)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return `(activation(x * weight + bias), st)`."""
        if x.shape[x.ndim - len(self.shape) :] != self.shape:
            raise unfit(self, x, "The input's last dimensions must be those of the weight.")
        y = torch.mul(x, ps["weight"])
        return activated(y + ps["bias"] if self.bias else y, self.activation), st

    def expected_input(self) -> str:
        """Name the last dimensions."""
        return f"a tensor of shape (..., {', '.join(map(str, self.shape))})"

    def extra_repr(self) -> str:
        """Return for instance `3, tanh`."""
        return arguments_text(self, *self.shape)


class Bilinear(Layer):
    """Bilinear layer of two inputs: `activation(x1 @ weight[i] @ x2 + bias[i])`.

    Args:
        in1_features: The size of the first input's last dimension.
        in2_features: The size of the second input's last dimension.
        out_features: The size of the output's last dimension.
        activation: A function of a tensor, or the name of one; None for none.
        bias: Whether there is a bias.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (out_features, in1_features, in2_features)
        bias: (out_features,), unless `bias=False`

    Shape:
        A tuple of (..., in1_features) and (..., in2_features) to (..., out_features). A single tensor is both inputs.

    Raises:
        InputError: If a size is less than 1, or the inputs have other shapes.
        DTypeError: If an input's dtype is not that of the parameters.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Bilinear(3, 4, 2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model((torch.ones(5, 3), torch.ones(5, 4)), ps, st)
        >>> y.shape
        torch.Size([5, 2])

    Source: Lux's `Bilinear`, `torch.nn.Bilinear`.
    """

    in1_features: int
    in2_features: int
    out_features: int
    activation: Activation | str | None = None
    _: KW_ONLY
    bias: bool = True
    init_weight: Initializer = glorot_uniform
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        for name in ("in1_features", "in2_features", "out_features"):
            require_size(name, getattr(self, name))
        self._set(activation=as_activation(self.activation))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and, if there is one, `bias`."""
        shape = (self.out_features, self.in1_features, self.in2_features)
        return initial_weight_and_bias(self, key, shape, (self.out_features,))

    def __call__(self, x: Tensor | tuple[Tensor, Tensor], ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return `(activation(x1 @ weight @ x2 + bias), st)`."""
        x1, x2 = x if isinstance(x, tuple) else (x, x)
        self._check(x1, x2)
        weight, bias = ps["weight"], parameter(ps, "bias") if self.bias else None
        if transformed() or is_sharded(x1):
            # torch's kernel has no batching rule for weights, and none for sharded tensors.
            y = torch.einsum("...i,oij,...j->...o", x1, weight, x2)
            y = y if bias is None else y + bias
        else:
            y = F.bilinear(x1, x2, weight, bias)
        return activated(y, self.activation), st

    def _check(self, x1: Tensor, x2: Tensor) -> None:
        sizes = (self.in1_features, self.in2_features)
        if x1.shape[:-1] != x2.shape[:-1] or (x1.shape[-1], x2.shape[-1]) != sizes:
            raise unfit(self, (x1, x2), "The inputs must have the layer's widths, and the same other dimensions.")

    def expected_input(self) -> str:
        """Name the widths."""
        pair = f"a tuple of tensors of shape (..., {self.in1_features}) and (..., {self.in2_features})"
        return f"{pair}, or one tensor" if self.in1_features == self.in2_features else pair

    def extra_repr(self) -> str:
        """Return for instance `3 x 4 -> 2, tanh`."""
        return arguments_text(self, f"{self.in1_features} x {self.in2_features} -> {self.out_features}")
