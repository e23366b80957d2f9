"""Walking parameters and gradients together, leaf by leaf, and putting new leaves back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luxtorch.components import Axes, ComponentVector
from luxtorch.core import (
    DTypeError,
    InputError,
    KeyNameError,
    suggest,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from luxtorch.core._sharded import any_sharded, is_sharded, placed_like
from luxtorch.core._tree import TreeSpec


class Leaves(NamedTuple):
    """Hold the leaves of a tree of parameters: their dotted names, the parameters, and their gradients.

    A ComponentVector is one leaf, its flat tensor. A missing gradient is None. All numbers are real: a complex leaf,
    and its gradient, is listed as the real and imaginary parts of its elements, as torch.optim has it.

    Attributes:
        names: The dotted names.
        params: The parameters.
        grads: Their gradients.
        in_parts: The names of the complex leaves. The two parts are a last dimension.
        extra: What a step was given besides: see `with_extra`.
    """

    names: list[str]
    params: list[Tensor]
    grads: list[Tensor | None]
    in_parts: list[str]
    extra: Mapping[str, Any] = MappingProxyType({})

    def only(self, names: Iterable[str]) -> Leaves:
        """Return some of the leaves."""
        chosen = list(names)
        params = dict(zip(self.names, self.params, strict=True))
        grads = dict(zip(self.names, self.grads, strict=True))
        in_parts = [name for name in chosen if name in self.in_parts]
        return Leaves(chosen, [params[n] for n in chosen], [grads[n] for n in chosen], in_parts, self.extra)


def pair(ps: Any, grads: Any) -> Leaves:
    """List the leaves of parameters with the gradients that belong to them.

    Raises:
        KeyNameError: Where the gradients have a name that the parameters lack.
        InputError: Where their structure or a shape differs.
        DTypeError: Where a dtype differs, or a leaf is not a tensor.
    """
    leaves = Leaves([], [], [], [])
    _walk(ps, grads, "", leaves)
    if any_sharded(leaves.params):
        leaves = leaves._replace(grads=placed_like(leaves.grads, leaves.params))
    return leaves


def _walk(ps: Any, grads: Any, name: str, leaves: Leaves) -> None:
    if isinstance(ps, Tensor):
        if grads is not None and (not isinstance(grads, Tensor) or grads.shape != ps.shape or grads.dtype != ps.dtype):
            _check_gradient(ps, grads, name)
        if grads is not None and grads.layout is not torch.strided:
            grads = grads.to_dense()
        if grads is not None and type(grads) is not type(ps) and is_sharded(grads) != is_sharded(ps):
            raise _half_sharded(ps, name)
        if ps.is_complex():
            leaves.in_parts.append(name)
            ps, grads = parts(ps), None if grads is None else parts(grads)
        leaves.names.append(name)
        leaves.params.append(ps)
        leaves.grads.append(grads)
    elif isinstance(ps, dict):
        if grads is None:
            grads = {}
        elif not isinstance(grads, dict):
            raise _structure_error(ps, grads, name)
        for key, child in ps.items():
            _walk(child, grads.get(key), join(name, key), leaves)
        if not grads.keys() <= ps.keys():
            raise _name_error(ps, grads, name)
    elif isinstance(ps, ComponentVector):
        if grads is not None:
            if not isinstance(grads, ComponentVector) or grads.axes != ps.axes:
                raise _structure_error(ps, grads, name)
            grads = grads.flat
        _walk(ps.flat, grads, join(name, "flat"), leaves)
    else:
        children, spec = one_level(ps, name)
        given, given_spec = one_level(grads, name) if grads is not None else ([None] * len(children), spec)
        if given_spec != spec:
            raise _structure_error(ps, grads, name)
        for i, (child, grad) in enumerate(zip(children, given, strict=True)):
            _walk(child, grad, join(name, i), leaves)


def with_extra(leaves: Leaves, ps: Any, extra: Mapping[str, Any], whole: Callable[[Any], Any] | None = None) -> Leaves:
    """Return leaves with what a step was given besides the gradients.

    A `hessian`, a tree like the parameters, becomes a dict by dotted names; a `value_fn`, which takes such a tree,
    takes such a dict, in which parameters may be missing that stay as they are.

    Args:
        leaves: The leaves.
        ps: The tree that they are of.
        extra: The arguments.
        whole: Takes a tree like `ps` to what `value_fn` knows, where `ps` has components in the place of vectors.
    """
    extra = dict(extra)
    if extra.get("hessian") is not None:
        hessian = extra["hessian"] if whole is None else to_components(extra["hessian"])
        extra["hessian"] = dict(zip(leaves.names, pair(ps, hessian).grads, strict=True))
    if extra.get("value_fn") is not None:
        value_fn = extra["value_fn"]

        def by_name(params: Mapping[str, Tensor]) -> Any:
            named = zip(leaves.names, leaves.params, strict=True)
            tree = rebuild(ps, iter([params[name].to(p.dtype) if name in params else p for name, p in named]))
            return value_fn(tree if whole is None else whole(tree))

        extra["value_fn"] = by_name
    return leaves._replace(extra=extra)


def rebuild(ps: Any, leaves: Iterator[Any]) -> Any:
    """Return a tree like `ps` whose leaves come from an iterator, in the order in which `pair` lists them."""
    if isinstance(ps, Tensor):
        return _whole(next(leaves), ps)
    if type(ps) is dict:
        return {key: rebuild(child, leaves) for key, child in ps.items()}
    if isinstance(ps, ComponentVector):
        flat = _whole(next(leaves), ps.flat)
        return None if flat is None else ComponentVector.from_flat(flat, ps.axes)
    children, spec = one_level(ps)
    return tree_unflatten([rebuild(child, leaves) for child in children], spec)


def parts(tensor: Tensor) -> Tensor:
    """Return real and imaginary parts of complex numbers in a last dimension of two.

    It is a view of the same memory, unless that holds the conjugates or the negatives of the numbers.
    """
    return torch.view_as_real(tensor.resolve_conj().resolve_neg())


def _whole(leaf: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a leaf as `pair` lists it in the dtype of the tree."""
    return leaf if leaf is None or not like.is_complex() else torch.view_as_complex(leaf)


