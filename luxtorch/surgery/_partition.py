"""Divide a tree of parameters by names, and put it together again: `partition` and `combine`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from luxtorch.components import ComponentVector
from luxtorch.core import InputError, flatten_names, nested_dicts, wrong_type
from luxtorch.core._paths import Path, select


def partition(tree: Mapping[str, Any], *paths: Path) -> tuple[Any, ...]:
    """Divide a tree of tensors into parts: one for each path, and the rest.

    Each part is a tree by itself, to be differentiated, optimized or put into a `ComponentVector`; `combine` puts them
    together again. To leave parameters out of the training of a model for good, `freeze` is simpler.

    Args:
        tree: Parameters, states or gradients; nested dicts or a ComponentVector.
        *paths: Dotted paths such as `"layer_1"`, which stand for everything below them, globs such as `"*.bias"`,
            predicates on dotted names, or lists of these, each for one part; see `freeze`.

    Returns:
        A tuple of trees, the rest last. Every part has all groups, empty ones too. What is not a tensor, such as
        the mode of a layer, belongs to the rest. Parts of a ComponentVector are ComponentVectors.

    Raises:
        KeyNameError: If a path stands for no tensor.
        InputError: If there is no path, or a tensor belongs to two parts.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> head, biases, rest = lt.partition(ps, "layer_2", lambda name: name == "layer_1.bias")
        >>> [list(lt.flatten_names(part)) for part in (head, biases, rest)]
        [['layer_2.weight', 'layer_2.bias'], ['layer_1.bias'], ['layer_1.weight']]
        >>> x = torch.ones(4, 2)
        >>> grads = torch.func.grad(lambda head: model(x, lt.combine(head, biases, rest), st)[0].sum())(head)
        >>> grads["layer_2"]["bias"]
        tensor([4.])

    Source: `partition` of Equinox, for any number of parts.
    """
    if not paths:
        raise InputError("partition needs at least one path.", expected='partition(ps, "layer_1"), or several paths')
    rest = _tree("partition", tree)
    owner: dict[str, Any] = {}
    parts = []
    for path in paths:
        chosen = select(path, list(flatten_names(tree)), "tensor")
        for name in chosen & owner.keys():
            raise InputError(
                "A tensor belongs to two parts.",
                expected="paths that have nothing in common",
                got=f"'{owner[name]}' and '{path}'",
                where=name,
            )
        owner.update(dict.fromkeys(chosen, path))
        rest, part = taken(rest, chosen)
        parts.append(part)
    return tuple(closed(part, tree) for part in (*parts, rest))


def combine(*trees: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> Any:
    """Put the parts of a tree together again: the inverse of `partition`.

    Args:
        *trees: The parts, in any order.
        like: A tree whose order of names the result is to have. Layers do not care for the order, but the layout of a
            ComponentVector is in it.

    Returns:
        One tree; a ComponentVector if the first part is one.

    Raises:
        InputError: If there are no parts, or something stands in two of them.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps = {"layer_1": {"weight": torch.ones(1), "bias": torch.zeros(1)}}
        >>> bias, rest = lt.partition(ps, "layer_1.bias")
        >>> lt.combine(bias, rest, like=ps)
        {'layer_1': {'weight': tensor([1.]), 'bias': tensor([0.])}}

    Source: `combine` of Equinox.
    """
    if not trees:
        raise InputError("combine needs at least one tree.", expected="combine(part, rest)")
    whole = _tree("combine", trees[0])
    for tree in trees[1:]:
        try:
            whole = merged(whole, _tree("combine", tree), new_groups=True)
        except KeyError as error:
            raise InputError(
                f"'{error.args[0]}' stands in two of the trees.",
                expected="parts that have nothing in common, as lt.partition makes them",
                fix="To put new values in place of old ones, combine them with the rest alone.",
            ) from None
    return closed(whole if like is None else ordered(whole, like), trees[0])


def _tree(function: str, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        fix = "Paths come after the tree: lt.partition(ps, 'layer_1')." * (function == "partition")
        raise wrong_type("tree", tree, "a tree of tensors: nested dicts, or a ComponentVector", fix=fix)
    return nested_dicts(tree)


def join(path: str, name: str) -> str:
    """Return the path of what has a name below a path."""
    return f"{path}.{name}" if path and name else path or name


def closed(tree: Mapping[str, Any], like: Any) -> Any:
    """Return a tree as a ComponentVector, if `like` is one."""
    return ComponentVector(tree, batch_dims=like.flat.dim() - 1) if isinstance(like, ComponentVector) else tree


def taken(tree: Mapping[str, Any], names: Collection[str], path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what has none of some dotted names, and what has one; each with every group."""
    rest: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for name, entry in tree.items():
        place = join(path, name)
        if isinstance(entry, Mapping):
            rest[name], chosen[name] = taken(entry, names, place)
        else:
            (chosen if place in names else rest)[name] = entry
    return rest, chosen


def pruned(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree without empty groups."""
    entries = {name: pruned(entry) if isinstance(entry, Mapping) else entry for name, entry in tree.items()}
    return {name: entry for name, entry in entries.items() if not isinstance(entry, Mapping) or entry}


def merged(tree: Mapping[str, Any], more: Mapping[str, Any], *, new_groups: bool = False) -> dict[str, Any]:
    """Return all that stands in two trees.

    Args:
        tree: The first.
        more: The other.
        new_groups: Whether there may be groups in the other that the first does not have.

    Raises:
        KeyError: If something stands in both, or a group is missing; with its dotted name.
    """
    whole = dict(tree)
    for name, entry in more.items():
        if isinstance(entry, Mapping) and isinstance(whole.get(name), Mapping):
            try:
                whole[name] = merged(whole[name], entry, new_groups=new_groups)
            except KeyError as error:
                raise KeyError(join(name, error.args[0])) from None
        elif name in whole or (isinstance(entry, Mapping) and not new_groups):
            raise KeyError(name)
        else:
            whole[name] = entry
    return whole


def ordered(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in the order of another, as far as that goes."""
    names = [name for name in like if name in tree] + [name for name in tree if name not in like]
    return {name: _ordered_entry(tree[name], like.get(name)) for name in names}


def _ordered_entry(entry: Any, like: Any) -> Any:
    return ordered(entry, like) if isinstance(entry, Mapping) and isinstance(like, Mapping) else entry
