"""Initializers that fill with one number."""

from __future__ import annotations

import torch
from torch import Tensor

from ._initializer import initializer


@initializer
def constant(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, value: complex) -> Tensor:
    """Fill with one number.

    Args:
        key: A key, which only says where the tensor lives; without it and the shape, the options are bound.
        shape: The shape of the output.
        value: The number.
        dtype: Any dtype that holds the number.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: `constant_` in torch.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import constant
        >>> constant(value=0.5)(lr.key(0), (3,))
        tensor([0.5000, 0.5000, 0.5000])
    """
    return torch.full(shape, value, dtype=dtype, device=key.device)


@initializer
def zeros(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fill with zeros.

    Args:
        key: A key, which only says where the tensor lives; without it and the shape, dtype and device are bound.
        shape: The shape of the output.
        dtype: Any dtype.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Lux's `zeros32` and its siblings, `zeros_` in torch.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> from luxtorch.init import zeros
        >>> zeros(dtype=torch.float64)(lr.key(0), (2,))
        tensor([0., 0.], dtype=torch.float64)
    """
    return torch.zeros(shape, dtype=dtype, device=key.device)


@initializer
def ones(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fill with ones.

    Args:
        key: A key, which only says where the tensor lives; without it and the shape, dtype and device are bound.
        shape: The shape of the output.
        dtype: Any dtype.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Lux's `ones32` and its siblings, `ones_` in torch.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import ones
        >>> ones(lr.key(0), (2,))
        tensor([1., 1.])
    """
    return torch.ones(shape, dtype=dtype, device=key.device)
