"""Pooling to a given size: `AdaptiveMaxPool`, `AdaptiveMeanPool` and `AdaptiveLPPool`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import Layer, Parameters, States

from ._pooling import PoolByDims, check_power
from ._spatial import SPATIAL, sizes

_MAX: PoolByDims = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_MEAN: PoolByDims = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class _AdaptivePool(Layer):
    """Hold what all poolings to a given size have in common."""

    output_size: tuple[int | None, ...]

    def __post_init__(self) -> None:
        self._set(output_size=sizes("output_size", self.output_size, optional=True))

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return what is pooled over windows of such sizes that the output has the layer's, and `st`."""
        # torch takes None in two and three dimensions only.
        present = x.shape[x.ndim - len(self.output_size) :]
        return self._pool(x, tuple(s or n for s, n in zip(self.output_size, present, strict=True))), st

    @abstractmethod
    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor: ...

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor of shape (batch, channels, {SPATIAL[len(self.output_size)]})"


class AdaptiveMaxPool(_AdaptivePool):
    """Take the maximum over windows of such sizes that the output has a given size.

    Window i of o in a dimension of n elements reaches from `floor(i * n / o)` to `ceil((i + 1) * n / o)`, as in torch.

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

    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return _MAX[len(size)](x, size)


class AdaptiveMeanPool(_AdaptivePool):
    """Take the mean over windows of such sizes that the output has a given size.

    Args:
        output_size: As in `AdaptiveMaxPool`, whose windows these are.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the input has not as many dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.AdaptiveMeanPool((2,))(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]), {}, {})
        >>> y
        tensor([[[1.5000, 3.5000]]])

    Source: Lux's `AdaptiveMeanPool`, `torch.nn.AdaptiveAvgPool2d`.
    """

    def _pool(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return _MEAN[len(size)](x, size)


class AdaptiveLPPool(_AdaptivePool):
    """Take `sum(x ** p) ** (1 / p)` over windows of such sizes that the output has a given size.

    As in `LPPool`, `x` is not made positive, and where a window's sum is zero there is no gradient.

    Args:
        output_size: As in `AdaptiveMaxPool`, whose windows these are.
        p: The power.

    Shape:
        (batch, channels, *dims) to (batch, channels, *output_size); the batch may be missing.

    Raises:
        InputError: If the power is not positive, or the input has not as many dimensions.

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
        powers = _MEAN[len(size)](x.pow(self.p), size)
        for dim, number in zip(range(-len(size), 0), size, strict=True):
            window = torch.arange(number, device=x.device)
            ends, starts = -(-(window + 1) * x.shape[dim] // number), window * x.shape[dim] // number
            powers = powers * (ends - starts).to(x.dtype).view(-1, *(1,) * (-1 - dim))
        return powers.pow(1 / self.p)
