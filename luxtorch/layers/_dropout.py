"""Dropout with the mask drawn from a key in the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import is_batched
from luxtorch.core import TRAINING, Layer, Parameters, States, Static, out_of_range
from luxtorch.core._call_errors import single_input
from luxtorch.core._sharded import beside, own_rows, rows_beside
from luxtorch.random import bernoulli, split, where
from luxtorch.random._draws import bernoulli_rows

from ._shared import unfit


class RandomMask(Layer):
    """Base class of the dropouts: their probability and key."""

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise out_of_range("p", self.p, "between 0 and 1")

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
        """Return the masked input and the state with the next key; in test mode, both unchanged."""
        if self.p == 0 or not st[TRAINING]:
            return x if isinstance(x, Tensor) else single_input(self, x), st
        key, rng = split(st["rng"])
        return dropped(x, key, self.p, self._mask_shape(x)), {"rng": rng, TRAINING: st[TRAINING]}

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.dims is None:
            return tuple(x.shape)
        varying = {dim % x.ndim for dim in self.dims}
        return tuple(size if dim in varying else 1 for dim, size in enumerate(x.shape))


def dropped(x: Tensor, key: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    """Zero elements by a random mask of the given shape, and scale the others; infinities and NaNs become zero too."""
    scale = 1 / (1 - p) if p < 1 else 1.0
    return torch.where(_kept(x, key, p, shape), x * scale, 0.0)


def _kept(x: Tensor, key: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    """Draw what is kept; of an input that is split by rows, for this rank's rows alone."""
    rows = own_rows(x) if shape and shape[0] == x.shape[0] else None
    if rows is None or is_batched(key):
        return beside(bernoulli(key, 1 - p, shape), x)
    return rows_beside(bernoulli_rows(key, 1 - p, shape, *rows), x)


# The limit of SELU for very negative inputs: -scale * alpha.
_SATURATION = -1.7580993408473766


class AlphaDropout(RandomMask):
    """Drop elements to the value at which SELU saturates, and keep the mean and the variance of the input.

    For networks with SELU activations, whose mean 0 and variance 1 plain dropout would not keep.

    Args:
        p: The probability that an element is dropped; with 0 the layer does nothing and has no states, with 1 it
            returns zeros.

    States:
        rng: A key.
        training: Whether anything is dropped.

    Shape:
        Anything to the same.

    Raises:
        InputError: If `p` is not a probability.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.AlphaDropout(0.5))
        >>> y, st = lt.AlphaDropout(0.5)(torch.zeros(1000), ps, st)
        >>> len(y.unique())
        2

    Source: Lux's `AlphaDropout`, `torch.nn.AlphaDropout`; Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    """

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the masked input and the state with the next key; in test mode, both unchanged."""
        if self.p == 0 or not st[TRAINING]:
            return x if isinstance(x, Tensor) else single_input(self, x), st
        key, rng = split(st["rng"])
        return alpha_dropped(x, key, self.p, tuple(x.shape)), {"rng": rng, TRAINING: st[TRAINING]}


def alpha_dropped(x: Tensor, key: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    """Drop elements by a random mask of the given shape, and keep mean and variance; with p = 1 return zeros."""
    kept = _kept(x, key, p, shape)
    if p == 1:
        return torch.where(kept, x, 0.0)
    scale = ((1 - p) * (1 + p * _SATURATION**2)) ** -0.5
    shift = -scale * p * _SATURATION
    return torch.where(kept, x * scale + shift, _SATURATION * scale + shift)


class FeatureDropout(RandomMask):
    """Set whole channels to zero with probability `p` while training, and scale the others by 1 / (1 - p).

    Each sample of a batch loses channels of its own. It is torch's Dropout1d, Dropout2d and Dropout3d.

    Args:
        p: The probability of a zero; with 0 the layer does nothing and has no states.

    States:
        rng: A key.
        training: Whether anything is dropped.

    Shape:
        (batch, channels, ...) to the same

    Raises:
        InputError: If `p` is not a probability, or the input has no channels.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.FeatureDropout(0.5))
        >>> y, st = lt.FeatureDropout(0.5)(torch.ones(2, 100, 7), ps, st)
        >>> bool((y == y[:, :, :1]).all())
        True

    Source: `torch.nn.Dropout2d`; Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015.
    """

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the masked input and the state with the next key; in test mode, both unchanged."""
        if x.ndim < 2:
            raise unfit(self, x, "The input must have a batch and channels.")
        if self.p == 0 or not st[TRAINING]:
            return x, st
        key, rng = split(st["rng"])
        shape = (*x.shape[:2], *(1,) * (x.ndim - 2))
        return dropped(x, key, self.p, shape), {"rng": rng, TRAINING: st[TRAINING]}

    def expected_input(self) -> str:
        """Name the channels."""
        return "a tensor of shape (batch, channels, ...)"


class VariationalHiddenDropout(Dropout):
    """Drop the same elements at every call, until `update_mask` asks for others: dropout over a recurrence.

    The mask is not kept as a tensor but as the key that it is drawn from. So the states keep their shapes whatever the
    input's is, and inputs of one shape meet one mask. Test mode does not change the states.

    Args:
        p: The probability of a zero; with 0 the layer does nothing and has no states.
        dims: The dimensions along which the mask varies; it is the same along the others. All of them if None.

    States:
        rng: The key of the mask.
        update_mask: (), a bool tensor: whether the next call in train mode takes a new mask; it is True at first, and
            every such call returns False. `update_state(st, "update_mask", Static(True))` sets it too.
        training: Whether anything is dropped.

    Shape:
        Anything to the same.

    Raises:
        InputError: If `p` is not a probability.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.VariationalHiddenDropout(0.5)
        >>> ps, st = lt.setup(0, model)
        >>> first, st = model(torch.ones(100), ps, st)
        >>> second, st = model(torch.ones(100), ps, st)
        >>> st = lt.update_state(st, "update_mask", torch.tensor(True))
        >>> third, st = model(torch.ones(100), ps, st)
        >>> torch.equal(first, second), torch.equal(first, third)
        (True, False)

    Source: Lux's `VariationalHiddenDropout`; Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in
    Recurrent Neural Networks", 2016.
    """

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the key of the first mask, the request for one, and the mode."""
        if self.p == 0:
            return {}
        return {
            "rng": key.clone(),
            "update_mask": torch.ones((), dtype=torch.bool, device=key.device),
            TRAINING: Static(True),
        }

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the masked input and the state with the mask's key; in test mode, both unchanged."""
        if self.p == 0 or not st[TRAINING]:
            return x, st
        rng, update = st["rng"], st["update_mask"]
        if isinstance(update, Static):
            update = torch.full((), bool(update), device=rng.device)
        rng = where(update, split(rng)[1], rng)
        y = dropped(x, split(rng)[0], self.p, self._mask_shape(x))
        return y, {"rng": rng, "update_mask": torch.zeros_like(update), TRAINING: st[TRAINING]}
