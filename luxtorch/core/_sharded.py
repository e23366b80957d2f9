"""Sharded tensors, of which every rank holds a part, where plain ones meet them; torch.distributed loads late."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from luxtorch._torch import replicated
from luxtorch._transforms import unwrapped, vmap_levels


def sharded_part(value: object) -> Tensor | None:
    """Return the `DTensor` that a value is, inside of the wrappers of torch.func; None if it is another thing."""
    module = sys.modules.get("torch.distributed.tensor")  # what is not loaded has made no tensor
    if module is None or not isinstance(value, Tensor):
        return None
    inner = value if torch.compiler.is_compiling() else unwrapped(value)
    return inner if isinstance(inner, module.DTensor) else None


def is_sharded(value: object) -> bool:
    """Return whether a value is a tensor of which every rank has a part."""
    return sharded_part(value) is not None


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that is the same on every rank in a form that can meet another, which may be sharded.

    torch refuses to compute with plain and sharded tensors together, as it cannot know whether the plain ones are the
    same on all ranks. Those that a layer makes itself are: masks, positions, weights of classes.
    """
    sharded = sharded_part(other)
    if sharded is None or is_sharded(tensor) or vmap_levels(tensor):
        return tensor
    # It is wrapped by the transforms at work, although it has no derivative.
    return replicated(unwrapped(tensor), sharded.device_mesh)  # type: ignore[attr-defined]


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the places of another, if both are sharded.

    A gradient is where the last operator of the backward pass has put it, often as a sum that is not taken yet; a
    parameter that steps by it would be there too.
    """
    if not (is_sharded(tensor) and is_sharded(other)) or tensor.placements == other.placements:  # type: ignore[attr-defined]
        return tensor
    return tensor.redistribute(placements=other.placements)  # type: ignore[attr-defined, no-any-return]
