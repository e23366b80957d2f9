"""Pooling over windows, to a given size, and over everything."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import Layer, Parameters, States, out_of_range
from luxtorch.core._sharded import beside

from ._conv import SPATIAL, Padding, Pairs, PerDim, padded, pairs, per_dim, sizes, symmetric
from ._shared import arguments_text, unfit, widened

PoolByDims = dict[int, Callable[..., Tensor]]
_MAX: PoolByDims = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: PoolByDims = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LP: PoolByDims = {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}


class _WindowPool(Layer):
    """Base class of the poolings over windows."""

    kernel_size: tuple[int, ...]
    _: KW_ONLY
    stride: PerDim | None = None
    padding: Padding = 0
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        kernel = sizes("kernel_size", self.kernel_size)
        stride = kernel if self.stride is None else per_dim("stride", self.stride, len(kernel), least=1)
        self._set(kernel_size=kernel, stride=stride)
        extent = tuple(d * (k - 1) for d, k in zip(self._dilations(), kernel, strict=True))
        padding = pairs(self.padding, extent)
        if any(max(pair) > (reach + 1) // 2 for pair, reach in zip(padding, extent, strict=True)):
            raise out_of_range(
                "padding",
                self.padding,
                f"at most half of kernel_size={kernel}, dilation included",
            )
        self._set(padding=padding)

    def _dilations(self) -> tuple[int, ...]:
        return (1,) * self._dims

    @property
    def _dims(self) -> int:
        return len(self.kernel_size)

    @property
    def _pairs(self) -> Pairs:
        return self.padding  # type: ignore[return-value]

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.stride  # type: ignore[return-value]

    def _without_late_windows(self, y: Tensor, x: Tensor) -> Tensor:
        """Drop the windows of an explicitly padded input that with `ceil_mode` start after the end of the input."""
        if self.ceil_mode:
            for dim, (low, _), stride in zip(range(-self._dims, 0), self._pairs, self._strides, strict=True):
                y = y.narrow(dim, 0, min(y.shape[dim], -(-(x.shape[dim] + low) // stride)))
        return y

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor of shape (batch, channels, {SPATIAL[self._dims]}), no smaller than the window"

    def extra_repr(self) -> str:
        """Return for instance `(2, 2), padding=1`."""
        return arguments_text(self, self.kernel_size, stride=self.kernel_size)


class MaxPool(_WindowPool):
    """Max pooling over windows.

    The length of `kernel_size` is the number of spatial dimensions, one to three. Arguments per dimension may be a
    single number for all.

    Args:
        kernel_size: The window's size in each dimension, a tuple.
        stride: The step from one window to the next, per dimension; the window's size if None.
        padding: A number, or per dimension a number or a pair (before, after), "valid" for none or "same" for
            `dilation * (kernel_size - 1)` in all, an odd amount larger at the end. The padding is never the maximum.
        ceil_mode: Whether a last window that reaches over the end is kept, if it does not start there.
        dilation: The distance between a window's elements, per dimension.

    Shape:
        (batch, channels, *dims) to (batch, channels, *new dims); the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input does not fit them.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.MaxPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[2., 4.]]])

    Source: Lux's `MaxPool`, `torch.nn.MaxPool2d`.
    """

    _: KW_ONLY
    dilation: PerDim = 1

    def _dilations(self) -> tuple[int, ...]:
        dilation = per_dim("dilation", self.dilation, self._dims, least=1)
        self._set(dilation=dilation)
        return dilation

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the maxima and `st`."""
        pool, both_sides = _MAX[self._dims], symmetric(self._pairs)
        if both_sides is not None:
            return pool(x, self.kernel_size, self.stride, both_sides, self.dilation, self.ceil_mode), st
        y = padded(x, self._pairs, value=-torch.inf)
        y = pool(y, self.kernel_size, self.stride, 0, self.dilation, self.ceil_mode)
        return self._without_late_windows(y, x), st


