"""Pooling over windows, over everything, and to a given size, in one to three dimensions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States

from ._spatial import SPATIAL, Padding, Pairs, PerDim, padded, pairs, per_dim, shown, sizes, symmetric

_ByDims = dict[int, Callable[..., Tensor]]
_MAX: _ByDims = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: _ByDims = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LP: _ByDims = {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}
_ADAPTIVE_MAX: _ByDims = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_ADAPTIVE_MEAN: _ByDims = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class _Pool(Layer):
    """Hold what all poolings over windows have in common."""

    kernel_size: tuple[int, ...]
    _: KW_ONLY
    stride: PerDim | None = None
    padding: Padding = 0

    def __post_init__(self) -> None:
        kernel = sizes("kernel_size", self.kernel_size)
        stride = kernel if self.stride is None else per_dim("stride", self.stride, len(kernel), least=1)
        self._set(kernel_size=kernel, stride=stride)
        dilation = self._set_dilation()
        extent = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        padding = pairs(self.padding, extent)
        if any(max(pair) > (reach + 1) // 2 for pair, reach in zip(padding, extent, strict=True)):
            raise InputError(
                "A window could lie in the padding alone.",
                expected="a padding of at most half of the kernel, its dilation included",
                got=f"kernel_size={kernel}, padding={self.padding!r}",
            )
        self._set(padding=padding)

    def _set_dilation(self) -> tuple[int, ...]:
        return (1,) * self._dims

    @property
    def _dims(self) -> int:
        return len(self.kernel_size)

    @property
    def _pairs(self) -> Pairs:
        return self.padding  # type: ignore[return-value]

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor of shape (batch, channels, {SPATIAL[self._dims]}), no smaller than the window"

    def extra_repr(self) -> str:
        """Return for instance `(2, 2), padding=1`."""
        stride = [] if self.stride == self.kernel_size else shown("stride", self.stride, None)  # type: ignore[arg-type]
        return ", ".join([f"{self.kernel_size}", *stride, *shown("padding", self._pairs, 0), *self._more_repr()])

    def _more_repr(self) -> list[str]:
        return []


class MaxPool(_Pool):
    """Take the maximum over each window.

    The length of `kernel_size` says in how many dimensions, one to three. What is given per dimension may be a single
    number for all.

    Args:
        kernel_size: The window's size in each dimension, a tuple.
        stride: The step from one window to the next, per dimension; the window's size if None.
        padding: A number, or per dimension a number or a pair (before, after), "valid" for none or "same" for
            `dilation * (kernel_size - 1)` in all, an odd amount larger at the end. The padding is never the maximum.
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

    def _set_dilation(self) -> tuple[int, ...]:
        dilation = per_dim("dilation", self.dilation, self._dims, least=1)
        self._set(dilation=dilation)
        return dilation

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the maxima and `st`."""
        both_sides = symmetric(self._pairs)
        if both_sides is None:
            x, both_sides = padded(x, self._pairs, value=-torch.inf), (0,) * self._dims
        return _MAX[self._dims](x, self.kernel_size, self.stride, both_sides, self.dilation), st

    def _more_repr(self) -> list[str]:
        return shown("dilation", self.dilation, 1)  # type: ignore[arg-type]


class MeanPool(_Pool):
    """Take the mean over each window, in which padding counts as zeros.

    The length of `kernel_size` says in how many dimensions, one to three. What is given per dimension may be a single
    number for all.

    Args:
        kernel_size: The window's size in each dimension, a tuple.
        stride: The step from one window to the next, per dimension; the window's size if None.
        padding: A number, or per dimension a number or a pair (before, after), "valid" for none or "same" for
            `kernel_size - 1` in all, an odd amount larger at the end.

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

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the means and `st`."""
        both_sides = symmetric(self._pairs)
        if both_sides is None:
            x, both_sides = padded(x, self._pairs), (0,) * self._dims
        y = _MEAN[self._dims](_pooled_in(x, self._dims), self.kernel_size, self.stride, both_sides)
        return y.to(x.dtype), st


class LPPool(_Pool):
    """Take the power mean without its factor over each window: `sum(x ** p) ** (1 / p)`, where padding is zeros.

    The length of `kernel_size` says in how many dimensions, one to three. What is given per dimension may be a single
    number for all. As in torch, `x` is not made positive, and where a window's sum is zero there is no gradient.

    Args:
        kernel_size: The window's size in each dimension, a tuple.
        stride: The step from one window to the next, per dimension; the window's size if None.
        padding: A number, or per dimension a number or a pair (before, after), "valid" for none or "same" for
            `kernel_size - 1` in all, an odd amount larger at the end.
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
        _check_power(self.p)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the norms and `st`."""
        y = padded(_pooled_in(x, self._dims), self._pairs)
        kernel = self.kernel_size if self._dims > 1 else self.kernel_size[0]
        stride = self.stride if self._dims > 1 else self.stride[0]  # type: ignore[index]
        return _LP[self._dims](y, float(self.p), kernel, stride).to(x.dtype), st

    def _more_repr(self) -> list[str]:
        return [f"p={self.p}"] if self.p != 2 else []


class _GlobalPool(Layer):
    """Hold what all poolings over everything have in common."""

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return what is pooled over all dimensions but batch and channels, and `st`."""
        if x.ndim < 3:
            raise InputError(
                "There is nothing to pool over.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}",
                fix="The first two dimensions, batch and channels, are kept.",
            )
        return self._pool(x, tuple(range(2, x.ndim))), st

    @abstractmethod
    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor: ...

    def expected_input(self) -> str:
        """Name the dimensions."""
        return "a tensor of shape (batch, channels, ...)"


