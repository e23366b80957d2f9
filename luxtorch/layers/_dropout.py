"""Dropout, whose mask is decided by a key in the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import TRAINING, InputError, Layer, Parameters, States, Static
from luxtorch.core._locate import opened
from luxtorch.random import bernoulli, split


class RandomMask(Layer):
    """Share the probability and the key of the layers below."""

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError(f"{type(self).__name__} takes a probability.", expected="0 <= p <= 1", got=f"p={self.p}")

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the key of the first mask, and the mode."""
        return {"rng": key.clone(), TRAINING: Static(True)} if self.p > 0 else {}


class Dropout(RandomMask):
    """Set each element to zero with probability `p` while training, and scale the others by 1 / (1 - p).

    The same state gives the same mask; the state that is returned gives the next one.

    Args:
        p: The probability of a zero; with 0 the layer does nothing and has no states.
        dims: The dimensions along which the mask varies; it is the same along the others. All of them if None.

    States:
        rng: A key.
        training: Whether anything is dropped.

    Shape:
        Anything to the same.

    Raises:
        InputError: If `p` is not a probability.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Dropout(0.5))
        >>> y, st = lt.Dropout(0.5)(torch.ones(1000), ps, st)
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]

    Source: Lux's `Dropout`, `torch.nn.Dropout`; Srivastava et al., "Dropout", 2014.
    """

    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims is not None:
            self._set(dims=(self.dims,) if isinstance(self.dims, int) else tuple(self.dims))

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the masked input and the state with the next key; in test mode, both as they are."""
        if self.p == 0 or not st[TRAINING]:
            return x if isinstance(x, Tensor) else opened(self, x), st
        key, rng = split(st["rng"])
        return dropped(x, key, self.p, self._mask_shape(x)), {"rng": rng, TRAINING: st[TRAINING]}

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.dims is None:
            return tuple(x.shape)
        varying = {dim % x.ndim for dim in self.dims}
        return tuple(size if dim in varying else 1 for dim, size in enumerate(x.shape))


def dropped(x: Tensor, key: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    """Zero elements by a mask of the given shape, and scale the others; infinities and NaNs become zeros too."""
    scale = 1 / (1 - p) if p < 1 else 1.0
    return torch.where(bernoulli(key, 1 - p, shape), x * scale, 0.0)
