"""Casts of all floating point tensors in a tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError

from ._tensors import map_tensors, own_numbers

_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


def in_precision(tensor: Tensor, precision: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in some precision: its own where it is neither real nor complex."""
    if tensor.is_floating_point():
        return precision
    if not tensor.is_complex():
        return tensor.dtype
    if precision not in _COMPLEX:
        raise DTypeError(
            "There are no complex numbers of this precision.",
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

    Integers, booleans, random keys and whatever is no tensor are left as they are. A tensor that already has the
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
