"""Convolutions and padding in one to three dimensions: `Conv`, `ConvTranspose` and `Pad`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone
from luxtorch.core import InputError, Layer, Parameters, States, out_of_range, suggest
from luxtorch.init import Initializer, glorot_uniform, zeros

from ._activations import Activation, activated, as_activation
from ._shared import arguments_text, initial_weight_and_bias, parameter, require_size, unfit

PerDim: TypeAlias = int | Sequence[int]
Pairs: TypeAlias = tuple[tuple[int, int], ...]
Padding: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]] | Literal["same", "valid"]

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""Padding modes, and the names of torch.nn.functional.pad for them."""

SPATIAL = {1: "length", 2: "height, width", 3: "depth, height, width"}


def sizes(name: str, value: Any, *, optional: bool = False) -> tuple[int, ...]:
    """Return sizes, one for each spatial dimension: one to three."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in SPATIAL:
        fix = f"For images write {name}=({value}, {value})." if isinstance(value, int) else ""
        raise out_of_range(name, value, "a tuple of 1, 2 or 3 sizes, one for each spatial dimension", fix=fix)
    if not all((optional and size is None) or (isinstance(size, int) and size > 0) for size in value):
        raise out_of_range(f"Each size in {name}", value, "at least 1")
    return tuple(value)


def per_dim(name: str, value: Any, dims: int, *, least: int) -> tuple[int, ...]:
    """Return one number for each spatial dimension; a single number is for all of them."""
    values = (value,) * dims if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != dims or not all(isinstance(number, int) and number >= least for number in values):
        raise out_of_range(name, value, f"an integer, or a tuple of {dims}, none below {least}")
    return values


def pairs(value: Any, extent: tuple[int, ...]) -> Pairs:
    """Return the padding before and after each spatial dimension.

    Args:
        value: A number, a number or a pair of them for each dimension, "same" or "valid".
        extent: How far the kernel reaches in each dimension, `dilation * (kernel_size - 1)`, which is what "same"
            adds; an odd amount is larger at the end, as in torch.

    Returns:
        A pair for each dimension.

    Raises:
        InputError: If it is not one of these.
    """
    if value == "valid":
        return ((0, 0),) * len(extent)
    if value == "same":
        return tuple((reach // 2, reach - reach // 2) for reach in extent)
    found = sides(value, len(extent))
    if found is None or min(map(min, found)) < 0:
        kinds = f"a number, a tuple of {len(extent)} numbers or pairs (before, after), 'same' or 'valid', none below 0"
        raise out_of_range("padding", value, kinds)
    return found


def sides(value: Any, dims: int) -> Pairs | None:
    """Return the numbers before and after each spatial dimension, or None if the value does not give them."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * dims
    found = tuple(tuple(entry) if isinstance(entry, Sequence) else (entry, entry) for entry in values)
    fitting = len(found) == dims and all(len(p) == 2 and all(isinstance(n, int) for n in p) for p in found)
    return found if fitting else None


def check_padding_mode(mode: Any, modes: Mapping[str, Any]) -> None:
    """Raise unless there is such a padding mode."""
    if mode not in modes:
        raise InputError(
            f"There is no padding mode '{mode}'.", expected=", ".join(modes), fix=suggest(str(mode), modes)
        )


def symmetric(padding: Pairs) -> tuple[int, ...] | None:
    """Return the padding at either side of each dimension, or None if the two sides differ anywhere."""
    return tuple(low for low, _ in padding) if all(low == high for low, high in padding) else None


def padded(x: Tensor, padding: Pairs, mode: str = "constant", value: float | None = None) -> Tensor:
    """Return the input with its last dimensions padded; negative numbers crop it."""
    return F.pad(x, [number for pair in reversed(padding) for number in pair], mode, value)


_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class _Convolution(Layer):
    """Base class of `Conv` and `ConvTranspose`."""

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
        require_size("groups", self.groups)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            channels = f"in_channels={self.in_channels} and out_channels={self.out_channels}"
            raise out_of_range("groups", self.groups, f"a divisor of {channels}")

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
        return initial_weight_and_bias(self, key, shape, (self.out_channels,))

    def expected_input(self) -> str:
        """Name the channels and the dimensions."""
        return f"a tensor of shape (batch, {self.in_channels}, {SPATIAL[self._dims]})"

    def extra_repr(self) -> str:
        """Return for instance `(3, 3), 1 -> 16, relu, padding=1`."""
        return arguments_text(self, self.kernel_size, f"{self.in_channels} -> {self.out_channels}")


