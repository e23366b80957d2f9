"""Sharded tensors, of which every rank holds a part, where plain ones meet them; torch.distributed loads late."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import (
    add_batch_dim,
    around,
    batch_dim_of,
    get_unwrapped,
    is_batched,
    is_wrapped,
    level_of,
    replicated,
)
from luxtorch._transforms import unwrapped

from ._tree import map_tensors

_MODULE = "torch.distributed.tensor"


def sharded_part(value: object) -> Any:
    """Return the `DTensor` that a value is, inside of the wrappers of torch.func; None if it is another thing."""
    module = sys.modules.get(_MODULE)  # what is not loaded has made no tensor
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
    if sharded is None or is_sharded(tensor):
        return tensor
    return _replicated(tensor, sharded.device_mesh)


def _replicated(tensor: Tensor, mesh: Any) -> Tensor:
    if not is_wrapped(tensor):
        return replicated(tensor, mesh)
    # It has no derivative, though it is wrapped where one is taken; of wrappers, only those of vmap stay.
    inner = _replicated(get_unwrapped(tensor), mesh)
    return add_batch_dim(inner, batch_dim_of(tensor), level_of(tensor)) if is_batched(tensor) else inner


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the places of another, if both are sharded.

    A gradient is where the last operator of the backward pass has put it, often as a sum that is not taken yet; a
    parameter that steps by it would be there too.
    """
    came, wanted = sharded_part(tensor), sharded_part(other)
    if came is None or wanted is None or came.placements == wanted.placements:
        return tensor
    return tensor.redistribute(placements=wanted.placements)  # type: ignore[attr-defined, no-any-return]


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of some tensors is sharded, and not wrapped by a transform."""
    return _MODULE in sys.modules and any(sharded_part(tensor) is tensor for tensor in tensors)


def own_parts(tree: Any) -> Any:
    """Return a tree with this rank's parts of sharded tensors, with their derivatives."""
    return map_tensors(_own_part, tree)


def _own_part(tensor: Any) -> Any:
    sharded = sharded_part(tensor)
    if sharded is None or sharded is not tensor:
        return tensor
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    part: Any = sharded.to_local(grad_placements=sharded.placements) if recorded else sharded._local_tensor
    return part.wait() if hasattr(part, "wait") else part


def sharded_as(whole: Any, part: Tensor) -> Tensor:
    """Return this rank's new part in the form of a tensor, which may be sharded."""
    sharded = sharded_part(whole)
    if sharded is None or sharded is not whole or is_sharded(part):
        return part
    if not (part.requires_grad and torch.is_grad_enabled()):
        return around(part, sharded._spec)
    layout = {"shape": sharded.shape, "stride": sharded.stride()}
    return type(sharded).from_local(part, sharded.device_mesh, sharded.placements, run_check=False, **layout)  # type: ignore[no-any-return]


def settled(y: Tensor, gather: int | None = None) -> Tensor:
    """Return what a layer has computed with the sums over ranks taken, and see that those of its gradient are.

    Left alone, a sum would wait for an operator that needs it. That may be a product with a whole weight, which torch
    then splits by samples, so that the weights travel. Gradients by all users of `y` are added before they are summed
    over ranks: once.

    Args:
        y: The output.
        gather: A dimension that is not to be split, from the end.
    """
    sharded = sharded_part(y)
    if sharded is None:
        return y
    from torch.distributed.tensor import Replicate

    split = -1 if gather is None else sharded.ndim + gather
    placements = [Replicate() if place.is_partial() or place.is_shard(split) else place for place in sharded.placements]
    if torch.compiler.is_compiling():
        return y.redistribute(placements=placements)  # type: ignore[attr-defined, no-any-return]
    result: Tensor = _Settled.apply(y, placements)
    return result


class _Settled(torch.autograd.Function):
    """Take the sums over ranks, forward and backward; as to its numbers, it is the identity."""

    @staticmethod
    def forward(y: Any, placements: Any) -> Tensor:
        return y.view_as(y) if y.placements == tuple(placements) else y.redistribute(placements=placements)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        sharded = sharded_part(output)
        ctx.placements = sharded.placements

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sharded = sharded_part(grad)
        unsettled = sharded is not None and any(place.is_partial() for place in sharded.placements)
        return (_Settled.apply(grad, ctx.placements) if unsettled else grad), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], y: Tensor, placements: Any) -> tuple[Tensor, int]:
        return _Settled.apply(y, placements), in_dims[0]
