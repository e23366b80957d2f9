"""Embeddings of indices (`Embedding`) and of positions (sinusoidal and rotary), and `Positions` themselves."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from functools import reduce
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, Layer, Parameters, States, described, out_of_range, wrong_shape, wrong_type
from luxtorch.core._sharded import beside, settled
from luxtorch.init import Initializer, normal
from luxtorch.random import fold_in

from ._shared import arguments_text, require_size, unfit


class Embedding(Layer):
    """Look up rows of a table by integer indices.

    The row of `padding_idx` starts at zero and gets no gradient, in any mode of differentiation. So finite differences
    along that row disagree with the gradient, on purpose.

    Args:
        num_embeddings: The number of rows. With a tuple of numbers the table has several dimensions, and the input is
            a tuple of indices, one tensor for each.
        embedding_dim: The size of a row.
        padding_idx: The index of the row that stands for padding; None for none. Negative ones count from the end.
        init_weight: The initializer of the table.

    Parameters:
        weight: (num_embeddings, embedding_dim), or (*num_embeddings, embedding_dim)

    Shape:
        Integers of any shape (...) to (..., embedding_dim). Indices count from 0. Those of a tuple are broadcast.

    Raises:
        DTypeError: If the indices are not integers.
        InputError: If an index is out of range. On a GPU torch's own assertion stops the program instead.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Embedding(10, 3)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[0, 9], [2, 2]]), ps, st)
        >>> y.shape
        torch.Size([2, 2, 3])

    Source: Lux's `Embedding`, `torch.nn.Embedding`.
    """

    num_embeddings: int | tuple[int, ...]
    embedding_dim: int
    _: KW_ONLY
    padding_idx: int | None = None
    init_weight: Initializer = normal

    def __post_init__(self) -> None:
        if isinstance(self.num_embeddings, list):
            self._set(num_embeddings=tuple(self.num_embeddings))
        if not self._rows or not all(isinstance(rows, int) and rows >= 1 for rows in self._rows):
            raise out_of_range("num_embeddings", self.num_embeddings, "at least 1, or a tuple of such numbers")
        require_size("embedding_dim", self.embedding_dim)
        if self.padding_idx is not None:
            self._set(padding_idx=self._row_of_padding(self.padding_idx))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight`, with zeros in the row that stands for padding."""
        weight = self.init_weight(fold_in(key, "weight"), (*self._rows, self.embedding_dim))
        if self.padding_idx is not None:
            row = torch.arange(weight.shape[0], device=weight.device) == self.padding_idx
            weight = torch.where(row[:, None], 0.0, weight)
        return {"weight": weight}

    def __call__(self, x: Tensor | tuple[Tensor, ...], ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the rows, and `st`."""
        indices = self._flat_indices(x)
        weight = ps["weight"].flatten(0, len(self._rows) - 1)
        try:
            if self.padding_idx is None or not transformed():
                return settled(F.embedding(indices, weight, self.padding_idx), gather=-1), st
            # In forward mode torch's kernel does not stop the gradient of the padding row.
            y = settled(F.embedding(indices, weight), gather=-1)
            return torch.where((indices == self.padding_idx)[..., None], y.detach(), y), st
        except IndexError as error:
            raise index_error(x, error, expected=self.expected_input()) from error

    def _flat_indices(self, x: Any) -> Tensor:
        """Return indices into the flattened table."""
        if isinstance(self.num_embeddings, int):
            return as_indices(x)
        if not isinstance(x, tuple | list) or len(x) != len(self.num_embeddings):
            raise unfit(self, x, f"The input must be a tuple of {len(self._rows)} tensors of indices.")
        each = [as_indices(index) for index in x]
        flat = reduce(lambda flat, pair: flat * pair[0] + pair[1], zip(self._rows[1:], each[1:], strict=True), each[0])
        wrong = [(index < 0) | (index >= rows) for index, rows in zip(each, self._rows, strict=True)]
        # An index out of range in one dimension must not reach a row of another.
        return torch.where(reduce(torch.logical_or, wrong), math.prod(self._rows), flat)

    def _row_of_padding(self, index: int) -> int:
        rows = self.num_embeddings
        if not isinstance(rows, int):
            raise out_of_range("padding_idx", index, "None for a table of several dimensions")
        if not isinstance(index, int) or not -rows <= index < rows:
            limits = f"an integer from {-rows} to {rows - 1}, or None"
            raise out_of_range("padding_idx", index, limits, fix="Indices count from 0.")
        return index % rows

    @property
    def _rows(self) -> tuple[int, ...]:
        return self.num_embeddings if isinstance(self.num_embeddings, tuple) else (self.num_embeddings,)

    def expected_input(self) -> str:
        """Name the range of the indices."""
        ranges = [f"integers from 0 to {rows - 1}" for rows in self._rows]
        if isinstance(self.num_embeddings, int):
            return f"a tensor of any shape of {ranges[0]}"
        return f"a tuple of {len(ranges)} tensors: {', '.join(ranges)}"

    def extra_repr(self) -> str:
        """Return for instance `10 -> 3, padding_idx=0`."""
        return arguments_text(self, f"{self.num_embeddings} -> {self.embedding_dim}")


def as_indices(x: Any) -> Tensor:
    """Return indices in a dtype that torch accepts; raise if they are not integers."""
    if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32):
        return x
    dtype = x.dtype if isinstance(x, Tensor) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        fix = "Pass x.long() if the numbers are whole." if dtype else "Pass torch.tensor([...])."
        raise wrong_type("Indices", x, "a tensor of integers", fix=fix)
    return x.long()  # type: ignore[no-any-return]


def index_error(x: Any, error: Exception, *, expected: str, fix: str = "") -> InputError:
    """Return the error for indices out of range."""
    tensors = x if isinstance(x, tuple | list) else (x,)
    readable = not transformed()  # values of a batched tensor cannot be read
    return InputError(
        "An index is out of range.",
        expected=expected,
        got=", ".join(f"integers from {int(t.min())} to {int(t.max())}" for t in tensors) if readable else str(error),
        fix=fix or "Indices count from 0. Make the table larger, or map unknown entries to a row of their own.",
    )


class Positions(Layer):
    """Number the elements of a sequence: 0, 1, 2, ..., for an embedding of positions.

    In a model for generation, where a call goes on where the last one ended, so do the numbers: `lt.with_cache` makes
    them count. A model that makes its own numbers, as by `torch.arange`, would begin at 0 in each call.

    Args:
        dim: The dimension of the input along which the position changes: the last one of indices, -2 of features.
        counts: Whether a call goes on where the last one ended.

    States:
        position: With `counts`, the number of elements so far.

    Shape:
        A tensor with that dimension to integers (length,).

    Example:
        >>> import torch, luxtorch as lt
        >>> places = lt.Chain(lt.Positions(), lt.Embedding(256, 8))
        >>> model = lt.Parallel(torch.add, lt.Embedding(65, 8), places)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[3, 1, 4], [1, 5, 9]]), ps, st)
        >>> y.shape
        torch.Size([2, 3, 8])

    Source: Flax's examples of language models, whose `cache_index` counts in the same way.
    """

    dim: int = -1
    _: KW_ONLY
    counts: bool = False

    def cached(self, shape: tuple[int, ...]) -> Positions:
        """Return the layer that counts; see `lt.with_cache`."""
        return Positions(self.dim, counts=True)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return where to begin."""
        return {"position": torch.zeros((), dtype=torch.int64, device=key.device)} if self.counts else {}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the numbers, and where the next call begins."""
        length = x.shape[self.dim]
        numbers = beside(torch.arange(length, device=x.device), x)
        if not self.counts:
            return numbers, st
        return st["position"] + numbers, {"position": st["position"] + length}

    def expected_input(self) -> str:
        """Name the dimension."""
        return f"a tensor with the dimension {self.dim}"


class SinusoidalPositionalEmbedding(Layer):
    """Sinusoidal positional encoding: sines and cosines of each position, which a model can add to its inputs.

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
        require_even("embedding_dim", self.embedding_dim)
        for name in ("min_freq", "max_freq"):
            if not getattr(self, name) > 0:
                raise out_of_range(name, getattr(self, name), "above 0")

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
            raise wrong_type("Positions", x, "a tensor of real numbers", fix="Pass for instance torch.arange(length).")
        scale = math.sqrt(2 / self.embedding_dim) if self.scale is None else self.scale
        angles = x[..., None] * st["sigmas"]
        y = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1) * scale
        return y.to(x.dtype) if x.is_floating_point() else y, st

    def expected_input(self) -> str:
        """Say that positions may have any shape."""
        return "a tensor of positions, of any shape"


