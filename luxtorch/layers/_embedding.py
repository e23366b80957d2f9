"""A table of vectors, looked up by integers: `Embedding`."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import DTypeError, InputError, Layer, Parameters, States
from luxtorch.init import Initializer, normal
from luxtorch.random import fold_in


class Embedding(Layer):
    """Return the rows of a table that integers point to.

    The row of `padding_idx` starts at zero and gets no gradient, in any mode of differentiation, whatever its values
    are. So finite differences along that row disagree with the gradient, on purpose.

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
        sizes = (*self._rows, self.embedding_dim)
        if len(sizes) < 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise InputError(
                "Embedding takes the number of rows and the size of a row.",
                expected="whole numbers of at least 1; the first may be a tuple of such",
                got=f"num_embeddings={self.num_embeddings!r}, embedding_dim={self.embedding_dim!r}",
            )
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
                return F.embedding(indices, weight, self.padding_idx), st
            # In forward mode torch's kernel lets the padding row vary.
            y = F.embedding(indices, weight)
            return torch.where((indices == self.padding_idx)[..., None], y.detach(), y), st
        except IndexError as error:
            raise out_of_range(x, error, expected=self.expected_input()) from error

    def _flat_indices(self, x: Any) -> Tensor:
        """Return the positions in the table as if it had one dimension."""
        if isinstance(self.num_embeddings, int):
            return as_indices(x)
        if not isinstance(x, tuple | list) or len(x) != len(self.num_embeddings):
            raise InputError(
                "A table of several dimensions is looked up by as many indices.",
                expected=self.expected_input(),
                got=f"{len(x)} of them" if isinstance(x, tuple | list) else f"a {type(x).__name__}",
            )
        each = [as_indices(index) for index in x]
        flat = reduce(lambda flat, pair: flat * pair[0] + pair[1], zip(self._rows[1:], each[1:], strict=True), each[0])
        wrong = [(index < 0) | (index >= rows) for index, rows in zip(each, self._rows, strict=True)]
        # An index that leaves its own dimension must not end up in somebody else's row.
        return torch.where(reduce(torch.logical_or, wrong), math.prod(self._rows), flat)

    def _row_of_padding(self, index: int) -> int:
        rows = self.num_embeddings
        if not isinstance(rows, int):
            raise InputError(
                "A table of several dimensions has no padding row.",
                expected="padding_idx=None",
                got=f"padding_idx={index!r} with num_embeddings={rows}",
            )
        if not isinstance(index, int) or not -rows <= index < rows:
            raise InputError(
                "The padding row is not in the table.",
                expected=f"a whole number from {-rows} to {rows - 1}, or None",
                got=f"padding_idx={index!r}",
                fix="Indices count from 0.",
            )
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
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings} -> {self.embedding_dim}{padding}"


def as_indices(x: Any) -> Tensor:
    """Return integers in a dtype that torch looks up by; raise if they are none."""
    if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32):
        return x
    dtype = x.dtype if isinstance(x, Tensor) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise DTypeError(
            "Indices are integers.",
            expected="tensors of dtype torch.int64",
            got=f"a {dtype} tensor" if dtype else f"{x!r:.80} of type {type(x).__name__}",
            fix="Pass x.long() if the numbers are whole." if dtype else "Pass torch.tensor([...]).",
        )
    return x.long()  # type: ignore[no-any-return]


def out_of_range(x: Any, error: Exception, *, expected: str, fix: str = "") -> InputError:
    """Return the error for indices that torch did not find in a table."""
    tensors = x if isinstance(x, tuple | list) else (x,)
    readable = not transformed()  # a batched tensor does not tell its numbers
    return InputError(
        "An index is out of range.",
        expected=expected,
        got=", ".join(f"integers from {int(t.min())} to {int(t.max())}" for t in tensors) if readable else str(error),
        fix=fix or "Indices count from 0. Make the table larger, or map unknown entries to a row of their own.",
    )