class Conv(_Convolution):
    """Convolution with bias and activation; as in torch, the kernel is not flipped (cross-correlation).

    The length of `kernel_size` is the number of spatial dimensions, one to three. Arguments per dimension may be a
    single number for all.

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
        groups: The number of groups of channels that are convolved separately.
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
        bias = parameter(ps, "bias") if self.bias else None
        y = _CONV[self._dims](x, ps["weight"], bias, self.stride, both_sides, self.dilation, self.groups)
        return activated(y, self.activation), st

    @property
    def _pairs(self) -> Pairs:
        return self.padding  # type: ignore[return-value]


class ConvTranspose(_Convolution):
    """Transposed convolution with bias and activation.

    It is the gradient of `Conv` with the same arguments with respect to its input, and upsamples where that
    downsamples. The length of `kernel_size` is the number of spatial dimensions, one to three. Arguments per dimension
    may be a single number for all.

    Args:
        kernel_size: The kernel's size in each dimension, a tuple.
        in_channels: The size of the input's second dimension.
        out_channels: The size of the output's second dimension.
        activation: A function of a tensor, or the name of one; None for none.
        stride: The factor of upsampling, per dimension.
        padding: What is cut off: a number, or per dimension a number or a pair (before, after), or "valid" for
            nothing, or "same" for what makes the output the stride times as large as the input.
        output_padding: Additional size of the output at the end, per dimension.
        dilation: The distance between the kernel's elements, per dimension.
        groups: The number of groups of channels that are convolved separately.
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
            limit = f"less than the larger of stride={self.stride} and dilation={self.dilation}"
            raise out_of_range("output_padding", self.output_padding, limit)
        padding = pairs(self.padding, self._extent)
        if self.padding == "same":
            # What Conv pads, less what its stride leaves over: a negative number makes the output longer.
            padding = tuple((low, high + 1 - s) for (low, high), s in zip(padding, self.stride, strict=True))  # type: ignore[arg-type]
        self._set(padding=padding, output_padding=more)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the transposed convolution of the input after bias and activation, and `st`."""
        convolve, cut = _CONV_TRANSPOSE[self._dims], symmetric(self._cut)
        bias = parameter(ps, "bias") if self.bias else None
        # With an output_padding torch has no third derivative.
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


_MODES = {**PADDING_MODES, "constant": "constant", "symmetric": None}


class Pad(Layer):
    """Pad the spatial dimensions, or crop them where a number is negative.

    Args:
        padding: A number for all dimensions but batch and channels; or, in order of the dimensions, a tuple with a
            number or a pair (before, after) for each of the last one to three. torch's functions take the numbers of
            the last dimension first.
        mode: What is put there: "zeros"; "constant", a given value; "replicate", the outermost element; "reflect",
            what lies inside of it; "symmetric", the same from that element on; "circular", what lies at the other end.
        value: The value of the mode "constant".

    Shape:
        (batch, channels, *dims) to (batch, channels, *dims + before + after). With a tuple the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input is too small for the mode: "reflect" takes
            less than a dimension's size at either side, "circular" and "symmetric" no more than that.

    Example:
        >>> import torch, luxtorch as lt
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> lt.Pad(((1, 2),))(x, {}, {})[0]
        tensor([[[0., 1., 2., 3., 0., 0.]]])
        >>> lt.Pad(((-1, 2),), "symmetric")(x, {}, {})[0]
        tensor([[[2., 3., 3., 2.]]])

    Source: NNlib's `pad_zeros`, `pad_constant`, `pad_reflect`, `pad_symmetric`, `pad_circular` and `pad_repeat`;
    `torch.nn.ZeroPad2d`, `ConstantPad2d`, `ReflectionPad2d`, `ReplicationPad2d`, `CircularPad2d`.
    """

    padding: int | Sequence[int | Sequence[int]]
    mode: str = "zeros"
    _: KW_ONLY
    value: float = 0.0

    def __post_init__(self) -> None:
        check_padding_mode(self.mode, _MODES)
        if self.value != 0 and self.mode != "constant":
            raise InputError(
                "value must be 0 unless mode is 'constant'.", got=f"value={self.value}, mode={self.mode!r}"
            )
        if isinstance(self.padding, int):
            return
        dims = len(self.padding) if isinstance(self.padding, Sequence) else 0
        found = sides(self.padding, dims) if 0 < dims <= 3 else None
        if found is None:
            kinds = "a number, or a tuple of 1, 2 or 3 numbers or pairs (before, after)"
            raise out_of_range("padding", self.padding, kinds)
        self._set(padding=found)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the padded input and `st`."""
        pairs, mode = self._pairs(x), _MODES[self.mode]
        if mode is None:
            return _symmetric(x, pairs), st
        return padded(x, pairs, mode, self.value if mode == "constant" else None), st

    def _pairs(self, x: Tensor) -> Pairs:
        alike = isinstance(self.padding, int)
        dims = x.ndim - 2 if alike else len(self.padding)  # type: ignore[arg-type]
        if not 0 < dims <= min(3, x.ndim):
            raise unfit(self, x, "The input must have the dimensions to be padded.")
        return ((self.padding, self.padding),) * dims if alike else self.padding  # type: ignore[return-value]

    def expected_input(self) -> str:
        """Name the dimensions."""
        if isinstance(self.padding, int):
            return "a tensor of shape (batch, channels, ...) with one to three dimensions large enough for the padding"
        return f"a tensor whose last {len(self.padding)} dimensions are large enough for the padding"


def _symmetric(x: Tensor, pairs: Pairs) -> Tensor:
    """Pad by mirroring the elements at each end, the outermost included."""
    x = padded(x, tuple((min(low, 0), min(high, 0)) for low, high in pairs))
    for dim, (low, high) in zip(range(-len(pairs), 0), pairs, strict=True):
        size, (before, after) = x.shape[dim], (max(low, 0), max(high, 0))
        if max(before, after) > size:
            raise InputError(
                f"Dimension {dim} must have at least {max(before, after)} elements for this padding.", got=f"{size}"
            )
        first, last = x.narrow(dim, 0, before), x.narrow(dim, size - after, after)
        x = torch.cat([first.flip(dim), x, last.flip(dim)], dim)
    return x
