"""Pytrees: the one module that registers nodes with torch and optree, walks trees, and names their leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import optree
import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch._errors import InputError

T = TypeVar("T")

TreeSpec = pytree.TreeSpec
IsLeaf: TypeAlias = "Callable[[Any], bool] | None"

# optree has no public name for the namespace that everyone looks in, torchopt included.
_EVERYWHERE = getattr(optree.registry, "__GLOBAL_NAMESPACE")

# Nodes with a single child: how to take the child out, and how to make a node like another around a new one.
_SINGLE: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {}

_CONSTANTS: set[type] = set()
_NODES: set[type] = set()


def register_node(
    cls: type[T],
    flatten: Callable[[T], tuple[list[Any], Any]],
    unflatten: Callable[[Iterable[Any], Any], T],
    names: Sequence[str] | None = None,
    single: tuple[Callable[[T], Any], Callable[[Any, T], T]] | None = None,
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
        single: For a node whose only child is a tensor, a short way for `tree_map` and `tree_leaves`: what takes a node
            to its child, and what takes a new child and a node to a node like that one.
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
    _NODES.add(cls)
    if single is not None:
        _SINGLE[cls] = single


def register_constant(cls: type[Any]) -> None:
    """Register a class whose values are part of a tree's structure, for torch and for whatever is built on optree.

    Args:
        cls: The class; its values are hashable.

    Example:
        >>> class Mode(str): ...
        >>> register_constant(Mode)
        >>> tree_leaves({"mode": Mode("train"), "count": 1})
        [1]
    """
    pytree.register_constant(cls)
    optree.register_pytree_node(
        cls,
        lambda node: ((), node),  # type: ignore[arg-type,return-value]
        lambda node, _: node,  # type: ignore[arg-type,return-value]
        namespace=_EVERYWHERE,
    )
    _CONSTANTS.add(cls)


def is_node(value: Any) -> bool:
    """Tell whether a value is of a class that is registered as a node, with the tensors in it as leaves."""
    return type(value) in _NODES


def tree_flatten(tree: Any, is_leaf: IsLeaf = None) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a tree and its structure; `tree_unflatten` is the way back.

    Args:
        tree: The tree.
        is_leaf: Tells which nodes are to be taken for leaves.

    Example:
        >>> leaves, structure = tree_flatten({"a": 1, "b": (2, 3)})
        >>> leaves, tree_unflatten([10 * leaf for leaf in leaves], structure)
        ([1, 2, 3], {'a': 10, 'b': (20, 30)})
    """
    return pytree.tree_flatten(tree, is_leaf=is_leaf)


def tree_unflatten(leaves: Iterable[Any], structure: TreeSpec) -> Any:
    """Return a tree of a structure, with these leaves; see `tree_flatten`.

    Example:
        >>> tree_unflatten([1, 2], tree_structure({"a": 0, "b": 0}))
        {'a': 1, 'b': 2}
    """
    return pytree.tree_unflatten(leaves, structure)


def tree_structure(tree: Any) -> TreeSpec:
    """Return the structure of a tree.

    Example:
        >>> tree_structure({"a": 1, "b": 2}) == tree_structure({"a": 3, "b": 4})
        True
    """
    return pytree.tree_structure(tree)


def tree_flatten_with_path(tree: Any, is_leaf: IsLeaf = None) -> tuple[list[tuple[Any, Any]], TreeSpec]:
    """Return the leaves of a tree, each behind its path, and its structure; `path_name` writes a path.

    Example:
        >>> [(path_name(path), leaf) for path, leaf in tree_flatten_with_path({"a": {"b": 1}})[0]]
        [('a.b', 1)]
    """
    return pytree.tree_flatten_with_path(tree, is_leaf=is_leaf)


def tree_map_with_path(f: Callable[..., Any], tree: Any, is_leaf: IsLeaf = None) -> Any:
    """Return a tree with a function of path and leaf applied to its leaves.

    Example:
        >>> tree_map_with_path(lambda path, leaf: f"{path_name(path)} is {leaf}", {"a": {"b": 1}})
        {'a': {'b': 'a.b is 1'}}
    """
    return pytree.tree_map_with_path(f, tree, is_leaf=is_leaf)


def tree_map(f: Callable[..., Any], tree: Any, *others: Any, is_leaf: IsLeaf = None) -> Any:
    """Return a tree with a function applied to its leaves, in the order in which torch lists them.

    It is that of `torch.utils._pytree`, and takes a fifth of the time for nested dicts.

    Args:
        f: Takes a leaf, and the leaves of the other trees in its place.
        tree: The tree.
        others: Trees of the same structure.
        is_leaf: Tells which nodes are to be taken for leaves.

    Example:
        >>> tree_map(lambda a, b: a + b, {"a": 1, "b": [2]}, {"a": 10, "b": [20]})
        {'a': 11, 'b': [22]}
    """
    if others or is_leaf is not None:
        return pytree.tree_map(f, tree, *others, is_leaf=is_leaf)
    return _map(f, tree)


