"""Gradient accumulation: one step's data in several parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, map_tensors, named_leaves, tensors, tree_flatten, tree_unflatten
from luxtorch.core._weighted import watching_means

from ._objective import Objective, Weight


def split_data(data: Any, n: int) -> list[Any]:
    """Return the data in `n` parts of equal size along the first dimension of its tensors.

    Tensors without dimensions, and leaves that are no tensors, are in every part.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError("The number of microbatches is not a positive integer.", expected="accumulate=4", got=repr(n))
    leaves, spec = tree_flatten(data)
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
    return [tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def accumulated(
    gradients: Callable[[Any, Any], tuple[Any, Tensor, Any, Any, Weight]], data: Any, st: Any, n: int
) -> tuple[Any, Tensor, Any, Any]:
    """Return gradients and loss of the whole from those of microbatches, a tuple of stats, and the last states.

    Args:
        gradients: Takes a microbatch and states to gradients, loss, stats, new states and the weight in the mean.
        data: The data of all.
        st: The states before the first; each microbatch gets those of the one before.
        n: How many there are.
    """
    total: list[Tensor] = []
    losses, weights, all_stats, grads, unit = [], [], [], None, None
    for part in split_data(data, n):
        grads, loss, stats, st, weight = gradients(part, st)
        if isinstance(weight, int | float):  # microbatches of one size: a number too large for float16 is spared
            unit = unit or weight
            weight = weight / unit if unit else weight
        found = [_times(g, nonzero(weight)) for g in tensors(grads)]  # which is what it was divided by
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        losses.append(_times(loss, nonzero(weight)))
        weights.append(weight)
        all_stats.append(stats)
    whole = torch.stack(losses).sum()
    if all(weight is None for weight in weights):
        means, value = iter(total), whole
    else:
        by: Any = sum(0 if weight is None else weight for weight in weights)
        means, value = iter([_over(g, nonzero(by)) for g in total]), _over(whole, by)
    return map_tensors(lambda _: next(means), grads), value, tuple(all_stats), st


def of_microbatch(objective: Objective) -> Objective:
    """Return an objective that refuses a number where a weighted mean was taken: the mean of such is another one."""

    def called(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return objective(*args)
        with watching_means() as taken:
            result = objective(*args)
        told = isinstance(result, tuple | list) and bool(result) and isinstance(result[0], tuple)
        if taken and not told:
            raise InputError(
                "The mean over microbatches would not be that of the whole batch: their weights differ.",
                expected="an objective that returns ((sum, weight), st, stats)",
                got=f"a number, though {taken[0]!r} weighs its targets or leaves some out",
                fix="Return loss.sum_and_weight(y_hat, y) in the place of loss(y_hat, y).",
            )
        return result

    return called


def nonzero(weight: Any) -> Any:
    """Return a weight, but 1 for none and for 0, as where all targets are ignored."""
    return torch.where(weight == 0, 1, weight) if isinstance(weight, Tensor) else weight or 1


def _times(x: Tensor, weight: Weight) -> Tensor:
    if weight is None or (not isinstance(weight, Tensor) and weight == 1):
        return x
    return (x * (weight.to(x.device) if isinstance(weight, Tensor) else weight)).to(x.dtype)


def _over(x: Tensor, weight: Any) -> Tensor:
    return (x / (weight.to(x.device) if isinstance(weight, Tensor) else weight)).to(x.dtype)
