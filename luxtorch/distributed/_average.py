"""Averaging trees over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, tree_flatten, tree_leaves, tree_unflatten

from ._mean import mean
from ._sharded_tensor import is_sharded
from ._world import world_size


def average_gradients(grads: Any) -> Any:
    """Return the mean of the gradients of all ranks.

    With the mean of a loss over equal shares of a batch, this is the gradient of the mean over the whole batch. With
    weights or ignored targets the shares are not equal: then average `(sum, weight)` of `loss.sum_and_weight` and the
    gradient of that sum, and divide the averages by the average weight.

    All gradients of one dtype travel in a single all-reduce, and those of a ComponentVector without being copied
    together. It works inside of `torch.func` transforms and of compiled functions, except that `torch.compile` does
    not know how to batch its derivative.

    Args:
        grads: The gradients, a tree of tensors with the same structure on every rank, which is not checked: that
            would take another collective. What is None or no tensor is kept, and so are sharded tensors, whose
            gradients `gather_parameters` has averaged. A loss to be reported can be averaged as well.

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Raises:
        DTypeError: If a gradient is neither real nor complex.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import distributed, optim
        >>> distributed.initialize()
        >>> ps = lt.ComponentVector({"weight": torch.ones(2)})
        >>> opt_state = optim.setup(optim.Descent(0.5), ps)
        >>> x = distributed.shard_data(torch.arange(4.0).reshape(2, 2))
        >>> grads = lt.gradient(lambda ps: (x @ ps.weight).mean(), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, distributed.average_gradients(grads))
        >>> ps.weight
        tensor([0.5000, 0.0000])

    Source: `allreduce!` with `avg`, of Lux's DistributedUtils.
    """
    for leaf in tree_leaves(grads):
        if isinstance(leaf, Tensor) and not _is_number(leaf):
            raise DTypeError(
                "There is no mean of such gradients.",
                expected="floating point or complex tensors",
                got=str(leaf.dtype),
                fix="Average states by average_states, which keeps counts and keys as they are.",
            )
    return _averaged(grads)


def average_states(st: Any) -> Any:
    """Return the mean of the states of all ranks, such as the running statistics of a BatchNorm.

    While training, every rank normalises by its own share of the batch, and its running statistics are of that share.
    They are best averaged before a model is tested or saved, once in an epoch. The variances within the shares are
    averaged: how the shares' means differ does not count.

    Args:
        st: The states, a tree with the same structure on every rank. Floating point tensors are averaged; counts,
            random keys and modes are kept as they are on each rank.

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Raises:
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = lt.setup(0, lt.BatchNorm(2))
        >>> distributed.average_states(st)["running_mean"]
        tensor([0., 0.])
    """
    return _averaged(st)


def _is_number(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _averaged(tree: Any) -> Any:
    if world_size() == 1:
        return tree
    leaves, spec = tree_flatten(tree)
    buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and _is_number(leaf) and not is_sharded(leaf):
            buckets.setdefault((leaf.dtype, leaf.device), []).append(i)
    for members in buckets.values():
        for i, averaged in zip(members, _means([leaves[i] for i in members]), strict=True):
            leaves[i] = averaged
    return tree_unflatten(leaves, spec)


def _means(tensors: list[Tensor]) -> list[Tensor]:
    """Return the means of tensors of one dtype, by one all-reduce."""
    if len(tensors) == 1:
        return [mean(tensors[0])]
    flat = mean(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    pieces = flat.split_with_sizes([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
