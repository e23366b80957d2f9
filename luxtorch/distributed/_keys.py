"""Random numbers of its own for each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import tree_map
from luxtorch.random import fold_in

from ._world import rank, world_size


def fold_in_rank(tree: Any) -> Any:
    """Return a tree in which this rank's number is folded into every random key.

    Without it all ranks, which start from the same seed, would draw the same dropout masks. Call it once, after the
    setup; the layers then derive their next keys from these.

    Args:
        tree: A key, states, or any other tree. What is no key is kept: a key is a uint64 tensor of shape (..., 2).

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = lt.setup(0, lt.Dropout(0.5))
        >>> st = distributed.fold_in_rank(st)
        >>> st["rng"].shape
        torch.Size([2])
    """
    if world_size() == 1:
        return tree
    return tree_map(lambda leaf: fold_in(leaf, rank()) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.uint64 and leaf.ndim > 0 and leaf.shape[-1] == 2
