"""Distributions: tensors of random numbers as functions of a key and a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from luxtorch._errors import out_of_range, wrong_shape, wrong_type

from . import _ops, _philox
from ._checks import drawn, finite, number, parameters, single
from ._key import is_whole


def uniform(
    key: Tensor, shape: Sequence[int] = (), *, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw uniformly from the interval [low, high).

    Args:
        key: A key; or a batch of keys of shape (*batch, 2), which draw a slice each: `shape` then starts with `batch`.
        shape: The shape of the output.
        low: The lower bound, included.
        high: The upper bound, excluded.
        dtype: A real floating dtype; the default dtype of torch if None.

    Returns:
        A tensor of `shape` on the key's device.

    Raises:
        InputError: If `low` is above `high`, or one is not finite.
        DTypeError: If one is not a number. For bounds that are tensors, scale and shift a standard draw.

    Example:
        >>> import luxtorch.random as lr
        >>> lr.uniform(lr.key(0), (2, 3)).shape
        torch.Size([2, 3])
    """
    shape, dtype = drawn(key, shape, dtype)
    low, high = finite("low", low), finite("high", high)
    if low > high:
        raise out_of_range("low", low, f"at most high, which is {high}")
    return _ops.call(_ops.uniform, "uniform", key, shape, low, high, dtype)


def normal(
    key: Tensor, shape: Sequence[int] = (), *, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw from the normal distribution.

    Args:
        key: A key; or a batch of keys of shape (*batch, 2), which draw a slice each: `shape` then starts with `batch`.
        shape: The shape of the output.
        mean: The mean.
        std: The standard deviation.
        dtype: A real floating dtype; the default dtype of torch if None.

    Returns:
        A tensor of `shape` on the key's device.

    Raises:
        InputError: If `std` is negative, or a number is not finite.
        DTypeError: If one is not a number. For tensors, scale and shift a standard draw.

    Example:
        >>> import luxtorch.random as lr
        >>> lr.normal(lr.key(0), (2, 3)).shape
        torch.Size([2, 3])
    """
    shape, dtype = drawn(key, shape, dtype)
    mean, std = finite("mean", mean), finite("std", std)
    if std < 0:
        raise out_of_range("std", std, "at least 0")
    return _ops.call(_ops.normal, "normal", key, shape, mean, std, dtype)


def truncated_normal(
    key: Tensor,
    shape: Sequence[int] = (),
    *,
    mean: float = 0.0,
    std: float = 1.0,
    low: float = -2.0,
    high: float = 2.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw from the normal distribution, cut off below `low` and above `high`.

    Args:
        key: A key, or a batch of keys.
        shape: The shape of the output.
        mean: The mean before cutting.
        std: The standard deviation before cutting.
        low: The lower cut, as a value (not in standard deviations).
        high: The upper cut, as a value.
        dtype: A real floating dtype; the default dtype of torch if None.

    Returns:
        A tensor of `shape` on the key's device, by inversion of the distribution function.

    Raises:
        InputError: If `low` is not below `high`, or `std` is not positive.

    Example:
        >>> import luxtorch.random as lr
        >>> draw = lr.truncated_normal(lr.key(0), (1000,), low=-1.0, high=0.5)
        >>> bool(draw.min() >= -1.0), bool(draw.max() <= 0.5)
        (True, True)
    """
    mean, std, low, high = finite("mean", mean), finite("std", std), number("low", low), number("high", high)
    if not low < high:
        raise out_of_range("low", low, f"below high, which is {high}")
    if not std > 0:
        raise out_of_range("std", std, "positive")
    shape, dtype = drawn(key, shape, dtype)
    cuts = (low - mean) / std, (high - mean) / std
    # Floating point is finer near 0 than near 1, so an upper tail is drawn as a lower one and reflected.
    sign = -1.0 if cuts[0] > 0 else 1.0
    below, above = sorted(0.5 * math.erfc(-sign * cut / math.sqrt(2.0)) for cut in cuts)
    central = cuts[0] <= 0 <= cuts[1] and dtype != torch.float64
    wide = torch.float32 if central else torch.float64
    draw: Tensor = torch.special.ndtri(uniform(key, shape, low=below, high=above, dtype=wide))
    return draw.mul(sign * std).add(mean).clamp(low, high).to(dtype)


_PROBABLE = "a probability, from 0 to 1"


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None) -> Tensor:
    """Draw True with probability `p`.

    Args:
        key: A key, or a batch of keys.
        p: The probability, a number or a tensor that broadcasts to `shape`.
        shape: The shape of the output; that of `p` if None.

    Returns:
        A bool tensor of `shape` on the key's device.

    Raises:
        InputError: If `p` is not between 0 and 1, where that can be seen without waiting for a device; elsewhere, the
            draw is False.

    Example:
        >>> import luxtorch.random as lr
        >>> lr.bernoulli(lr.key(0), 1.0, (3,))
        tensor([True, True, True])
    """
    if isinstance(p, Tensor):
        shape, _, (p,) = parameters(key, shape, None, lambda p: (p >= 0) & (p <= 1), _PROBABLE, p=p)
        return uniform(key, shape, dtype=p.dtype) < p
    if not 0 <= number("p", p) <= 1:
        raise out_of_range("p", p, _PROBABLE)
    return uniform(key, shape or (), dtype=torch.float32) < p