def _map(f: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    kind = type(tree)
    if kind is dict:
        return {name: _map(f, child) for name, child in tree.items()}
    if kind is tuple or kind is list:
        return kind([_map(f, child) for child in tree])
    if kind in _CONSTANTS:
        return tree
    if kind in _SINGLE:
        child, around = _SINGLE[kind]
        return around(f(child(tree)), tree)
    return pytree.tree_map(f, tree)


def tree_leaves(tree: Any, is_leaf: IsLeaf = None) -> list[Any]:
    """Return the leaves of a tree, in the order in which torch lists them; see `tree_map`.

    Example:
        >>> tree_leaves({"a": 1, "b": [2, 3]})
        [1, 2, 3]
    """
    if is_leaf is not None:
        return pytree.tree_leaves(tree, is_leaf=is_leaf)
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
    elif kind in _SINGLE:
        found.append(_SINGLE[kind][0](tree))
    elif kind not in _CONSTANTS:
        found += pytree.tree_leaves(tree)


def map_tensors(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a tree with a function applied to its tensors; other leaves are kept.

    Example:
        >>> import torch
        >>> map_tensors(torch.exp, {"scale": torch.zeros(1), "name": "a"})
        {'scale': tensor([1.]), 'name': 'a'}
    """
    return _map(lambda leaf: f(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a tree.

    Example:
        >>> import torch
        >>> tensors({"scale": torch.zeros(1), "name": "a"})
        [tensor([0.])]
    """
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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


def flatten_names(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of parameters or states by their dotted names, as a `state_dict` has them.

    Args:
        tree: Nested dicts, or a ComponentVector. What is not a tensor, such as the mode of a layer, is left out.

    Returns:
        A dict in the order of the tree.

    Raises:
        InputError: If there is a list or a tuple of tensors in the tree.

    Example:
        >>> import luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Chain(lt.Dense(2, 3), lt.BatchNorm(3)))
        >>> list(lt.flatten_names(ps))
        ['layer_1.weight', 'layer_1.bias', 'layer_2.weight', 'layer_2.bias']
        >>> list(lt.flatten_names(st))
        ['layer_2.running_mean', 'layer_2.running_var', 'layer_2.num_batches_tracked']

    Source: `torch.nn.Module.state_dict`.
    """
    return dict(_flat_names(tree, ()))


def unflatten_names(named: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return nested dicts from dotted names: the inverse of `flatten_names`.

    Args:
        named: The entries by name.
        like: A tree that has all that is to be returned besides: entries of other names, modes, and the empty dicts of
            layers without tensors. It stays as it is.

    Returns:
        A new tree, in the order of `like` as far as that goes.

    Raises:
        InputError: If a name is that of an entry and begins those of others.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.unflatten_names({"layer_1.weight": torch.ones(1), "layer_1.bias": torch.zeros(1)})
        {'layer_1': {'weight': tensor([1.]), 'bias': tensor([0.])}}
        >>> ps, st = lt.setup(0, lt.Chain(lt.Dense(2, 3), lt.NoOpLayer()))
        >>> list(lt.unflatten_names({"layer_1.bias": torch.ones(3)}, like=ps))
        ['layer_1', 'layer_2']
    """
    tree = nested_dicts(like or {})
    for name, value in named.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise _both(name)
        if isinstance(place.get(last), dict):
            raise _both(name)
        place[last] = value
    return tree


def _flat_names(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for name, entry in tree.items():
        if isinstance(entry, Mapping):
            yield from _flat_names(entry, (*path, name))
        elif isinstance(entry, Tensor):
            yield ".".join((*path, name)), entry
        elif isinstance(entry, list | tuple) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(entry)):
            raise InputError(
                f"Only tensors in dicts have names, and '{'.'.join((*path, name))}' is a {type(entry).__name__}.",
                expected="nested dicts of tensors",
                got=f"a {type(entry).__name__} of {len(entry)}",
                fix='Name its entries, {"0": ..., "1": ...}.',
            )


def _both(name: str) -> InputError:
    return InputError("A name cannot be that of an entry and of a layer.", expected="names of a tree", got=f"'{name}'")


def nested_dicts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of mappings as dicts of its own; a ComponentVector with each of its components as a leaf."""
    return {name: nested_dicts(entry) if isinstance(entry, Mapping) else entry for name, entry in tree.items()}


def count(tree: Any) -> int:
    """Return the number of elements of all tensors in a tree."""
    return sum(leaf.numel() for leaf in tensors(tree))


def subtree(tree: Any, name: str) -> Any:
    """Return a child's part of its parent's tree: all of it for a child without a name."""
    return tree[name] if name else tree
