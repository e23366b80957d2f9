"""Convolutions in one to three dimensions, and their transposes: `Conv` and `ConvTranspose`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone
from luxtorch.core import InputError, Layer, Parameters, States, show_value
from luxtorch.init import Initializer, glorot_uniform, zeros
from luxtorch.random import fold_in

from ._activations import Activation, activated, as_activation
from ._spatial import (
    PADDING_MODES,
    SPATIAL,
    Padding,
    Pairs,
    PerDim,
    check_padding_mode,
    padded,
    pairs,
    per_dim,
    shown,
    sizes,
    symmetric,
)

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class _Convolution(Layer):
    """Hold what a convolution and its transpose have in common."""

    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    activation: Activation | str | None = None
    _: KW_ONLY
    stride: PerDim = 1
    padding: Padding = 0
    dilation: PerDim = 1
    groups: int = 1
    bias: bool = True
    init_weight: Initializer = glorot_uniform
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        self._set(kernel_size=sizes("kernel_size", self.kernel_size), activation=as_activation(self.activation))
        self._set(
            stride=per_dim("stride", self.stride, self._dims, least=1),
            dilation=per_dim("dilation", self.dilation, self._dims, least=1),
        )
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise InputError(
                "The groups do not divide the channels.",
                expected="channels that are multiples of the groups",
                got=f"{self.in_channels} -> {self.out_channels} channels, groups={self.groups}",
            )

    @property
    def _dims(self) -> int:
        return len(self.kernel_size)

    @property
    def _extent(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))  # type: ignore[arg-type]

    def _weight_channels(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels // self.groups

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and, if there is one, `bias`."""
        shape = (*self._weight_channels(), *self.kernel_size)
        ps = {"weight": self.init_weight(fold_in(key, "weight"), shape)}
        if self.bias:
            ps["bias"] = self.init_bias(fold_in(key, "bias"), (self.out_channels,))
        return ps

    def expected_input(self) -> str:
        """Name the channels and the dimensions."""
        return f"a tensor of shape (batch, {self.in_channels}, {SPATIAL[self._dims]})"

    def extra_repr(self) -> str:
        """Return for instance `(3, 3), 1 -> 16, relu, padding=1`."""
        return ", ".join(
            [
                f"{self.kernel_size}, {self.in_channels} -> {self.out_channels}",
                *([show_value(self.activation)] if self.activation else []),
                *shown("stride", self.stride, 1),
                *shown("padding", self.padding, 0),
                *shown("dilation", self.dilation, 1),
                *self._more_repr(),
                *([f"groups={self.groups}"] if self.groups != 1 else []),
                *([] if self.bias else ["bias=False"]),
            ]
        )

    def _more_repr(self) -> list[str]:
        return []


