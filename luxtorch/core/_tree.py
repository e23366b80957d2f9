"""Pytrees: registering nodes with both tree libraries, and walking a tree with its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import optree
import torch.utils._pytree as pytree
from torch import Tensor

T = TypeVar("T")

tree_map = pytree.tree_map
tree_leaves = pytree.tree_leaves

# optree has no public name for the namespace that everyone looks in, torchopt included.
_EVERYWHERE = getattr(optree.registry, "__GLOBAL_NAMESPACE")


def register_node(
    cls: type[T],
    flatten: Callable[[T], tuple[list[Any], Any]],
    unflatten: Callable[[Iterable[Any], Any], T],
    names: Sequence[str] | None = None,
) -> None:
    """Register a class as a pytree node, for torch and for whatever is built on optree.

    torch registers its nodes in an optree namespace that torchopt does not look in: a node has to be
    registered with both to be a node everywhere.

    Args:
        cls: The class to register.
        flatten: Takes a node to `(children, static)`; `static` must be hashable.
        unflatten: Takes `(children, static)` back to a node. It must accept any children, not only
            tensors: tree libraries put all kinds of placeholders in.
        names: What the children are called in paths; their numbers if None.
    """

    def flatten_with_keys(node: T) -> tuple[list[tuple[Any, Any]], Any]:
        children, static = flatten(node)
        keys = [pytree.GetAttrKey(name) for name in names] if names else map(pytree.SequenceKey, range(len(children)))
        return list(zip(keys, children, strict=True)), static

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
    optree.register_pytree_node(
        cls,  # type: ignore[arg-type]
        flatten,  # type: ignore[arg-type]
        lambda static, children: unflatten(children, static),  # type: ignore[arg-type,return-value]
        namespace=_EVERYWHERE,
    )


def path_name(path: Iterable[Any]) -> str:
    """Return the dotted name of a torch key path, for instance `layer_1.weight`."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """List the leaves of a tree with their dotted names.

    Example:
        >>> import torch
        >>> [name for name, leaf in named_leaves({"layer_1": {"weight": torch.zeros(2)}})]
        ['layer_1.weight']
    """
    return [(path_name(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def count(tree: Any) -> int:
    """Return the number of elements of all tensors in a tree."""
    return sum(leaf.numel() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def subtree(tree: Any, name: str) -> Any:
    """Return a child's part of its parent's tree: all of it for a child without a name."""
    return tree[name] if name else tree
