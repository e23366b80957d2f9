"""Sharded tensors, of which every rank holds a part, where plain ones meet them; torch.distributed loads late."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    unsplit,
)
from luxtorch._transforms import unwrapped, vmap_levels

from ._tree import map_tensors

_MODULE = "torch.distributed.tensor"


def sharded_part(value: object) -> Any:
    """Return the `DTensor` that a value is, inside of the wrappers of torch.func; None if it is another thing."""
    module = sys.modules.get(_MODULE)  # what is not loaded has made no tensor
    if module is None or not isinstance(value, Tensor):
        return None
    if torch.compiler.is_compiling():
        return value if isinstance(value, module.DTensor) else None
    if type(value) is Tensor and not is_wrapped(value):  # as nearly always: each layer asks
        return None
    inner = unwrapped(value)
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
        from torch.distributed.tensor import Replicate

        return unsplit(tensor, mesh, [Replicate()] * mesh.ndim)
    # It has no derivative, though it is wrapped where one is taken; of wrappers, only those of vmap stay.
    inner = _replicated(get_unwrapped(tensor), mesh)
    return add_batch_dim(inner, batch_dim_of(tensor), level_of(tensor)) if is_batched(tensor) else inner


def own_rows(x: Tensor) -> tuple[int, int] | None:
    """Return the first row that this rank has of a tensor, and how many; None if it is not split by rows alone."""
    sharded = sharded_part(x)
    if sharded is None or sharded.ndim != x.ndim or vmap_levels(x):
        return None
    split = [axis for axis, place in enumerate(sharded.placements) if not place.is_replicate()]
    if len(split) != 1 or not sharded.placements[split[0]].is_shard(0):
        return None
    ranks, own = sharded.device_mesh.size(split[0]), sharded.device_mesh.get_local_rank(split[0])
    most = -(-x.shape[0] // ranks)
    return min(own * most, x.shape[0]), int(sharded._local_tensor.shape[0])


def rows_beside(rows: Tensor, other: Tensor) -> Tensor:
    """Return this rank's rows of a tensor as a tensor that is split like another; see `own_rows`."""
    sharded, rows = sharded_part(other), unwrapped(rows)
    return unsplit(rows, sharded.device_mesh, sharded.placements, (other.shape[0], *rows.shape[1:]))


def placed_like(gradients: Sequence[Any], parameters: Sequence[Tensor]) -> list[Any]:
    """Return gradients in the places of their parameters, where both are sharded.

    A gradient is where the last operator of the backward pass has put it, often as a sum over ranks that is not taken
    yet; a parameter that steps by it would be there too. Sums over the same ranks travel together.
    """
    placed, together = list(gradients), defaultdict[Any, list[int]](list)
    if not any_sharded(parameters):
        return placed
    from torch.distributed.tensor import Replicate

    for i, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        came, wanted = sharded_part(gradient), sharded_part(parameter)
        if came is None or wanted is None or came.placements == wanted.placements:
            continue
        pairs = list(zip(came.placements, wanted.placements, strict=True))
        only_sums = all(a == b or (a.is_partial() and b.is_replicate()) for a, b in pairs)
        recorded = came is not gradient or (bool(came.requires_grad) and torch.is_grad_enabled())
        if recorded or not only_sums:
            placed[i] = gradient.redistribute(placements=wanted.placements)
        else:
            sums = tuple(a if a.is_partial() else Replicate() for a, _ in pairs)  # of one dimension: each rank has all
            together[came.device_mesh, sums, came.dtype].append(i)
    for (mesh, sums, _), members in together.items():
        parts = [own_part(placed[i]) for i in members]
        flat: Any = unsplit(torch.cat([part.reshape(-1) for part in parts]), mesh, sums)
        total = own_part(flat.redistribute(placements=[Replicate()] * mesh.ndim))
        for i, part, summed in zip(members, parts, total.split([part.numel() for part in parts]), strict=True):
            placed[i] = around(summed.view(part.shape), sharded_part(parameters[i])._spec)
    return placed


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of some tensors is sharded, and neither wrapped by a transform nor traced by torch.compile."""
    if _MODULE not in sys.modules or torch.compiler.is_compiling():
        return False
    return any(sharded_part(tensor) is tensor for tensor in tensors)


def own_parts(tree: Any) -> Any:
    """Return a tree with this rank's parts of sharded tensors, with their derivatives."""
    return map_tensors(own_part, tree)


def own_part(tensor: Any) -> Any:
    """Return this rank's part of a sharded tensor, with its derivative; others, and wrapped ones, as they are."""
    sharded = sharded_part(tensor)
    if sharded is None or sharded is not tensor:
        return tensor
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    part: Any = sharded.to_local(grad_placements=sharded.placements) if recorded else sharded._local_tensor
    return part.wait() if hasattr(part, "wait") else part


def everywhere(true: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Return whether a boolean is true on all ranks that some tensors are shared by: one all-reduce."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = next(tensor for tensor in tensors if sharded_part(tensor) is tensor).device_mesh
    least: Any = DTensor.from_local(true.to(torch.uint8), mesh, [Partial("min")] * mesh.ndim, run_check=False)
    return least.full_tensor() > 0  # type: ignore[no-any-return]


def sharded_as(whole: Any, part: Tensor) -> Tensor:
    """Return this rank's new part in the form of a tensor, which may be sharded."""
    sharded = sharded_part(whole)
    if sharded is None or sharded is not whole or is_sharded(part):
        return part
    return with_spec(part, sharded._spec)


def with_spec(part: Tensor, spec: Any) -> Tensor:
    """Return the sharded tensor with this part on this rank, with its derivative."""
    if not (part.requires_grad and torch.is_grad_enabled()):
        return around(part, spec)
    from torch.distributed.tensor import DTensor

    layout = {"shape": spec.shape, "stride": spec.stride}
    return DTensor.from_local(part, spec.mesh, spec.placements, run_check=False, **layout)


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
    if sharded is None or torch.compiler.is_compiling():
        return y
    from torch.distributed.tensor import Replicate

    split = -1 if gather is None else sharded.ndim + gather
    placements = [Replicate() if place.is_partial() or place.is_shard(split) else place for place in sharded.placements]
    result: Tensor = _Settled.apply(y, placements)
    return result


class _Settled(torch.autograd.Function):
    """Take the sums over ranks, forward and backward; as to its numbers, it is the identity."""

    @staticmethod
    def forward(y: Any, placements: Any) -> Tensor:
        return y.view_as(y) if y.placements == tuple(placements) else y.redistribute(placements=placements)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        pairs = list(zip(sharded_part(inputs[0]).placements, sharded_part(output).placements, strict=True))
        # A sum has no place to go back to; what was gathered is split again.
        ctx.placements = [after if before.is_partial() else before for before, after in pairs]
        ctx.gathered = any(before != after and not before.is_partial() for before, after in pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sharded = sharded_part(grad)
        sums = sharded is not None and any(place.is_partial() for place in sharded.placements)
        again = sharded is not None and (sums or ctx.gathered)
        return (_Settled.apply(grad, ctx.placements) if again else grad), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], y: Tensor, placements: Any) -> tuple[Tensor, int]:
        return _Settled.apply(y, placements), in_dims[0]
