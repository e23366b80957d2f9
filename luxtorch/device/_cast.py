"""Cast all floating point tensors of a tree to a precision: `f16`, `bf16`, `f32`, `f64`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import DTypeError, InputError, Layer, named_leaves, tree_leaves, tree_map

_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree, once to a tensor that the tree holds several times.

    Args:
        function: Takes a tensor to a tensor.
        tree: A tree. Leaves that are not tensors are left as they are.

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
        else "A torch.nn.Module is not a tree of tensors.",
        expected="a tree of tensors, such as parameters or states",
        got=f"{type(leaf).__name__}" + (f" at '{path}'" if path else ""),
        fix="Pass its parameters and states, as in `ps, st = device((ps, st))`."
        if is_layer
        else "Call its own .to(...), or convert it to a layer, parameters and states.",
    )


def in_precision(tensor: Tensor, precision: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in some precision: its own where it is neither real nor complex."""
    if tensor.is_floating_point():
        return precision
    if not tensor.is_complex():
        return tensor.dtype
    if precision not in _COMPLEX:
        raise DTypeError(
            "torch has no complex dtype of this precision.",
            expected="float16, float32 or float64",
            got=str(precision).removeprefix("torch."),
            fix="Cast to one of these, or split the tensor with torch.view_as_real.",
        )
    return _COMPLEX[precision]


def _cast(tree: Any, precision: torch.dtype) -> Any:
    kept = own_numbers(tree, precision)
    return map_tensors(
        lambda tensor: tensor if id(tensor) in kept else tensor.to(in_precision(tensor, precision)), tree
    )


def f16(tree: Any) -> Any:
    """Cast the floating point and complex tensors of a tree to half precision.

    Integers, booleans, random keys and whatever is not a tensor are left as they are. A tensor that already has the
    precision is not copied, and one that the tree holds twice is still one tensor afterwards. Of an optimizer's state,
    or of a whole `TrainState`, what there is of each element of a parameter is cast, and no hyperparameter or count;
    averages of gradients are not cast to float16, which has no room for their squares.

    Args:
        tree: A tree of tensors.

    Returns:
        A tree of the same structure.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.f16({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.float16), 'count': tensor(3)}

    Source:
        `Lux.f16`.
    """
    return _cast(tree, torch.float16)


def bf16(tree: Any) -> Any:
    """Cast the floating point tensors of a tree to bfloat16; otherwise like `f16`.

    Args:
        tree: A tree of tensors, none of them complex.

    Returns:
        A tree of the same structure.

    Raises:
        DTypeError: The tree holds a complex tensor, for which there is no such precision.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.bf16({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.bfloat16), 'count': tensor(3)}

    Source:
        `Lux.bf16`.
    """
    return _cast(tree, torch.bfloat16)


def f32(tree: Any) -> Any:
    """Cast the floating point and complex tensors of a tree to single precision; otherwise like `f16`.

    Args:
        tree: A tree of tensors.

    Returns:
        A tree of the same structure.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.f32({"weight": torch.ones(1, dtype=torch.float64), "count": torch.tensor(3)})
        {'weight': tensor([1.]), 'count': tensor(3)}

    Source:
        `Lux.f32`.
    """
    return _cast(tree, torch.float32)


def f64(tree: Any) -> Any:
    """Cast the floating point and complex tensors of a tree to double precision; otherwise like `f16`.

    Args:
        tree: A tree of tensors.

    Returns:
        A tree of the same structure.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.f64({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.float64), 'count': tensor(3)}

    Source:
        `Lux.f64`.
    """
    return _cast(tree, torch.float64)
