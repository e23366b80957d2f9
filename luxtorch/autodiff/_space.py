"""The vectors that a linear operator acts on: trees of one structure, and the flat vectors that stand for them."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from luxtorch.core import tree_flatten, tree_leaves, tree_unflatten

from ._aux import Tree


class Space:
    """Convert between the trees that look like one tree, and flat vectors.

    Args:
        like: The tree.

    Attributes:
        size: The number of elements.
        dtype: The dtype of a flat vector: what the dtypes of the leaves promote to.
        device: The device of the first leaf.
        is_flat: Whether the tree is a flat vector itself.
    """

    def __init__(self, like: Tree) -> None:
        leaves, self._spec = tree_flatten(like)
        self._leaves: list[Tensor] = leaves
        self._sizes = [leaf.numel() for leaf in leaves]
        self.size = sum(self._sizes)
        self.dtype = reduce(torch.promote_types, [leaf.dtype for leaf in leaves]) if leaves else torch.float32
        self.device = leaves[0].device if leaves else torch.device("cpu")
        self.is_flat = isinstance(like, Tensor) and like.dim() == 1

    def ravel(self, tree: Tree) -> Tensor:
        """Return the elements of a tree as one flat vector."""
        if not self._leaves:
            return torch.zeros(0)
        return torch.cat([leaf.reshape(-1).to(self.device) for leaf in tree_leaves(tree)])

    def unravel(self, vector: Tensor) -> Tree:
        """Return the tree of a flat vector."""
        parts = zip(torch.split(vector, self._sizes), self._leaves, strict=True)
        return tree_unflatten([part.reshape(leaf.shape).to(leaf) for part, leaf in parts], self._spec)
