"""Statistics of tensor values, also inside of transforms: NaN, Inf, minimum, maximum, mean, std."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, isfinite, isnan, prod, sqrt

import torch
from torch import Tensor

from luxtorch._errors import InputError
from luxtorch._transforms import unwrapped


def physical(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside of transform wrappers, detached and dense."""
    plain = unwrapped(tensor)
    dense = plain.detach() if plain.layout is torch.strided else plain.detach().to_dense()
    return unwrapped(dense)  # an active transform wraps the new tensor again


def readable(tensor: Tensor) -> Tensor | None:
    """Return the plain tensor of real or complex values; None if there are no values to read.

    Raises:
        InputError: If the tensor is being traced.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    plain = physical(tensor)
    if type(plain).__name__ in ("FakeTensor", "FunctionalTensor"):
        raise InputError(
            "Tensor values cannot be read while the call is being traced.",
            expected="a plain call, or one under grad, jvp and vmap of torch.func",
            got="a call under lt.jit, torch.export or another tracer",
            fix="Call the model without it while you inspect values.",
        )
    return None if plain.is_meta or not plain.numel() else plain


@dataclass(frozen=True)
class Statistics:
    """Hold statistics of the values of a tensor.

    Args:
        shape: The shape; under vmap, with the batch dimension.
        dtype: The dtype.
        nan: The number of NaNs.
        inf: The number of infinities.
        minimum: The smallest finite value; for complex numbers the smallest magnitude. NaN if there is none.
        maximum: The largest.
        mean: Their mean, for complex numbers that of the magnitudes.
        std: Their standard deviation, not corrected.

    Example:
        >>> import torch
        >>> print(Statistics.of(torch.tensor([1.0, 3.0, torch.nan])))
        torch.float32 (3,): 1 NaN, 0 Inf, the others from 1 to 3, mean 2, std 1
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nan: int
    inf: int
    minimum: float
    maximum: float
    mean: float
    std: float

    @staticmethod
    def of(tensor: Tensor) -> Statistics:
        """Compute the statistics of a tensor."""
        plain = physical(tensor)
        # In double precision, so that sums of finite values are finite.
        numbers = (plain.abs() if plain.is_complex() else plain).double()
        nan = inf = 0
        # The extremes show in one pass whether all are finite. Counting those that are not takes ten times as long.
        if not (plain.numel() and all(map(isfinite, map(float, numbers.aminmax())))):
            given = plain if plain.is_complex() else numbers
            nan, inf = int(given.isnan().sum()), int(given.isinf().sum())
            numbers = numbers[given.isfinite()]
        if not numbers.numel():
            return Statistics(tuple(plain.shape), plain.dtype, nan, inf, *(torch.nan,) * 4)
        found = (*numbers.aminmax(), numbers.mean(), numbers.std(correction=0))
        return Statistics(tuple(plain.shape), plain.dtype, nan, inf, *map(float, found))

    @staticmethod
    def pooled(parts: Sequence[Statistics]) -> Statistics:
        """Return the statistics of several tensors as if they were one, of the dtype of the first.

        Example:
            >>> import torch
            >>> print(Statistics.pooled([Statistics.of(torch.tensor([1.0])), Statistics.of(torch.tensor([3.0, 5.0]))]))
            torch.float32 (3,): from 1 to 5, mean 3, std 1.633
        """
        dtype, nan, inf = parts[0].dtype, sum(part.nan for part in parts), sum(part.inf for part in parts)
        shape = (sum(prod(part.shape) for part in parts),)
        known = [(prod(part.shape) - part.nan - part.inf, part) for part in parts if not isnan(part.mean)]
        number = sum(n for n, _ in known)
        if not number:
            return Statistics(shape, dtype, nan, inf, *(torch.nan,) * 4)
        mean = sum(n / number * part.mean for n, part in known)
        std = hypot(*(sqrt(n / number) * d for n, part in known for d in (part.std, part.mean - mean)))
        smallest, largest = min(part.minimum for _, part in known), max(part.maximum for _, part in known)
        return Statistics(shape, dtype, nan, inf, smallest, largest, mean, std)

    @property
    def finite(self) -> bool:
        """Whether all values are finite."""
        return not (self.nan or self.inf)

    def __str__(self) -> str:
        bad = f"{self.nan:_} NaN, {self.inf:_} Inf"
        if self.nan + self.inf == torch.Size(self.shape).numel():
            return f"{self.dtype} {self.shape}: {bad}, no others"
        rest = f"from {self.minimum:.4g} to {self.maximum:.4g}, mean {self.mean:.4g}, std {self.std:.4g}"
        return f"{self.dtype} {self.shape}: " + (rest if self.finite else f"{bad}, the others {rest}")
