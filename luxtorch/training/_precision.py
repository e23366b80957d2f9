"""Mixed precision: a model that computes in a lower precision than that of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, map_tensors, tree_flatten, tree_leaves, tree_unflatten


class InPrecision:
    """Call a model in some precision: parameters and inputs are cast on the way in, outputs and states on the way out.

    Derivatives flow through the casts, so that gradients have the parameters' own dtype. Losses are computed from
    outputs that are cast back: outside the model, nothing is in low precision. States are passed as they are, since
    running statistics should not lose precision; the new ones get the dtypes of the old.

    Args:
        model: The model.
        dtype: What it computes in.
        back: What its outputs are cast to.
    """

    def __init__(self, model: Any, dtype: torch.dtype, back: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.back = back

    def __call__(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Return the model's output and states."""
        y, new = self.model(_cast(x, self.dtype), _cast(ps, self.dtype), st)
        return _cast(y, self.back), _like(new, st)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def in_precision(model: Any, dtype: torch.dtype, ps: Any) -> InPrecision:
    """Return a model that computes in some precision, and whose outputs have that of the parameters."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DTypeError(
            "The dtype to compute in is not a floating point dtype.",
            expected="for instance torch.bfloat16",
            got=repr(dtype),
        )
    numbers = (leaf.dtype.to_real() for leaf in tree_leaves(ps) if isinstance(leaf, Tensor))
    masters = (dtype for dtype in numbers if dtype.is_floating_point)
    return InPrecision(model, dtype, next(masters, torch.float32))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, tree)


def _like(new: Any, old: Any) -> Any:
    """Return states in the dtypes of the states before, where there is one."""
    before, spec = tree_flatten(old)
    after, new_spec = tree_flatten(new)
    if new_spec != spec:
        return new
    return tree_unflatten([a.to(b.dtype) for a, b in zip(after, before, strict=True)], spec)