def require_even(name: str, size: Any) -> None:
    """Raise unless a size is an even number of at least 2."""
    if not (isinstance(size, int) and size >= 2 and size % 2 == 0):
        raise out_of_range(name, size, "an even number of at least 2")


Positioned: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Queries or keys, alone or with their positions."""


class RotaryPositionalEmbedding(Layer):
    """Rotary position embedding (RoPE): rotate each pair of numbers of a query or key by an angle of its position.

    The product of a rotated query and a rotated key depends on the difference of their positions only. A pair is
    number i of the first half with number i of the second half ("half-split", as in GPT-NeoX), or, with
    `interleaved=True`, two adjacent ones (as in the paper).

    Args:
        dim: The size of the input's last dimension, that of one head; even.
        max_sequence_length: The number of positions for which sines and cosines are kept.
        base: Pair i turns by `base ** (-2 * i / dim)` radians a position.
        interleaved: Whether adjacent numbers are pairs.

    States:
        cos_cache: (max_sequence_length, dim / 2)
        sin_cache: (max_sequence_length, dim / 2)

    Shape:
        (batch, heads, length, dim), or any (..., length, dim), to the same; or a tuple of that and of integer
        positions of shape (length,) or (batch, length). Without positions they are 0, 1, 2, ... Half precision is
        rotated in the precision of the caches.

    Raises:
        InputError: If a size or the base is out of range, if the input has another width, or if a position is not
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
        _check("dim", self.dim, self.max_sequence_length, self.base)

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
        interleaved: Whether adjacent numbers are pairs, instead of the two halves.

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
        device: The device of the result.

    Returns:
        `cos_cache` and `sin_cache`, of shape (max_sequence_length, head_dim / 2).

    Raises:
        InputError: If a size or the base is out of range.

    Example:
        >>> import luxtorch as lt
        >>> {name: cache.shape for name, cache in lt.compute_rotary_embedding_params(4, 3).items()}
        {'cos_cache': torch.Size([3, 2]), 'sin_cache': torch.Size([3, 2])}

    Source: Lux's `compute_rotary_embedding_params`.
    """
    _check("head_dim", head_dim, max_sequence_length, base)
    device, dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
    # Angles of thousands of radians need double precision, which one kind of device lacks.
    place = torch.device("cpu") if device.type == "mps" else device
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=place)
    positions = torch.arange(max_sequence_length, dtype=torch.float64, device=place)
    angles = torch.outer(positions, base ** (-pairs / head_dim))
    return {name: f(angles).to(dtype).to(device) for name, f in (("cos_cache", torch.cos), ("sin_cache", torch.sin))}


def _check(name: str, dim: Any, length: Any, base: float) -> None:
    require_even(name, dim)
    require_size("max_sequence_length", length)
    if not base > 0:
        raise out_of_range("base", base, "above 0")


_LONGER = "Make the layer with a larger max_sequence_length."


def _check_fits(x: Tensor, cache: Tensor, seq_dim: int) -> None:
    dim = 2 * cache.shape[-1]
    if x.ndim < 2 or x.shape[-1] != dim or not -x.ndim <= seq_dim < x.ndim or seq_dim % x.ndim == x.ndim - 1:
        raise InputError(
            "The last dimension of the input must be twice that of the caches.",
            expected=f"a tensor of shape (..., length, {dim}), or with the length in another dimension, seq_dim",
            got=f"{described(x)} with seq_dim={seq_dim}",
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
            raise InputError(
                f"The length must be at most max_sequence_length={rows}.", got=f"a sequence of {length}", fix=_LONGER
            )
        return cos_cache[:length].reshape(shape), sin_cache[:length].reshape(shape)
    positions = as_indices(positions)
    per_sample = positions.ndim == 2 and seq_dim % x.ndim > 0
    if per_sample:
        shape[0] = positions.shape[0]
    if positions.shape != ((*shape[:1], length) if per_sample else (length,)) or shape[0] not in (1, x.shape[0]):
        raise wrong_shape("positions", positions, f"({length},) or ({x.shape[0]}, {length})")
    try:
        return F.embedding(positions, cos_cache).reshape(shape), F.embedding(positions, sin_cache).reshape(shape)
    except IndexError as error:
        expected = f"positions from 0 to {rows - 1}, below max_sequence_length={rows}"
        raise index_error(positions, error, expected=expected, fix=_LONGER) from error
