"""Walking trees quickly: at every step, nested dicts and flat vectors are taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.core import Static


def map_tensors(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a tree with a function applied to its tensors, in the order of its leaves; what is no tensor is kept."""
    if isinstance(tree, Tensor):
        return f(tree)
    if type(tree) is dict:
        return {name: map_tensors(f, child) for name, child in tree.items()}
    if type(tree) is tuple or type(tree) is list:
        return type(tree)([map_tensors(f, child) for child in tree])
    if isinstance(tree, ComponentVector):
        return ComponentVector.from_flat(f(tree.flat), tree.axes)
    if isinstance(tree, Static):
        return tree
    return pytree.tree_map(lambda leaf: f(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in the order of its leaves."""
    found: list[Tensor] = []

    def find(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(find, tree)
    return found
