"""`map`: a function of each element of a sequence, one after another, or batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import map_tensors

from ._scan import scan
from ._trees import Packed, check_function, check_number, joined, length_of

Tree = Any


def map(f: Callable[[Tree], Tree], xs: Tree, *, batch_size: int | None = None) -> Tree:
    """Apply a function to each element of a sequence, one after another.

    The result is that of vmap, with the memory of one call, or of one batch. It is a `scan` that carries nothing.

    Args:
        f: Takes one element to a tree of tensors.
        xs: The tensors of this tree are sequences along their first dimension.
        batch_size: How many elements are computed at once, by vmap; the last batch may be smaller.

    Returns:
        The results, stacked.

    Raises:
        InputError: If the sequences differ in length, or there is none. And what `scan` raises.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.map(lambda x: x.sum(), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), batch_size=2)
        tensor([ 3.,  7., 11.])

    Source: `jax.lax.map`.
    """
    check_function("f", f)
    n = length_of(xs, None)
    if batch_size is None or batch_size == 1:
        return _one_by_one(f, xs)
    check_number("batch_size", batch_size, 1)
    whole = n - n % batch_size
    batched = _batched(f, xs)
    first = map_tensors(lambda x: x[:whole].reshape(n // batch_size, batch_size, *x.shape[1:]), xs)
    found = map_tensors(lambda y: y.flatten(0, 1), _one_by_one(batched, first))
    if whole == n:
        return found
    rest = batched(map_tensors(lambda x: x[whole:], xs))
    return joined(found, rest)


def _one_by_one(f: Callable[[Tree], Tree], xs: Tree) -> Tree:
    return scan(lambda carry, x: (carry, f(x)), (), xs)[1]


def _batched(f: Callable[[Tree], Tree], xs: Tree) -> Callable[[Tree], Tree]:
    """Return a function of a batch of elements."""
    arguments = Packed(xs)

    def batched(batch: Tree) -> Tree:
        results: list[Packed] = []

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            results.append(Packed(f(arguments.tree(tensors))))
            return tuple(results[-1].tensors)

        found: Sequence[Tensor] = torch.vmap(flat)(*Packed(batch).tensors)
        return results[-1].tree(found)

    return batched
