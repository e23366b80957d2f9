"""Positions as sines and cosines: `SinusoidalPositionalEmbedding`."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError, Layer, Parameters, States


class SinusoidalPositionalEmbedding(Layer):
    """Turn each position into sines and cosines of many frequencies, which a model can add to its inputs.

    The first half of the output are the sines, the second half the cosines, each from the highest frequency to the
    lowest; the frequencies form a geometric sequence.

    Args:
        embedding_dim: The size of the output's last dimension; even.
        min_freq: The lowest frequency, in radians a position.
        max_freq: The highest frequency.
        scale: What sines and cosines are multiplied by; None for sqrt(2 / embedding_dim), which gives vectors of
            length 1.
        full_turns: Whether frequencies are in turns a position, that is, multiplied by 2 pi.

    States:
        sigmas: (embedding_dim / 2,), the frequencies.

    Shape:
        Positions of any shape (...), whole or not, to (..., embedding_dim). The output has the dtype of the
        positions, or that of the frequencies where the positions are integers.

    Raises:
        InputError: If the size is not an even number, or a frequency is not above 0.
        DTypeError: If the positions are not real numbers.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.SinusoidalPositionalEmbedding(4, scale=1.0)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.arange(2), ps, st)
        >>> y
        tensor([[0.0000e+00, 0.0000e+00, 1.0000e+00, 1.0000e+00],
                [8.4147e-01, 1.0000e-04, 5.4030e-01, 1.0000e+00]])

    Source: Lux's `SinusoidalPositionalEmbedding`; Vaswani et al., "Attention is all you need", 2017.
    """

    embedding_dim: int
    _: KW_ONLY
    min_freq: float = 1e-4
    max_freq: float = 1.0
    scale: float | None = None
    full_turns: bool = False

    def __post_init__(self) -> None:
        require_even(type(self).__name__, self.embedding_dim)
        if not (self.min_freq > 0 and self.max_freq > 0):
            raise InputError(
                "Frequencies are positive numbers.",
                expected="min_freq > 0 and max_freq > 0",
                got=f"min_freq={self.min_freq}, max_freq={self.max_freq}",
            )

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the frequencies."""
        steps = self.embedding_dim // 2
        ratio = self.min_freq / self.max_freq
        turn = 2 * math.pi if self.full_turns else 1.0
        sigmas = [turn * self.max_freq * ratio ** (i / max(steps - 1, 1)) for i in range(steps)]
        return {"sigmas": torch.tensor(sigmas).to(key.device)}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return `cat(sin(x * sigmas), cos(x * sigmas)) * scale`, and `st`."""
        if not isinstance(x, Tensor) or x.dtype.is_complex or x.dtype == torch.bool:
            raise DTypeError(
                "Positions are real numbers.",
                expected=self.expected_input(),
                got=f"a {x.dtype} tensor" if isinstance(x, Tensor) else f"{x!r:.80} of type {type(x).__name__}",
                fix="Pass for instance torch.arange(length).",
            )
        scale = math.sqrt(2 / self.embedding_dim) if self.scale is None else self.scale
        angles = x[..., None] * st["sigmas"]
        y = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1) * scale
        return y.to(x.dtype) if x.is_floating_point() else y, st

    def expected_input(self) -> str:
        """Say that positions may be anything."""
        return "a tensor of positions, of any shape"


def require_even(name: str, size: Any) -> None:
    """Raise unless a size is an even number that is not zero."""
    if not (isinstance(size, int) and size >= 2 and size % 2 == 0):
        raise InputError(f"{name} works on pairs of numbers.", expected="an even size of at least 2", got=f"{size!r}")