class Conv(_Convolution):
    """Convolve, add a bias, apply an activation; as in torch, the kernel is not flipped.

    The length of `kernel_size` says in how many dimensions, one to three. What is given per dimension may be a single
    number for all.

    Args:
        kernel_size: The kernel's size in each dimension, a tuple.
        in_channels: The size of the input's second dimension.
        out_channels: The size of the output's second dimension.
        activation: A function of a tensor, or the name of one; None for none.
        stride: The step from one output to the next, per dimension.
        padding: A number, or per dimension a number or a pair (before, after), or "valid" for none, or "same" for
            `dilation * (kernel_size - 1)` in all, of which an odd amount is larger at the end: with a stride of one
            the size stays, otherwise it is divided by the stride and rounded up.
        padding_mode: What is put there: "zeros", "reflect", "replicate" or "circular".
        dilation: The distance between the kernel's elements, per dimension.
        groups: The number of groups of channels that do not see each other.
        bias: Whether there is a bias.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (out_channels, in_channels / groups, *kernel_size)
        bias: (out_channels,), unless `bias=False`

    Shape:
        (batch, in_channels, *dims) to (batch, out_channels, *new dims); the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input does not fit them.
        DTypeError: If the input's dtype is not that of the parameters.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Conv((3, 3), 1, 16, torch.relu, padding="same")
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(2, 1, 28, 28), ps, st)
        >>> y.shape
        torch.Size([2, 16, 28, 28])

    Source: Lux's `Conv`, with `torch.nn.Conv2d`'s orientation and sides of "same".
    """

    _: KW_ONLY
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(padding=pairs(self.padding, self._extent))
        check_padding_mode(self.padding_mode, PADDING_MODES)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the convolved input after bias and activation, and `st`."""
        both_sides = symmetric(self._pairs)
        if both_sides is None or (self.padding_mode != "zeros" and any(both_sides)):
            x, both_sides = padded(x, self._pairs, PADDING_MODES[self.padding_mode]), (0,) * self._dims
        bias = ps["bias"] if self.bias else None
        y = _CONV[self._dims](x, ps["weight"], bias, self.stride, both_sides, self.dilation, self.groups)
        return activated(y, self.activation), st

    @property
    def _pairs(self) -> Pairs:
        return self.padding  # type: ignore[return-value]

    def _more_repr(self) -> list[str]:
        return [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []


class ConvTranspose(_Convolution):
    """Apply the transpose of a convolution, add a bias, apply an activation.

    It is the map by which `Conv` with the same arguments takes gradients back to its input, and enlarges where that
    shrinks. The length of `kernel_size` says in how many dimensions, one to three. What is given per dimension may be
    a single number for all.

    Args:
        kernel_size: The kernel's size in each dimension, a tuple.
        in_channels: The size of the input's second dimension.
        out_channels: The size of the output's second dimension.
        activation: A function of a tensor, or the name of one; None for none.
        stride: The factor of enlargement, per dimension.
        padding: What is cut off: a number, or per dimension a number or a pair (before, after), or "valid" for
            nothing, or "same" for what makes the output the stride times as large as the input.
        output_padding: How much the output is longer at the end, per dimension.
        dilation: The distance between the kernel's elements, per dimension.
        groups: The number of groups of channels that do not see each other.
        bias: Whether there is a bias.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (in_channels, out_channels / groups, *kernel_size)
        bias: (out_channels,), unless `bias=False`

    Shape:
        (batch, in_channels, *dims) to (batch, out_channels, *new dims), where a new dim is `(dim - 1) * stride +
        dilation * (kernel_size - 1) + 1 - padding before and after + output_padding`; the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input does not fit them.
        DTypeError: If the input's dtype is not that of the parameters.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.ConvTranspose((4, 4), 16, 1, stride=2, padding="same")
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(2, 16, 14, 14), ps, st)
        >>> y.shape
        torch.Size([2, 1, 28, 28])

    Source: Lux's `ConvTranspose`, `torch.nn.ConvTranspose2d`.
    """

    _: KW_ONLY
    output_padding: PerDim = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        more = per_dim("output_padding", self.output_padding, self._dims, least=0)
        if any(extra >= max(step, apart) for extra, step, apart in zip(more, self.stride, self.dilation, strict=True)):  # type: ignore[arg-type]
            raise InputError(
                "The output_padding is not smaller than the stride or the dilation.",
                expected=f"less than the larger of stride={self.stride} and dilation={self.dilation}",
                got=f"output_padding={self.output_padding}",
            )
        padding = pairs(self.padding, self._extent)
        if self.padding == "same":
            # What Conv pads, less what its stride leaves over: a negative number makes the output longer.
            padding = tuple((low, high + 1 - s) for (low, high), s in zip(padding, self.stride, strict=True))  # type: ignore[arg-type]
        self._set(padding=padding, output_padding=more)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the transposed convolution of the input after bias and activation, and `st`."""
        convolve, cut = _CONV_TRANSPOSE[self._dims], symmetric(self._cut)
        bias = ps["bias"] if self.bias else None
        # With an output_padding torch takes no third derivative.
        if cut is not None and (not any(self.output_padding) or reverse_alone()):  # type: ignore[arg-type]
            y = convolve(x, ps["weight"], bias, self.stride, cut, self.output_padding, self.groups, self.dilation)
        else:
            ends = zip(self._cut, self.output_padding, strict=True)  # type: ignore[arg-type]
            y = convolve(x, ps["weight"], None, self.stride, 0, 0, self.groups, self.dilation)
            y = padded(y, tuple((-low, more - high) for (low, high), more in ends))
            y = y if bias is None else y + bias.view(-1, *(1,) * self._dims)
        return activated(y, self.activation), st

    def _weight_channels(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels // self.groups

    @property
    def _cut(self) -> Pairs:
        return self.padding  # type: ignore[return-value]

    def _more_repr(self) -> list[str]:
        return shown("output_padding", self.output_padding, 0)
