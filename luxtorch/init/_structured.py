"""Initializers whose entries depend on each other: orthogonal, sparse and identity weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import luxtorch.random as lr
from luxtorch._errors import out_of_range, wrong_type

from ._distributions import centered_normal
from ._initializer import initializer


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
