"""From the shards of a tensor to the whole of it, and back; both know how they are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from luxtorch._transforms import unwrapped
from luxtorch.core import InputError

from ._failure import collective


def innermost(tensor: Tensor) -> Tensor:
    """Return what the transforms of torch.func have wrapped; in a trace nothing is wrapped."""
    return tensor if is_compiling() else unwrapped(tensor)


def is_sharded(leaf: Any) -> bool:
    """Return whether a leaf is a tensor of which every rank has a part."""
    return isinstance(leaf, Tensor) and isinstance(innermost(leaf), DTensor)


def gather(shards: Tensor) -> Tensor:
    """Return the whole tensor: an all-gather, whose derivative is `scatter_mean`."""
    whole: Tensor = (_TracedGather if is_compiling() else _Gather).apply(shards)
    return whole


def scatter_mean(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Return the mean of the ranks' tensors, sharded: a reduce-scatter."""
    shards: Tensor = (_TracedScatterMean if is_compiling() else _ScatterMean).apply(whole, mesh, tuple(placements))
    return shards


class _TracedGather(torch.autograd.Function):
    @staticmethod
    def forward(shards: Tensor) -> Tensor:
        if not isinstance(shards, DTensor):
            raise InputError(
                "A direction of sharded parameters is not sharded.",
                expected="a tangent that is sharded like the parameters",
                got=f"a plain tensor of shape {tuple(shards.shape)}",
                fix="Take derivatives in reverse mode; make single directions by shard_parameters.",
            )
        with collective("all-gather"):
            return shards.full_tensor()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        shards = innermost(inputs[0])
        assert isinstance(shards, DTensor)
        ctx.place = shards.device_mesh, shards.placements

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return scatter_mean(grad, *ctx.place)


class _Gather(_TracedGather):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return gather(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], shards: Tensor) -> tuple[Tensor, int | None]:
        return gather(shards), in_dims[0]


class _TracedScatterMean(torch.autograd.Function):
    @staticmethod
    def forward(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
        part = DTensor.from_local(whole / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
        with collective("reduce-scatter"):
            return part.redistribute(placements=placements)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, DeviceMesh, tuple[Placement, ...]], output: Tensor) -> None:
        ctx.place = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A rank's derivative stands for its share of the mean of all ranks, and the mean is taken in `_Gather`.
        return gather(grad), None, None


class _ScatterMean(_TracedScatterMean):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, mesh: None, placements: None) -> Tensor:
        return scatter_mean(tangent, *ctx.place)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]
    ) -> tuple[Tensor, int]:
        # What is split is one dimension further behind where the batch has come in front of it.
        batch = in_dims[0]
        moved = [Shard(p.dim + (batch <= p.dim)) if isinstance(p, Shard) else p for p in placements]
        return scatter_mean(whole, mesh, moved), batch
