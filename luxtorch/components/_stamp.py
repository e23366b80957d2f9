"""Telling whether views that were made of a tensor earlier can still stand for it."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import get_unwrapped, is_wrapped, level_of, unwrap_for_grad, version_of

# What torch reports as the level of a tensor whose transform has ended.
_ENDED = -2


# The tensor, one of its views, the tensor's version, whether autograd recorded, and whether a transform owns the view.
Stamp: TypeAlias = "tuple[Tensor, Tensor, int, bool, bool]"


def take_stamp(tensor: Tensor, view: Tensor, recorded: bool | None = None) -> Stamp:
    """Return what has to be known later about views made just now; `recorded` is whether autograd recorded that."""
    # Only where autograd records does a later change of the tensor matter; an inference tensor has no version at all.
    version = version_of(tensor) if tensor.requires_grad else -1
    return (
        tensor,
        view,
        version,
        torch.is_grad_enabled() if recorded is None else recorded,
        is_wrapped(view),
    )


def is_stale(stamp: Stamp) -> bool:
    """Return whether the views have to be made again.

    They have to if autograd records now and did not then, if the tensor was changed in place (autograd refuses the
    views of one split after that), or if they were made in a transform of torch.func that has ended.
    """
    tensor, view, version, recorded, in_transform = stamp
    if tensor.requires_grad and (version_of(tensor) != version or (torch.is_grad_enabled() and not recorded)):
        return True
    return in_transform and level_of(view) == _ENDED


def narrowed(whole: Tensor, start: int, size: int) -> Tensor:
    """Return a part of the last dimension, as the transforms know it that know the whole.

    Whatever transform is running wraps what is made in it, also if it knows nothing of the whole. But a transform that
    is to differentiate by a part takes it as a value from outside.
    """
    part, level = whole.narrow(-1, start, size), level_of(whole)
    while level_of(part) > level:
        part = get_unwrapped(part)
    return part


def narrowed_in_trace(whole: Tensor, start: int, size: int, depth: int) -> Tensor:
    """Return the same where torch.compile traces, `depth` transforms deep, and the whole comes from outside."""
    part = whole.narrow(-1, start, size)
    for level in range(depth, 0, -1):
        part = unwrap_for_grad(part, level)
    return part
