"""Applying a function to the tensors of a tree, and to nothing else in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import InputError, Layer, named_leaves, tree_leaves, tree_map


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree, once to a tensor that the tree holds several times.

    Args:
        function: Takes a tensor to a tensor.
        tree: A tree. Leaves that are no tensors are left as they are.

    Raises:
        InputError: The tree holds a layer or a module, in which there is nothing to map.
    """
    results: dict[int, Tensor] = {}

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in results:
                results[id(leaf)] = function(leaf)
            return results[id(leaf)]
        if isinstance(leaf, (Layer, nn.Module)):
            _refuse(leaf, tree)
        return leaf

    return tree_map(apply, tree)


def own_numbers(tree: Any, dtype: torch.dtype) -> set[int]:
    """Return which tensors of a tree a cast to a dtype leaves alone, by their ids.

    A node may have numbers that follow no precision, such as the hyperparameters of an optimizer: it then has a method
    `own_numbers(dtype)`, which lists them.
    """
    nodes = filter(_has_numbers, tree_leaves(tree, is_leaf=_has_numbers))
    return {id(number) for node in nodes for number in node.own_numbers(dtype)}


def _has_numbers(node: Any) -> bool:
    return hasattr(type(node), "own_numbers")


def _refuse(leaf: Layer | nn.Module, tree: Any) -> None:
    path = next(path for path, other in named_leaves(tree) if other is leaf)
    is_layer = isinstance(leaf, Layer)
    raise InputError(
        "A layer holds no tensors: there is nothing to move or cast."
        if is_layer
        else "A torch.nn.Module is no tree of tensors.",
        expected="a tree of tensors, such as parameters or states",
        got=f"{type(leaf).__name__}" + (f" at '{path}'" if path else ""),
        fix="Pass its parameters and states, as in `ps, st = device((ps, st))`."
        if is_layer
        else "Call its own .to(...), or convert it to a layer, parameters and states.",
    )
