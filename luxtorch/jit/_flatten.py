"""Flattening of arguments and unflattening of results by optree, in C++, also of nodes registered with torch."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock, local
from typing import Any, TypeAlias

import optree
import torch
import torch.utils._pytree as pytree

from luxtorch.core import DTypeError, tree_structure
from luxtorch.core._sharded import own_part, with_spec
from luxtorch.core._tree import DEFERRED

from ._constants import Constant, NotComparable, fingerprint, is_mutable

Spec: TypeAlias = "optree.PyTreeSpec"

_NAMESPACE = "luxtorch.jit"

# A function may depend on the order of a dict, so it is part of the structure here; by default optree, as jax, sorts
# the keys. The namespace is ours, and the setting lasts as long as this object.
_KEEP_ORDER = optree.dict_insertion_ordered(True, namespace=_NAMESPACE)
_KEEP_ORDER.__enter__()

_REGISTERING = Lock()
_REGISTERED: set[type] = set()
SHARDED: set[type] = set()
"""The class of sharded tensors, once `jit` has met one: a node with this rank's part as its child."""

# torch unflattens a torch.Size to a plain tuple.
_LEAVES = {torch.Size}


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """Return the leaves of a tree and its structure; `unflatten` of the structure is the inverse."""
    return optree.tree_flatten(tree, namespace=_NAMESPACE)


def flatten_torch_nodes(leaves: list[Any], spec: Spec) -> tuple[list[Any], Spec]:
    """Return leaves and structure with all nodes that are registered with torch flattened too.

    Classes that are registered with `torch.utils._pytree` alone, such as dataclasses and the outputs of many models,
    are leaves to optree. They are registered with it here at their first occurrence, and so is DTensor.
    """
    while new := {type(leaf) for leaf in leaves} & (pytree.SUPPORTED_NODES.keys() - _LEAVES | _sharded_class()):
        tree = spec.unflatten(leaves)
        register_classes(new)
        leaves, spec = flatten(tree)
    return leaves, spec


