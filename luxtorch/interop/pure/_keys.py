"""`Keys`: a sequence of keys for the random numbers of one call of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import vmap_levels
from luxtorch.core import tensors
from luxtorch.random import fold_in, split


class Keys:
    """Make keys for the random numbers of a call.

    Args:
        rng: The key that all of them derive from.
        given: All arguments of the call.

    Attributes:
        rng: The key for the next call.
    """

    def __init__(self, rng: Tensor, given: Any = ()) -> None:
        self.rng = rng
        self._given = given
        self._key: Tensor | None = None
        self._batch: Tensor | None = None
        self._made = 0

    def next(self) -> Tensor:
        """Return a key that was not used before."""
        if self._key is None:  # the key stays the same if nothing is drawn
            self._key, self.rng = split(self.rng)
        self._made += 1
        return fold_in(self._key, self._made)

    @property
    def batch(self) -> Tensor:
        """A tensor that is true, and batched by every vmap that batches an argument of the call."""
        if self._batch is None:  # torch.compile does not trace functools.cached_property
            self._batch = self._made_batch()
        return self._batch

    def _made_batch(self) -> Tensor:
        true = self.rng.new_ones((), dtype=torch.bool)
        if not torch.compiler.is_compiling():
            one_each = {vmap_levels(leaf): leaf for leaf in tensors(self._given)}
            for levels, leaf in one_each.items():
                if levels:
                    true = true & leaf.new_ones((), dtype=torch.bool, device=true.device)
        return true

    def copy(self) -> Keys:
        """Return a copy that makes the same keys from here on."""
        keys = Keys(self.rng)
        keys._key, keys._made = self._key, self._made
        return keys