class MeanPool(_WindowPool):
    """Average pooling over windows.

    Args:
        kernel_size: As in `MaxPool`, like the three below.
        stride: The step.
        padding: The padding, which is zeros.
        ceil_mode: Whether a last window may reach over the end; what lies beyond the padding never counts.
        count_include_pad: Whether the padding counts; otherwise the mean is over elements of the input alone.
        divisor_override: What the sum over each window is divided by, instead of the number of elements.

    Shape:
        (batch, channels, *dims) to (batch, channels, *new dims); the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input does not fit them.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.MeanPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[1.5000, 3.5000]]])

    Source: Lux's `MeanPool`, `torch.nn.AvgPool2d`.
    """

    _: KW_ONLY
    count_include_pad: bool = True
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divisor_override == 0:
            raise out_of_range("divisor_override", 0, "other than 0")

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the means and `st`."""
        wide, both_sides = widened(x) if self._dims == 3 else x, symmetric(self._pairs)
        if both_sides is not None:
            return self._mean(wide, both_sides).to(x.dtype), st
        y = self._mean(padded(wide, self._pairs))
        if not self.count_include_pad and self.divisor_override is None:
            # The mean of zeros and ones is the fraction of each window inside the input.
            y = y / self._mean(padded(torch.ones_like(wide), self._pairs))
        return self._without_late_windows(y, x).to(x.dtype), st

    def _mean(self, x: Tensor, padding: tuple[int, ...] = ()) -> Tensor:
        kernel, stride, padding = self.kernel_size, self._strides, padding or (0,) * self._dims
        options, divisor = (self.ceil_mode, self.count_include_pad), self.divisor_override
        if divisor is None:
            return _MEAN[self._dims](x, kernel, stride, padding, *options)
        if self._dims > 1:
            return _MEAN[self._dims](x, kernel, stride, padding, *options, divisor)
        # torch's avg_pool1d has no divisor_override.
        return F.avg_pool2d(x.unsqueeze(-2), (1, *kernel), (1, *stride), (0, *padding), *options, divisor).squeeze(-2)


class LPPool(_WindowPool):
    """Power-average pooling over windows: `sum(x ** p) ** (1 / p)`.

    As in torch, there is no absolute value in it, and no gradient where the sum of a window is zero.

    Args:
        kernel_size: As in `MaxPool`, like the three below.
        stride: The step.
        padding: The padding, which is zeros.
        ceil_mode: Whether a last window may reach over the end; its sum is scaled up to a whole window.
        p: The power.

    Shape:
        (batch, channels, *dims) to (batch, channels, *new dims); the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input does not fit them.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.LPPool((2,))(torch.tensor([[[3.0, 4.0, 5.0, 12.0]]]), {}, {})
        >>> y
        tensor([[[ 5., 13.]]])

    Source: Lux's `LPPool`, `torch.nn.LPPool2d`.
    """

    _: KW_ONLY
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power(self.p)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the norms and `st`."""
        y = padded(widened(x) if self._dims == 3 else x, self._pairs)
        # torch's functions take tuples, but in one dimension numbers.
        kernel, stride = (v if self._dims > 1 else v[0] for v in (self.kernel_size, self._strides))
        y = _LP[self._dims](y, float(self.p), kernel, stride, self.ceil_mode)
        return self._without_late_windows(y, x).to(x.dtype), st


def check_power(p: Any) -> None:
    """Raise unless the power of an LP pooling is positive and finite."""
    if not 0 < p < torch.inf:
        raise out_of_range("p", p, "positive and finite")