def _sharded_class() -> set[Any]:
    """Return the class of sharded tensors, if it is loaded and not registered yet."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return {tensor.DTensor} - SHARDED if tensor else set()


def has_sharded(spec: Spec) -> bool:
    """Return whether there is a sharded tensor in a structure."""
    return spec.type in SHARDED or any(map(has_sharded, spec.children()))


def assembler(spec: Spec) -> Callable[[Sequence[Any]], Any]:
    """Return `unflatten` of a structure, with nodes in it that are assembled later if that is possible."""
    if not _has_deferred(spec):
        return spec.unflatten
    try:
        tree = spec.unflatten(range(spec.num_leaves))
    except Exception:  # a node of a user's own that takes tensors alone
        return spec.unflatten
    parts, outer = optree.tree_flatten(tree, lambda node: type(node) in DEFERRED, namespace=_NAMESPACE)
    plan: list[tuple[Any, int, int, Any, Any]] = []
    place = 0
    for part in parts:
        make = DEFERRED.get(type(part))
        inner = flatten(part)[1] if make else None
        count = inner.num_leaves if inner else 1
        plan.append((make, place, place + count, inner, tree_structure(part)))
        place += count

    def assemble(leaves: Sequence[Any]) -> Any:
        made = [make(leaves[i:j], *structures) if make else leaves[i] for make, i, j, *structures in plan]
        return outer.unflatten(made)

    return assemble


def _has_deferred(spec: Spec) -> bool:
    return spec.type in DEFERRED or any(map(_has_deferred, spec.children()))


def deferred_leaves(args: Sequence[Any], specs: Sequence[Spec]) -> list[Any] | None:
    """Return the leaves of arguments some of which are not assembled yet; None if none is, or the structure differs.

    To assemble a training state and to flatten it again takes as long as a small step itself.

    Args:
        args: The arguments.
        specs: The structures that they must have.
    """
    found = [arg._deferred if type(arg) in DEFERRED else None for arg in args]
    if len(args) != len(specs) or not any(found):
        return None
    leaves: list[Any] = []
    for arg, deferred, spec in zip(args, found, specs, strict=True):
        own, structure = deferred[:2] if deferred else flatten(arg)
        if structure is not spec and structure != spec:
            return None
        leaves += own
    return leaves


def _register_sharded(cls: Any) -> None:
    """Register DTensor, for `jit` alone: what it computes are operators on this rank's part, and collectives.

    Mesh, placements and global shape belong to the structure.
    """

    def flatten_sharded(tensor: Any) -> tuple[tuple[Any], Any]:
        return (tensor._given if hasattr(tensor, "_given") else own_part(tensor),), tensor._spec

    def unflatten_sharded(spec: Any, children: Any) -> Any:
        (local,) = children
        tensor: Any = with_spec(local, spec)
        if tensor._local_tensor is not local:
            tensor._given = local  # an argument that comes back is known by its identity
        return tensor

    SHARDED.add(cls)
    with contextlib.suppress(ValueError):  # another thread was faster
        optree.register_pytree_node(cls, flatten_sharded, unflatten_sharded, namespace=_NAMESPACE)


def _register(cls: Any) -> None:
    """Register with optree, for `jit` alone, a class that is registered with torch."""

    def flatten_node(node: Any) -> tuple[tuple[Any, ...], _Context]:
        children, context = pytree.SUPPORTED_NODES[cls].flatten_fn(node)
        try:
            kept = _Context(context)
        except NotComparable as error:
            got = f"{error.what} at context{error.place}" if error.place else f"a {type(context).__name__}"
            fix = "Let the function that flattens it return tensors as children."
            headline = f"The context of the pytree node {cls.__name__} must be a constant without tensors."
            raise DTypeError(headline, got=got, fix=fix) from None
        if _LOCAL.fresh_contexts:
            kept.value = kept.fresh()
        return tuple(children), kept

    def unflatten_node(context: Any, children: Any) -> Any:
        return pytree.SUPPORTED_NODES[cls].unflatten_fn(list(children), context.fresh())

    _REGISTERED.add(cls)
    with contextlib.suppress(ValueError):  # another thread was faster
        optree.register_pytree_node(cls, flatten_node, unflatten_node, namespace=_NAMESPACE)


def node_classes(spec: Spec) -> set[type]:
    """Return the classes of nodes in a structure that are registered with torch alone."""
    found = {spec.type} if spec.type in _REGISTERED else set()
    return found.union(*map(node_classes, spec.children()))


def register_classes(classes: Iterable[type]) -> None:
    """Register with optree, for `jit` alone, classes that are registered with torch."""
    with _REGISTERING:
        for cls in classes:
            (_register_sharded if issubclass(cls, torch.Tensor) else _register)(cls)


class _Context(Constant):
    """Hold the context of a pytree node; each node gets a copy of a mutable one."""

    __slots__ = ("_copied",)

    def fresh(self) -> Any:
        """Return the value, or a copy of a mutable one."""
        if not hasattr(self, "_copied"):
            # An object that is compared by identity cannot be copied.
            self._copied = is_mutable(self.value) and fingerprint(copy.deepcopy(self.value)) == self.key
        return copy.deepcopy(self.value) if self._copied else self.value


class _Local(local):
    fresh_contexts = False


_LOCAL = _Local()


@contextlib.contextmanager
def fresh_contexts() -> Iterator[None]:
    """Copy mutable contexts of nodes that are flattened inside, so that nothing else shares them."""
    _LOCAL.fresh_contexts = True
    try:
        yield
    finally:
        _LOCAL.fresh_contexts = False


def leaves_with_paths(tree: Any, stop: type) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the leaves of a tree with their paths; nodes of the class `stop` are leaves here."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree, lambda node: type(node) is stop, namespace=_NAMESPACE)
    return list(zip(paths, leaves, strict=True))


def path_text(path: Sequence[Any]) -> str:
    """Return a path as code: `["a"][0]`."""
    return "".join(f"[{entry!r}]" for entry in path)


def leaf_ranges(spec: Spec, start: int = 0) -> list[range]:
    """Return the range of leaves of each child of the root, counted from `start`."""
    ranges = []
    for child in spec.children():
        ranges.append(range(start, start + child.num_leaves))
        start += child.num_leaves
    return ranges
