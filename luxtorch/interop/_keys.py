"""Keys for the random numbers of one call."""

from __future__ import annotations

from torch import Tensor

from luxtorch.random import fold_in, split


class Keys:
    """Make keys for the random numbers of a call.

    Args:
        rng: What all of them are made from.

    Attributes:
        rng: From what to make those of the next call.
    """

    def __init__(self, rng: Tensor) -> None:
        self.rng = rng
        self._key: Tensor | None = None
        self._made = 0

    def next(self) -> Tensor:
        """Return a key that was not used before."""
        if self._key is None:  # nothing is spent where nothing is drawn
            self._key, self.rng = split(self.rng)
        self._made += 1
        return fold_in(self._key, self._made)

    def copy(self) -> Keys:
        """Return what makes the same keys from here on."""
        keys = Keys(self.rng)
        keys._key, keys._made = self._key, self._made
        return keys