def bernoulli_rows(key: Tensor, p: float, shape: Sequence[int], first: int, rows: int) -> Tensor:
    """Return some rows of what `bernoulli` draws; the others are not drawn where the kernel can begin anywhere."""
    if not _philox.begins_anywhere(key.device.type):
        return bernoulli(key, p, shape)[first : first + rows].contiguous()
    width = math.prod(shape[1:])
    later, skipped = _philox.advanced(key, first * width)
    drawn = uniform(later, (skipped + rows * width,), dtype=torch.float32)
    return drawn[skipped:].reshape(rows, *shape[1:]) < p


def randint(
    key: Tensor, shape: Sequence[int] = (), low: int = 0, high: int = 2, *, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Draw integers uniformly from low, ..., high - 1.

    Args:
        key: A key, or a batch of keys.
        shape: The shape of the output.
        low: The smallest integer.
        high: One more than the largest integer.
        dtype: An integer dtype.

    Returns:
        A tensor of `shape` on the key's device.

    Raises:
        InputError: If the range is empty, or wider than the 2^53 numbers that a float64 tells apart, or does not fit
            in the dtype.
        DTypeError: If a bound is not an integer.

    Example:
        >>> import luxtorch.random as lr
        >>> sorted(set(lr.randint(lr.key(0), (100,), 3, 6).tolist()))
        [3, 4, 5]
    """
    for name, bound in (("low", low), ("high", high)):
        if not is_whole(bound):
            raise wrong_type(name, bound, "an int")
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise wrong_type("dtype", dtype, "an integer dtype")
    span = high - low
    if not 0 < span <= 2**53:
        raise out_of_range("high - low", span, "at least 1 and at most 2**53")
    limits = torch.iinfo(dtype)
    if low < limits.min or high - 1 > limits.max:
        raise out_of_range("low and high", (low, high), f"in the range of {dtype}")
    return (uniform(key, shape, dtype=torch.float64) * span).to(torch.int64).add(low).to(dtype)


def permutation(key: Tensor, x: int | Tensor) -> Tensor:
    """Shuffle the numbers 0, ..., x - 1, or the rows of a tensor.

    Args:
        key: One key; for a batch of keys, use `torch.vmap`.
        x: How many numbers; or a tensor, whose first dimension is shuffled.

    Returns:
        An int64 tensor of shape (x,) on the key's device; or a tensor like `x`.

    Raises:
        DTypeError: If `x` is neither an integer nor a tensor.
        InputError: If it is negative, or a tensor without dimensions.

    Example:
        >>> import luxtorch.random as lr
        >>> sorted(lr.permutation(lr.key(0), 5).tolist())
        [0, 1, 2, 3, 4]
    """
    order = torch.argsort(uniform(single(key), (rows(x),), dtype=torch.float64))
    return x.index_select(0, order) if isinstance(x, Tensor) else order


def rows(x: int | Tensor) -> int:
    """Return how many things `x` is: a number, or a tensor of rows."""
    if isinstance(x, Tensor):
        if x.ndim == 0:
            raise wrong_shape("x", x, "one dimension or more", fix="For the numbers below x, pass an int.")
        return x.shape[0]
    if not is_whole(x):
        raise wrong_type("x", x, "an int or a tensor")
    if x < 0:
        raise out_of_range("x", x, "at least 0")
    return x
