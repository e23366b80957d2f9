"""Gradient accumulation: one step's data in several parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch.autodiff._trees import map_tensors, tensors
from luxtorch.core import InputError, named_leaves


def split_data(data: Any, n: int) -> list[Any]:
    """Return the data in `n` parts of equal size along the first dimension of its tensors.

    Tensors without dimensions, and leaves that are no tensors, are in every part.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError("The number of microbatches is not a positive integer.", expected="accumulate=4", got=repr(n))
    leaves, spec = pytree.tree_flatten(data)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0}
    if len(sizes) != 1 or (size := sizes.pop()) % n or not size:
        shapes = ", ".join(
            f"{name or 'data'} {tuple(leaf.shape)}" for name, leaf in named_leaves(data) if isinstance(leaf, Tensor)
        )
        raise InputError(
            f"The data cannot be split into {n} microbatches of equal size.",
            expected=f"tensors whose first dimension is the same multiple of {n}",
            got=shapes or f"no tensors, but {type(data).__name__}",
            fix="Choose another accumulate, or drop the last batch of the loader.",
        )
    parts = [
        torch.split(leaf, size // n) if isinstance(leaf, Tensor) and leaf.ndim > 0 else (leaf,) * n for leaf in leaves
    ]
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def accumulated(
    gradients: Callable[[Any, Any], tuple[Any, Tensor, Any, Any]], data: Any, st: Any, n: int
) -> tuple[Any, Tensor, Any, Any]:
    """Return the means of gradients and losses over microbatches, a tuple of their stats, and the last states.

    Args:
        gradients: Takes a microbatch and states to gradients, loss, stats and new states.
        data: The data of all.
        st: The states before the first; each microbatch gets those of the one before.
        n: How many there are.
    """
    total: list[Tensor] = []
    losses, all_stats, grads = [], [], None
    for part in split_data(data, n):
        grads, loss, stats, st = gradients(part, st)
        found = tensors(grads)
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        losses.append(loss)
        all_stats.append(stats)
    means = iter([g / n for g in total])
    return map_tensors(lambda _: next(means), grads), torch.stack(losses).mean(), tuple(all_stats), st