def join(name: str, key: object) -> str:
    """Return the dotted name of a child."""
    return f"{name}.{key}" if name else str(key)


def one_level(tree: Any, name: str = "") -> tuple[list[Any], TreeSpec]:
    """Return the children of any pytree node, and how to put them together again."""
    children, spec = tree_flatten(tree, is_leaf=lambda node: node is not tree)
    if len(children) == 1 and children[0] is tree:
        raise DTypeError(
            "A leaf is not a tensor.",
            expected="a tensor, or a dict, ComponentVector or other pytree of tensors",
            got=type(tree).__name__,
            where=name,
        )
    return children, spec


def vectors(ps: Any) -> dict[str, Axes]:
    """Return the axes of the ComponentVectors of a tree, by the names that `pair` gives to their leaves."""
    nodes = tree_leaves(ps, is_leaf=_is_vector)
    named = zip(pair(ps, None).names, nodes, strict=True)
    return {name: node.axes for name, node in named if _is_vector(node)}


def components(name: str, axes: Axes) -> dict[str, tuple[int, ...]]:
    """Return the names of the components of a ComponentVector's leaf, and their shapes."""
    return {join(name.removesuffix("flat").rstrip("."), part): shape for part, shape in axes.shapes.items()}


def to_components(tree: Any) -> Any:
    """Return the tree with each ComponentVector replaced by the dict of its components."""
    return tree_map(lambda node: node.to_dict() if _is_vector(node) else node, tree, is_leaf=_is_vector)


def from_components(ps: Any, tree: Any) -> Any:
    """Return a tree that `to_components` has changed with its ComponentVectors, those of `ps`, put back."""
    return tree_map(lambda p, node: _pack(p, node) if _is_vector(p) else node, ps, tree, is_leaf=_is_vector)


def _is_vector(node: Any) -> bool:
    return isinstance(node, ComponentVector)


def _pack(vector: ComponentVector, components: Any) -> ComponentVector:
    batch = vector.flat.shape[:-1]
    flat = torch.cat([leaf.reshape(*batch, -1) for leaf in tree_leaves(components)], -1)
    return ComponentVector.from_flat(flat, vector.axes)


def _check_gradient(p: Tensor, g: Any, name: str) -> None:
    where = name or "the parameter"
    if not isinstance(g, Tensor):
        raise InputError(
            "The gradient of a parameter is not a tensor.",
            expected=f"a tensor of shape {tuple(p.shape)}, or None",
            got=type(g).__name__,
            fix="Pass gradients of the same structure as the parameters.",
            where=where,
        )
    if g.shape != p.shape:
        raise InputError(
            "The gradient has another shape than its parameter.",
            expected=str(tuple(p.shape)),
            got=str(tuple(g.shape)),
            fix="Pass the gradient with respect to these parameters.",
            where=where,
        )
    if g.dtype != p.dtype:
        raise DTypeError(
            "The gradient has another dtype than its parameter.",
            expected=str(p.dtype),
            got=str(g.dtype),
            fix=f"Convert it with g.to({p.dtype}).",
            where=where,
        )


def _structure_error(ps: Any, grads: Any, name: str) -> InputError:
    same = type(ps) is type(grads)
    return InputError(
        "The gradients have another structure than the parameters.",
        expected=f"{type(ps).__name__}{' of the same axes or length' if same else ''}, or None",
        got=type(grads).__name__,
        fix="Take the gradient with respect to the very tree that is passed as parameters.",
        where=name or "the gradients",
    )


def _half_sharded(ps: Tensor, name: str) -> InputError:
    return InputError(
        "The gradient of a sharded parameter must be sharded, and that of a plain one plain.",
        got=f"a {'sharded' if is_sharded(ps) else 'plain'} parameter",
        fix="Compute the loss with the parameters that are passed here.",
        where=name or "the gradients",
    )


def _name_error(ps: Any, grads: Any, name: str) -> KeyNameError:
    unknown = [str(key) for key in grads if key not in ps]
    return KeyNameError(
        f"The gradients have a name that the parameters lack: '{join(name, unknown[0])}'.",
        expected=", ".join(join(name, key) for key in ps) or "no names",
        got=", ".join(join(name, key) for key in grads),
        fix=suggest(unknown[0], map(str, ps)) or "Take the gradient with respect to these parameters.",
        where=name or "the gradients",
    )
