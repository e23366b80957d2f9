"""Positions as rotations of queries and keys: `RotaryPositionalEmbedding` and its two functions."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States

from ._embedding import as_indices, out_of_range
from ._positional import require_even

Positioned: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Queries or keys, alone or with their positions."""


class RotaryPositionalEmbedding(Layer):
    """Rotate each pair of numbers of a query or key by an angle that grows with its position.

    The product of a rotated query and a rotated key depends on the difference of their positions only. A pair is
    number i of the first half with number i of the second half ("half-split", as in GPT-NeoX), or, with
    `interleaved=True`, two neighbours (as in the paper).

    Args:
        dim: The size of the input's last dimension, that of one head; even.
        max_sequence_length: The number of positions for which sines and cosines are kept.
        base: Pair i turns by `base ** (-2 * i / dim)` radians a position.
        interleaved: Whether neighbours are pairs.

    States:
        cos_cache: (max_sequence_length, dim / 2)
        sin_cache: (max_sequence_length, dim / 2)

    Shape:
        (batch, heads, length, dim), or any (..., length, dim), to the same; or a tuple of that and of integer
        positions of shape (length,) or (batch, length). Without positions they are 0, 1, 2, ... Half precision is
        rotated in the precision of the caches.

    Raises:
        InputError: If a size or a base makes no sense, if the input has another width, or if a position is not
            below `max_sequence_length`.
        DTypeError: If positions are not integers.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.RotaryPositionalEmbedding(8)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(2, 4, 5, 8), ps, st)
        >>> y.shape
        torch.Size([2, 4, 5, 8])

    Source: Lux's `RotaryPositionalEmbedding`; Su et al., "RoFormer", 2021.
    """

    dim: int
    _: KW_ONLY
    max_sequence_length: int = 4096
    base: float = 10_000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        _check(type(self).__name__, self.dim, self.max_sequence_length, self.base)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the cosines and sines of all angles."""
        sizes = (self.dim, self.max_sequence_length)
        return dict(compute_rotary_embedding_params(*sizes, base=self.base, device=key.device))

    def __call__(self, x: Positioned, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the rotated input and `st`."""
        x, positions = x if isinstance(x, tuple | list) else (x, None)
        y = apply_rotary_embedding(x, st["cos_cache"], st["sin_cache"], positions, interleaved=self.interleaved)
        return y, st

    def expected_input(self) -> str:
        """Name the width and the longest sequence."""
        return (
            f"a tensor of shape (batch, heads, length, {self.dim}) with length <= {self.max_sequence_length}, "
            "or a tuple of it and its positions"
        )


def apply_rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    positions: Tensor | None = None,
    *,
    seq_dim: int = -2,
    interleaved: bool = False,
) -> Tensor:
    """Rotate each pair of numbers in the last dimension by the angle of its position.

    Args:
        x: A tensor whose last dimension is twice that of the caches.
        cos_cache: The cosines: (max_sequence_length, dim / 2).
        sin_cache: The sines, likewise.
        positions: Integers of shape (length,), or (batch, length) where the batch is the first dimension of x; None
            for 0, 1, 2, ...
        seq_dim: The dimension of x along which the position changes.
        interleaved: Whether neighbours are pairs, not the two halves.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        InputError: If sizes do not fit, or a position is not in the caches.
        DTypeError: If positions are not integers.

    Example:
        >>> import torch, luxtorch as lt
        >>> caches = lt.compute_rotary_embedding_params(2, 10)
        >>> lt.apply_rotary_embedding(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), **caches)
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])

    Source: Lux's `apply_rotary_embedding`.
    """
    _check_fits(x, cos_cache, seq_dim)
    cos, sin = _angles(x, cos_cache, sin_cache, positions, seq_dim)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return y.to(x.dtype)


