"""Walking trees quickly: nested dicts and flat vectors are taken apart and put together at every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.components._vector import named
from luxtorch.core import Static


def map_leaves(f: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree with a function applied to its leaves, in the order in which torch lists them."""
    if isinstance(tree, Tensor):
        return f(tree)
    kind = type(tree)
    if kind is dict:
        return {name: map_leaves(f, child) for name, child in tree.items()}
    if kind is tuple or kind is list:
        return kind([map_leaves(f, child) for child in tree])
    if kind is ComponentVector:
        return named(f(tree.flat), tree.axes)
    if kind is Static:
        return tree
    return pytree.tree_map(f, tree)


def map_tensors(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a tree with a function applied to its tensors; what is no tensor is kept."""
    return map_leaves(lambda leaf: f(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, in the order in which torch lists them."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Any]) -> None:
    kind = type(tree)
    if isinstance(tree, Tensor):
        found.append(tree)
    elif kind is dict:
        for child in tree.values():
            _collect(child, found)
    elif kind is tuple or kind is list:
        for child in tree:
            _collect(child, found)
    elif kind is ComponentVector:
        found.append(tree.flat)
    elif kind is not Static:
        found += pytree.tree_leaves(tree)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in the order in which torch lists them."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]
