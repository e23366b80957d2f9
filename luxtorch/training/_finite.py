"""Leaving out steps that are not finite, without a look at any number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch import random
from luxtorch.core import InputError, tensors, tree_flatten, tree_unflatten


def all_finite(*trees: Any) -> Tensor:
    """Return whether all numbers of some trees are finite, as a 0-d boolean tensor."""
    found = [torch.isfinite(tensor).all() for tree in trees for tensor in tensors(tree)]
    return torch.stack(found).all() if found else torch.tensor(True)


def select(ok: Tensor, new: Any, old: Any) -> Any:
    """Return the new tree where `ok` is true and the old one elsewhere, without a branch on the tensor."""
    after, spec = tree_flatten(new)
    before, old_spec = tree_flatten(old)
    if spec != old_spec:
        raise InputError(
            "A step that may be skipped must keep the structure of the states.",
            expected=str(old_spec),
            got=str(spec),
            fix="Start from states that are made by one call of the model, or leave skip_nonfinite=True out.",
        )
    chosen = [b if a is b else _chosen(ok.to(a.device), a, b) for a, b in zip(after, before, strict=True)]
    return tree_unflatten(chosen, spec)


def _chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return random.where(ok, new, old) if new.dtype == old.dtype == torch.uint64 else torch.where(ok, new, old)