def compute_rotary_embedding_params(
    head_dim: int,
    max_sequence_length: int,
    *,
    base: float = 10_000.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Return the cosines and sines of the angles by which each pair turns at each position.

    Args:
        head_dim: The size of what is to be rotated; even.
        max_sequence_length: The number of positions.
        base: Pair i turns by `base ** (-2 * i / head_dim)` radians a position.
        dtype: The dtype of the result; the default dtype of torch if None.
        device: Where the result belongs.

    Returns:
        `cos_cache` and `sin_cache`, of shape (max_sequence_length, head_dim / 2).

    Raises:
        InputError: If a size or the base makes no sense.

    Example:
        >>> import luxtorch as lt
        >>> {name: cache.shape for name, cache in lt.compute_rotary_embedding_params(4, 3).items()}
        {'cos_cache': torch.Size([3, 2]), 'sin_cache': torch.Size([3, 2])}

    Source: Lux's `compute_rotary_embedding_params`.
    """
    _check("The rotation", head_dim, max_sequence_length, base)
    device, dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
    # Angles of thousands of radians need double precision, which one kind of device lacks.
    place = torch.device("cpu") if device.type == "mps" else device
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=place)
    positions = torch.arange(max_sequence_length, dtype=torch.float64, device=place)
    angles = torch.outer(positions, base ** (-pairs / head_dim))
    return {name: f(angles).to(dtype).to(device) for name, f in (("cos_cache", torch.cos), ("sin_cache", torch.sin))}


def _check(name: str, dim: Any, length: Any, base: float) -> None:
    require_even(name, dim)
    if not (isinstance(length, int) and length >= 1 and base > 0):
        raise InputError(
            f"{name} takes a length and a base.",
            expected="max_sequence_length >= 1, a whole number, and base > 0",
            got=f"max_sequence_length={length!r}, base={base!r}",
        )


def _check_fits(x: Tensor, cache: Tensor, seq_dim: int) -> None:
    dim = 2 * cache.shape[-1]
    if x.ndim < 2 or x.shape[-1] != dim or not -x.ndim <= seq_dim < x.ndim or seq_dim % x.ndim == x.ndim - 1:
        raise InputError(
            "The input does not fit the rotation.",
            expected=f"a tensor of shape (..., length, {dim}), or with the length in another dimension, seq_dim",
            got=f"a tensor of shape {tuple(x.shape)} with seq_dim={seq_dim}",
            fix="Split the features into heads first: the last dimension is that of one head.",
        )


def _angles(
    x: Tensor, cos_cache: Tensor, sin_cache: Tensor, positions: Tensor | None, seq_dim: int
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of x's positions, in a shape that broadcasts against half of x."""
    length, rows = x.shape[seq_dim], cos_cache.shape[0]
    shape = [1] * x.ndim
    shape[seq_dim], shape[-1] = length, cos_cache.shape[-1]
    if positions is None:
        if length > rows:
            raise _too_long(f"a sequence of {length}", rows)
        return cos_cache[:length].reshape(shape), sin_cache[:length].reshape(shape)
    positions = as_indices(positions)
    per_sample = positions.ndim == 2 and seq_dim % x.ndim > 0
    if per_sample:
        shape[0] = positions.shape[0]
    if positions.shape != ((*shape[:1], length) if per_sample else (length,)) or shape[0] not in (1, x.shape[0]):
        raise InputError(
            "The positions do not fit the input.",
            expected=f"integers of shape ({length},) or ({x.shape[0]}, {length})",
            got=f"positions of shape {tuple(positions.shape)} for an input of shape {tuple(x.shape)}",
        )
    try:
        return F.embedding(positions, cos_cache).reshape(shape), F.embedding(positions, sin_cache).reshape(shape)
    except IndexError as error:
        fix = "Make the layer with a larger max_sequence_length."
        expected = f"positions from 0 to {rows - 1}, below max_sequence_length={rows}"
        raise out_of_range(positions, error, expected=expected, fix=fix) from error


def _too_long(got: str, rows: int) -> InputError:
    return InputError(
        "The sequence is longer than the layer's caches.",
        expected=f"a length of at most max_sequence_length={rows}",
        got=got,
        fix="Make the layer with a larger max_sequence_length.",
    )