class GlobalMaxPool(_GlobalPool):
    """Take the maximum over all dimensions but batch and channels, which stay with size one.

    Shape:
        (batch, channels, *dims) to (batch, channels, 1, ...)

    Raises:
        InputError: If the input has no such dimension.

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
    """Take the mean over all dimensions but batch and channels, which stay with size one.

    Shape:
        (batch, channels, *dims) to (batch, channels, 1, ...)

    Raises:
        InputError: If the input has no such dimension.

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
    """Take `sum(x ** p) ** (1 / p)` over all dimensions but batch and channels, which stay with size one.

    Args:
        p: The power.

    Shape:
        (batch, channels, *dims) to (batch, channels, 1, ...)

    Raises:
        InputError: If the input has no such dimension.

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
        _check_power(self.p)

    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.pow(self.p).sum(dims, keepdim=True).pow(1 / self.p)


class _AdaptivePool(Layer):
    """Hold what all poolings to a given size have in common."""

    output_size: tuple[int | None, ...]

    def __post_init__(self) -> None:
        self._set(output_size=sizes("output_size", self.output_size, optional=True))

    def _pool(self, x: Tensor, by_dims: _ByDims) -> Tensor:
        # torch takes None in two and three dimensions only.
        present = x.shape[x.ndim - len(self.output_size) :]
        return by_dims[len(present)](x, tuple(s or n for s, n in zip(self.output_size, present, strict=True)))

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor of shape (batch, channels, {SPATIAL[len(self.output_size)]})"


class AdaptiveMaxPool(_AdaptivePool):
    """Take the maximum over windows of such sizes that the output has a given size.

    Args:
        output_size: The output's size in each dimension, one to three of them, a tuple; None keeps the input's.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the input has not as many dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.AdaptiveMaxPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[2., 4.]]])

    Source: `torch.nn.AdaptiveMaxPool2d`; Lux's `AdaptiveMaxPool` chooses other windows where sizes do not divide.
    """

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the maxima and `st`."""
        return self._pool(x, _ADAPTIVE_MAX), st


class AdaptiveMeanPool(_AdaptivePool):
    """Take the mean over windows of such sizes that the output has a given size.

    Args:
        output_size: The output's size in each dimension, one to three of them, a tuple; None keeps the input's.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the input has not as many dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.AdaptiveMeanPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[1.5000, 3.5000]]])

    Source: `torch.nn.AdaptiveAvgPool2d`; Lux's `AdaptiveMeanPool` chooses other windows where sizes do not divide.
    """

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the means and `st`."""
        return self._pool(x, _ADAPTIVE_MEAN), st


def _pooled_in(x: Tensor, dims: int) -> Tensor:
    """Return the input in a dtype that torch can average: in three dimensions on CPU, at least single precision."""
    narrow = dims == 3 and x.dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu"
    return x.float() if narrow else x


def _check_power(p: Any) -> None:
    if not 0 < p < torch.inf:
        raise InputError("The power is a positive number.", expected="0 < p < inf", got=f"p={p}")
