"""Initializers: constants, distributions of single entries, and orthogonal, sparse and identity weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import luxtorch.random as lr
from luxtorch._errors import InputError, out_of_range, wrong_type

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


@initializer
def orthogonal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, gain: float = 1.0) -> Tensor:
    """Draw a matrix with orthonormal rows or columns, whichever are fewer, uniformly (by the Haar measure).

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: At least two dimensions; all but the first count as the columns of one matrix.
        gain: A factor that belongs to the activation, see `calculate_gain`.
        dtype: The dtype; if complex, the matrix is unitary. Half types are drawn in float32 and rounded.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear
        neural networks", 2014; `orthogonal_` in torch.

    Raises:
        InputError: If the shape has fewer than two dimensions.
        DTypeError: If the dtype is an integer type.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> from luxtorch.init import orthogonal
        >>> weight = orthogonal(lr.key(0), (3, 5))
        >>> torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-6)
        True
    """
    if len(shape) < 2:
        raise out_of_range("shape", shape, "of two dimensions or more")
    if not (dtype.is_floating_point or dtype.is_complex):
        raise wrong_type("dtype", dtype, "a floating point or complex dtype")
    rows, columns = shape[0], math.prod(shape[1:])
    wide = torch.promote_types(dtype, torch.float32)
    q, r = torch.linalg.qr(centered_normal(key, (max(rows, columns), min(rows, columns)), wide, 1.0))
    # QR is unique up to these signs; without them the distribution would not be uniform.
    matrix: Tensor = q * r.diagonal().sgn() * gain
    return (matrix if rows >= columns else matrix.mT).reshape(shape).to(dtype)


@initializer
def sparse_init(
    key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, sparsity: float, std: float = 0.01
) -> Tensor:
    """Draw normally, with the same number of zeros in every column, each at a random place.

    Args:
        key: A key; without it and the shape, the options are bound.
        shape: Two dimensions.
        sparsity: The fraction of each column that is zero, from 0 to 1; the number of zeros is rounded up.
        std: The standard deviation of the other entries.
        dtype: The dtype; if complex, real and imaginary part have half of the variance each.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Martens, "Deep learning via Hessian-free optimization", 2010; `sparse_` in torch.

    Raises:
        InputError: If the shape does not have two dimensions, or `sparsity` is not between 0 and 1.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import sparse_init
        >>> weight = sparse_init(lr.key(0), (10, 3), sparsity=0.25)
        >>> (weight == 0).sum(0)
        tensor([3, 3, 3])
    """
    if len(shape) != 2:
        raise out_of_range("shape", shape, "of two dimensions")
    if not 0 <= sparsity <= 1:
        raise out_of_range("sparsity", sparsity, "between 0 and 1")
    values, places = lr.split(key)
    ranks = lr.uniform(places, shape, dtype=torch.float32).argsort(0).argsort(0)
    return centered_normal(values, shape, dtype, std).masked_fill(ranks < math.ceil(sparsity * shape[0]), 0.0)


@initializer
def identity_init(
    key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, gain: float = 1.0, shift: int | tuple[int, int] = 0
) -> Tensor:
    """Make the weight (or the bias) of a layer that returns its input.

    Args:
        key: A key, which only says where the weight lives; without it and the shape, the options are bound.
        shape: One dimension, a bias, gives zeros; two give an identity matrix; more, (out, in, *kernel), give
            an identity at the center of the kernel, which is the input for odd kernels with as much padding.
        gain: A factor.
        shift: By how many channels the output is rolled; or a pair, for the rows (out) and the columns (in).
        dtype: The dtype.
        device: The device; the key's if None.

    Returns:
        A tensor of `shape`. Source: Lux's `identity_init`; `eye_` and `dirac_` in torch.

    Raises:
        InputError: If the shape has no dimension.

    Example:
        >>> import luxtorch.random as lr
        >>> from luxtorch.init import identity_init
        >>> identity_init(lr.key(0), (3, 3), shift=1)
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    if not shape:
        raise out_of_range("shape", shape, "of one dimension or more")
    weight = torch.zeros(shape, dtype=dtype, device=key.device)
    if len(shape) == 1 or weight.numel() == 0:
        return weight
    center: tuple[Any, ...] = (..., *(size // 2 for size in shape[2:]))
    weight[center] = gain * torch.eye(*shape[:2], dtype=dtype, device=key.device)
    return weight.roll((shift, 0) if isinstance(shift, int) else shift, (0, 1))