_ADAPTIVE_MAX: PoolByDims = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_ADAPTIVE_MEAN: PoolByDims = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class _AdaptivePool(Layer):
    """Base class of the adaptive poolings, to a given output size."""

    output_size: tuple[int | None, ...]

    def __post_init__(self) -> None:
        self._set(output_size=sizes("output_size", self.output_size, optional=True))

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the pooled input and `st`."""
        # torch accepts None in two and three dimensions only.
        present = x.shape[x.ndim - len(self.output_size) :]
        return self._pool(x, tuple(s or n for s, n in zip(self.output_size, present, strict=True))), st

    @abstractmethod
    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor: ...

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor of shape (batch, channels, {SPATIAL[len(self.output_size)]})"


class AdaptiveMaxPool(_AdaptivePool):
    """Max pooling to a given output size.

    Window i of o in a dimension of n elements reaches from `floor(i * n / o)` to `ceil((i + 1) * n / o)`, as in torch.

    Args:
        output_size: The output's size in each dimension, one to three of them, a tuple; None keeps the input's.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the input has too few dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.AdaptiveMaxPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[2., 4.]]])

    Source: `torch.nn.AdaptiveMaxPool2d`; Lux's `AdaptiveMaxPool` chooses other windows where sizes do not divide.
    """

    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return _ADAPTIVE_MAX[len(size)](x, size)


class AdaptiveMeanPool(_AdaptivePool):
    """Average pooling to a given output size.

    Args:
        output_size: As in `AdaptiveMaxPool`; so are the windows.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the input has too few dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.AdaptiveMeanPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[1.5000, 3.5000]]])

    Source: Lux's `AdaptiveMeanPool`, `torch.nn.AdaptiveAvgPool2d`.
    """

    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return _ADAPTIVE_MEAN[len(size)](x, size)


class AdaptiveLPPool(_AdaptivePool):
    """Power-average pooling to a given output size: `sum(x ** p) ** (1 / p)`.

    As in `LPPool`, there is no absolute value in it, and no gradient where the sum of a window is zero.

    Args:
        output_size: As in `AdaptiveMaxPool`; so are the windows.
        p: The power.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the power is not positive, or the input has too few dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.AdaptiveLPPool((2,))(torch.tensor([[[3.0, 4.0, 5.0, 12.0]]]), {}, {})
        >>> y
        tensor([[[ 5., 13.]]])

    Source: Lux's `AdaptiveLPPool`.
    """

    _: KW_ONLY
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power(self.p)

    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        powers = _ADAPTIVE_MEAN[len(size)](x.pow(self.p), size)
        for dim, number in zip(range(-len(size), 0), size, strict=True):
            window = beside(torch.arange(number, device=x.device), x)
            ends, starts = -(-(window + 1) * x.shape[dim] // number), window * x.shape[dim] // number
            powers = powers * (ends - starts).to(x.dtype).view(-1, *(1,) * (-1 - dim))
        return powers.pow(1 / self.p)


class _GlobalPool(Layer):
    """Base class of the global poolings."""

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the pooled input and `st`."""
        if x.ndim < 3:
            raise unfit(self, x, "The input must have dimensions after batch and channels.")
        return self._pool(x, tuple(range(2, x.ndim))), st

    @abstractmethod
    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor: ...

    def expected_input(self) -> str:
        """Name the dimensions."""
        return "a tensor of shape (batch, channels, ...)"


class GlobalMaxPool(_GlobalPool):
    """Global max pooling: over all dimensions but batch and channels, which are kept with size one.

    Shape:
        (batch, channels, *dims) to (batch, channels, 1, ...)

    Raises:
        InputError: If the input has fewer than three dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.GlobalMaxPool()(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[4.]]])

    Source: Lux's `GlobalMaxPool`; `torch.amax`, which shares the gradient between equal maxima.
    """

    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.amax(dims, keepdim=True)


class GlobalMeanPool(_GlobalPool):
    """Global average pooling: over all dimensions but batch and channels, which are kept with size one.

    Shape:
        (batch, channels, *dims) to (batch, channels, 1, ...)

    Raises:
        InputError: If the input has fewer than three dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.GlobalMeanPool()(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[2.5000]]])

    Source: Lux's `GlobalMeanPool`.
    """

    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.mean(dims, keepdim=True)


class GlobalLPPool(_GlobalPool):
    """Global power-average pooling, `sum(x ** p) ** (1 / p)`, over all dimensions but batch and channels.

    Args:
        p: The power.

    Shape:
        (batch, channels, *dims) to (batch, channels, 1, ...)

    Raises:
        InputError: If the input has fewer than three dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.GlobalLPPool()(torch.tensor([[[3.0, 4.0]]]), {}, {})
        >>> y
        tensor([[[5.]]])

    Source: Lux's `GlobalLPPool`.
    """

    _: KW_ONLY
    p: float = 2.0

    def __post_init__(self) -> None:
        check_power(self.p)

    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.pow(self.p).sum(dims, keepdim=True).pow(1 / self.p)
