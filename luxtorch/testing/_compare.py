"""Assertions that two trees of tensors are alike, and `LawError`, which they raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import LuxtorchError, named_leaves, tree_structure


class LawError(LuxtorchError, AssertionError):
    """Report a law of luxtorch that a layer breaks."""


def same_structure(law: str, got: Any, expected: Any) -> None:
    """Raise unless two trees have the same structure, shapes and dtypes."""
    structures = [tree_structure(tree) for tree in (got, expected)]
    if structures[0] != structures[1]:
        raise LawError(f"{law}: the tree changes its structure.", expected=str(structures[1]), got=str(structures[0]))
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(expected), strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            raise LawError(f"{law}: '{name}' is not a tensor.", expected="tensors and Static values", got=f"{a!r:.80}")
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise LawError(
                f"{law}: '{name}' changes its shape or dtype.",
                expected=f"{b.dtype} {tuple(b.shape)}",
                got=f"{a.dtype} {tuple(a.shape)}",
            )


def same_values(law: str, got: Any, expected: Any, *, tolerance: float = 0.0) -> None:
    """Raise unless two trees are equal: to the bit, or within a tolerance relative to the largest value.

    A tolerance allows for the last bits of a dtype, too: in half precision one rounding is as much as an error is else.
    """
    same_structure(law, got, expected)
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(expected), strict=True):
        if tolerance == 0.0 or not (b.is_floating_point() or b.is_complex()):
            equal = torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
        else:
            scale = float(b.detach().abs().max()) if b.numel() else 0.0
            near = max(tolerance, 4 * torch.finfo(b.dtype).eps)
            equal = torch.allclose(a, b, rtol=near, atol=near * max(scale, 1.0), equal_nan=True)
        if not equal:
            gap = (a - b).abs().max().item() if a.is_floating_point() else "some elements"
            raise LawError(
                f"{law}: '{name or 'the output'}' differs.", expected=f"{b!s:.200}", got=f"{a!s:.200} (by {gap})"
            )


def close(law: str, got: float, expected: float, tolerance: float) -> None:
    """Raise unless two numbers agree."""
    if not abs(got - expected) <= tolerance * max(1.0, abs(expected)):
        raise LawError(f"{law}: the numbers disagree.", expected=repr(expected), got=repr(got))
