"""Dropout, whose mask is decided by a key in the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import TRAINING, InputError, Layer, Parameters, States, Static
from luxtorch.random import bernoulli, split


class Dropout(Layer):
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

    p: float = 0.5
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError("Dropout takes a probability.", expected="0 <= p <= 1", got=f"p={self.p}")
        if self.dims is not None:
            self._set(dims=(self.dims,) if isinstance(self.dims, int) else tuple(self.dims))

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the key of the first mask, and the mode."""
        return {"rng": key.clone(), TRAINING: Static(True)} if self.p > 0 else {}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the masked input and the state with the next key; in test mode, both as they are."""
        if self.p == 0 or not st[TRAINING]:
            return x, st
        key, rng = split(st["rng"])
        scale = 1 / (1 - self.p) if self.p < 1 else 1.0
        # Choosing, unlike multiplying by a mask, turns infinities and NaNs into zeros too.
        kept = bernoulli(key, 1 - self.p, self._mask_shape(x))
        return torch.where(kept, x * scale, 0.0), {"rng": rng, TRAINING: st[TRAINING]}

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.dims is None:
            return tuple(x.shape)
        varying = {dim % x.ndim for dim in self.dims}
        return tuple(size if dim in varying else 1 for dim, size in enumerate(x.shape))
