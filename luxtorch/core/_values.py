"""The numbers of a tensor, whatever transforms it is in, and statistics of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, isfinite, isnan, prod, sqrt

import torch
from torch import Tensor

from luxtorch._errors import InputError
from luxtorch._transforms import unwrapped


def physical(tensor: Tensor) -> Tensor:
    """Return the plain tensor behind another, detached and dense."""
    plain = unwrapped(tensor)
    dense = plain.detach() if plain.layout is torch.strided else plain.detach().to_dense()
    return unwrapped(dense)  # a transform around us has wrapped what was made


def readable(tensor: Tensor) -> Tensor | None:
    """Return a physical tensor of real or complex numbers; None where there are no numbers to read.

    Raises:
        InputError: If a tracer looks on, to which the tensor has no numbers yet.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    plain = physical(tensor)
    if type(plain).__name__ in ("FakeTensor", "FunctionalTensor"):
        raise InputError(
            "The numbers of a tensor are to be read, but what is being traced has none.",
            expected="a plain call, or one under grad, jvp and vmap of torch.func",
            got="a call under lt.jit, torch.export or another tracer",
            fix="Call the model without it as long as you look inside.",
        )
    return None if plain.is_meta or not plain.numel() else plain


@dataclass(frozen=True)
class Statistics:
    """Hold statistics of the numbers in a tensor.

    Args:
        shape: The shape; under vmap, with the batch.
        dtype: The dtype.
        nan: How many are NaN.
        inf: How many are infinite.
        minimum: The smallest of the finite numbers; of complex ones the smallest magnitude. NaN if there are none.
        maximum: The largest.
        mean: Their mean, of complex numbers that of the magnitudes.
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
        # In double precision, so that the sums of what is finite are.
        numbers = (plain.abs() if plain.is_complex() else plain).double()
        nan = inf = 0
        # The extremes tell in one pass whether all are finite. To look for those that are not takes ten times as long.
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
        """Whether all numbers are."""
        return not (self.nan or self.inf)

    def __str__(self) -> str:
        bad = f"{self.nan:_} NaN, {self.inf:_} Inf"
        if self.nan + self.inf == torch.Size(self.shape).numel():
            return f"{self.dtype} {self.shape}: {bad}, no others"
        rest = f"from {self.minimum:.4g} to {self.maximum:.4g}, mean {self.mean:.4g}, std {self.std:.4g}"
        return f"{self.dtype} {self.shape}: " + (rest if self.finite else f"{bad}, the others {rest}")
