"""Initializers that fill with a constant, or draw every entry from one distribution, whatever the shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import luxtorch.random as lr
from luxtorch._errors import InputError, wrong_type

from ._initializer import initializer

# As `dtype.to_real()`, which torch.compile cannot trace.
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


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


@initializer
def uniform(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw uniformly from the interval [low, high).

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the output.
        low: The lower bound, included.
        high: The upper bound, excluded.
        dtype: The dtype; if complex, the real and the imaginary part are drawn independently.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Lux's `rand32` and its siblings, `torch.nn.init.uniform_`.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import uniform
        >>> bool(uniform(lr.key(0), (100,), low=2.0, high=3.0).min() >= 2.0)
        True
    """
    return by_parts(lr.uniform, key, shape, dtype, low=low, high=high)


@initializer
def normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw from the normal distribution.

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the output.
        mean: The mean.
        std: The standard deviation.
        dtype: The dtype; if complex, real and imaginary part have half of the variance each.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Lux's `randn32` and its siblings, `torch.nn.init.normal_`.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import normal
        >>> normal(std=0.1)(lr.key(0), (2, 3)).shape
        torch.Size([2, 3])
    """
    draw = centered_normal(key, shape, dtype, std)
    return draw + mean if mean else draw


@initializer
def truncated_normal(
    key: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    low: float = -2.0,
    high: float = 2.0,
) -> Tensor:
    """Draw from the normal distribution, cut off below `low` and above `high`.

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: The shape of the output.
        mean: The mean before cutting.
        std: The standard deviation before cutting.
        low: The lower cut, as a value (not in standard deviations).
        high: The upper cut, as a value.
        dtype: A real floating dtype.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Lux's and torch's `trunc_normal_`.

    Raises:
        DTypeError: If the dtype is complex.
        InputError: If `low` is not below `high`, or the mean is more than two standard deviations outside of both.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import truncated_normal
        >>> bool(truncated_normal(lr.key(0), (100,), std=0.5, low=-1.0, high=1.0).abs().max() <= 1.0)
        True
    """
    if dtype.is_complex:
        raise wrong_type("dtype", dtype, "real, as complex numbers have no order to cut by")
    if mean < low - 2 * std or mean > high + 2 * std:
        raise InputError(
            "The mean must be no more than two std outside the cuts, or too little lies between them.",
            got=f"mean={mean}, std={std}, low={low}, high={high}",
            fix="Move the mean towards the cuts, or use uniform.",
        )
    return lr.truncated_normal(key, shape, mean=mean, std=std, low=low, high=high, dtype=dtype)


def centered_uniform(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, std: float) -> Tensor:
    """Draw from the uniform distribution of mean 0 and a given standard deviation."""
    bound = math.sqrt(3.0) * _part(std, dtype)
    return by_parts(lr.uniform, key, shape, dtype, low=-bound, high=bound)


def centered_normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, std: float) -> Tensor:
    """Draw from the normal distribution of mean 0 and a given standard deviation."""
    return by_parts(lr.normal, key, shape, dtype, std=_part(std, dtype))


def by_parts(
    draw: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> Tensor:
    """Draw real numbers; or complex ones, whose real and imaginary parts are drawn alike and independently."""
    if dtype.is_complex:
        return torch.view_as_complex(draw(key, (*shape, 2), dtype=_PARTS[dtype], **options))
    return draw(key, shape, dtype=dtype, **options)


def _part(std: float, dtype: torch.dtype) -> float:
    # The variance of a complex number is the sum of those of its parts.
    return std / math.sqrt(2.0) if dtype.is_complex else std
