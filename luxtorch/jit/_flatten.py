"""Taking arguments apart and putting results together: by optree, which does it in C++."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from threading import Lock, local
from typing import Any, TypeAlias

import optree
import torch
import torch.utils._pytree as pytree

from luxtorch.core import DTypeError

from ._constants import Constant, Refused, fingerprint, is_mutable

Spec: TypeAlias = "optree.PyTreeSpec"

_NAMESPACE = "luxtorch.jit"

# A function may depend on the order in which a dict was filled. So dicts keep it here, and it is part of the structure;
# optree, and jax with it, would sort the keys. The namespace is ours, and the setting lasts as long as this object.
_KEEP_ORDER = optree.dict_insertion_ordered(True, namespace=_NAMESPACE)
_KEEP_ORDER.__enter__()

_REGISTERING = Lock()

# torch puts a size together again as a plain tuple.
_LEAVES = {torch.Size}


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """Return the leaves of a tree and its structure; `unflatten` of the structure is the way back."""
    return optree.tree_flatten(tree, namespace=_NAMESPACE)


def with_nodes(leaves: list[Any], spec: Spec) -> tuple[list[Any], Spec]:
    """Return leaves and structure with all nodes that torch knows taken apart as well.

    optree does not know what was registered by `torch.utils._pytree` alone, such as dataclasses and the outputs of
    many models: it takes these for leaves. They are registered here when they are first met, so that the next call
    finds them without a search.
    """
    while new := {type(leaf) for leaf in leaves} & pytree.SUPPORTED_NODES.keys() - _LEAVES:
        tree = spec.unflatten(leaves)
        with _REGISTERING:
            for cls in new:
                _register(cls)
        leaves, spec = flatten(tree)
    return leaves, spec


def _register(cls: Any) -> None:
    """Register with optree, for `jit` alone, a class that is registered with torch."""

    def take_apart(node: Any) -> tuple[tuple[Any, ...], _Context]:
        children, context = pytree.SUPPORTED_NODES[cls].flatten_fn(node)
        try:
            kept = _Context(context)
        except Refused as error:
            raise DTypeError(
                f"What {cls.__name__} keeps beside its children is not a constant.",
                expected="a context of its pytree node that can be compared, without tensors",
                got=f"{error.what} at context{error.place}" if error.place else f"a {type(context).__name__}",
                fix="Let the function that flattens it return tensors as children.",
            ) from None
        if _LOCAL.owning:
            kept.value = kept.fresh()
        return tuple(children), kept

    def put_together(context: Any, children: Any) -> Any:
        return pytree.SUPPORTED_NODES[cls].unflatten_fn(list(children), context.fresh())

    with contextlib.suppress(ValueError):  # another thread has been faster
        optree.register_pytree_node(cls, take_apart, put_together, namespace=_NAMESPACE)


class _Context(Constant):
    """Hold what a node keeps beside its children; each node gets one of its own, where that can be changed."""

    __slots__ = ("_copied",)

    def fresh(self) -> Any:
        """Return the value, or an equal one that nobody else has."""
        if not hasattr(self, "_copied"):
            # An object that is compared by identity has to stay what it is.
            self._copied = is_mutable(self.value) and fingerprint(copy.deepcopy(self.value)) == self.key
        return copy.deepcopy(self.value) if self._copied else self.value


class _Local(local):
    owning = False


_LOCAL = _Local()


@contextlib.contextmanager
def owning() -> Iterator[None]:
    """Have structures of which nobody else has a part that can be changed."""
    _LOCAL.owning = True
    try:
        yield
    finally:
        _LOCAL.owning = False


def places(tree: Any, stop: type) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the leaves of a tree with their paths; nodes of the class `stop` are leaves here."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree, lambda node: type(node) is stop, namespace=_NAMESPACE)
    return list(zip(paths, leaves, strict=True))


def written(path: Sequence[Any]) -> str:
    """Return a path as one would write it: `["a"][0]`."""
    return "".join(f"[{entry!r}]" for entry in path)


def leaf_ranges(spec: Spec, start: int = 0) -> list[range]:
    """Return which leaves belong to each child of the root, counted from `start`."""
    ranges = []
    for child in spec.children():
        ranges.append(range(start, start + child.num_leaves))
        start += child.num_leaves
    return ranges
