"""Pooling over everything: `GlobalMaxPool`, `GlobalMeanPool` and `GlobalLPPool`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY

from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States

from ._pooling import check_power


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
        check_power(self.p)

    def _pool(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.pow(self.p).sum(dims, keepdim=True).pow(1 / self.p)
