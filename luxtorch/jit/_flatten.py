"""Taking arguments apart and putting results together: by optree, which does it in C++."""

from __future__ import annotations

from typing import Any, TypeAlias

import optree

Spec: TypeAlias = "optree.PyTreeSpec"

_NAMESPACE = "luxtorch.jit"

# A function may depend on the order in which a dict was filled. So dicts keep it here, and it is part of the structure;
# optree, and jax with it, would sort the keys. The namespace is ours, and the setting lasts as long as this object.
_KEEP_ORDER = optree.dict_insertion_ordered(True, namespace=_NAMESPACE)
_KEEP_ORDER.__enter__()


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """Return the leaves of a tree and its structure; `unflatten` of the structure is the way back."""
    return optree.tree_flatten(tree, namespace=_NAMESPACE)


def leaf_ranges(spec: Spec, start: int = 0) -> list[range]:
    """Return which leaves belong to each child of the root, counted from `start`."""
    ranges = []
    for child in spec.children():
        ranges.append(range(start, start + child.num_leaves))
        start += child.num_leaves
    return ranges
