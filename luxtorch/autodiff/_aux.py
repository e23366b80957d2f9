"""Auxiliary outputs: what a function returns beside the value that is differentiated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from luxtorch.core import InputError, TreeSpec, register_node, tree_flatten, tree_unflatten

Tree = Any


class _Packed:
    """Hold a tree whose leaves are not all tensors, with the tensors alone as its children."""

    def __init__(self, tensors: Iterable[Any], others: dict[int, Any], spec: TreeSpec) -> None:
        self.tensors = tensors
        self.others = others
        self.spec = spec


register_node(
    _Packed,
    lambda node: (list(node.tensors), (node.others, node.spec)),
    lambda children, static: _Packed(children, *static),
)


def pack(aux: Tree) -> Tree:
    """Make a tree fit to leave a transform of torch.func, which lets nothing but tensors through."""
    if isinstance(aux, Tensor):
        return aux
    leaves, spec = tree_flatten(aux)
    others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    if not others:
        return aux
    return _Packed([leaf for leaf in leaves if isinstance(leaf, Tensor)], others, spec)


def unpack(aux: Tree) -> Tree:
    """Undo `pack`."""
    if not isinstance(aux, _Packed):
        return aux
    tensors = iter(aux.tensors)
    leaves = [aux.others[i] if i in aux.others else next(tensors) for i in range(aux.spec.num_leaves)]
    return tree_unflatten(leaves, aux.spec)


def split(output: Any, has_aux: bool) -> tuple[Tree, Tree]:
    """Return a function's value and its auxiliary output, `()` where it has none."""
    if not has_aux:
        return output, ()
    if not (isinstance(output, tuple) and len(output) == 2):
        raise InputError(
            "With has_aux=True the function must return a pair.",
            expected="(value, aux)",
            got=f"a tuple of {len(output)}" if isinstance(output, tuple) else f"a {type(output).__name__}",
            fix="Return (value, aux), or drop has_aux=True.",
        )
    return output


def join(value: Tree, aux: Tree, has_aux: bool) -> Tree:
    """Return what the function itself returned: undo `split`."""
    return (value, aux) if has_aux else value
