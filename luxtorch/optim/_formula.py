"""Pieces that the formulas of several rules share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def zeros(p: Tensor, *names: str) -> dict[str, Tensor]:
    """Return slots that hold a zero for each element of a parameter."""
    return {name: torch.zeros_like(p) for name in names}


def counted(p: Tensor, *names: str) -> dict[str, Tensor]:
    """Return slots that hold zeros, and the count of the steps."""
    # The step count is what the fused kernels take: float32, beside the parameter. It is exact up to 2**24 steps.
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, **zeros(p, *names)}


def decayed(g: Tensor, p: Tensor, h: Mapping[str, Tensor]) -> Tensor:
    """Return the gradient with that of the penalty `weight_decay / 2 * (p * p).sum()`."""
    return g + h["weight_decay"] * p


def sqrt(x: Tensor) -> Tensor:
    """Return the square root, with derivative zero where x is zero.

    An infinite derivative there would make every gradient through a step NaN as soon as one entry of the
    gradient is zero, as it is for each dead unit.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def sign(x: Tensor) -> Tensor:
    """Return the sign, NaN where x is not finite: `torch.sign` would hide there that training has failed."""
    return x.sign() + 0.0 * x


def rms(x: Tensor) -> Tensor:
    """Return the root of the mean square."""
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(max(x.numel(), 1))
