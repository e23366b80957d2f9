"""The numbers of a tensor, whatever transforms it is in, and statistics of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luxtorch.core import InputError


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor behind one that transforms of torch.func have wrapped; under vmap, the whole batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


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
        nan, inf = int(plain.isnan().sum()), int(plain.isinf().sum())
        values = plain[plain.isfinite()]
        # In double precision, so that the sums of what is finite are.
        real = (values.abs() if values.is_complex() else values).double()
        numbers = (real.min(), real.max(), real.mean(), real.std(correction=0)) if real.numel() else (torch.nan,) * 4
        return Statistics(tuple(plain.shape), plain.dtype, nan, inf, *map(float, numbers))

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
