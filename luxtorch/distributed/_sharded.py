"""Sharded parameters, of which every rank holds a part: to shard them, and to gather them for a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from luxtorch._transforms import transformed
from luxtorch.core import (
    InputError,
    Layer,
    Parameters,
    States,
    WrapperLayer,
    described,
    tree_flatten,
    tree_map,
    tree_unflatten,
    wrong_shape,
)
from luxtorch.core._sharded import is_sharded, sharded_part

from ._world import collective, world_size

T = TypeVar("T")


def shard_parameters(ps: T, mesh: DeviceMesh | None = None) -> T:
    """Return parameters of which every rank holds a part: tensors become `DTensor`s, split along their first dimension.

    A ComponentVector is one flat tensor, so that its parts are of equal size, one element more or less. A rule that is
    set up with sharded parameters has a sharded state, and its step is one of the rank's own part: memory and work of
    the optimizer are divided by the number of ranks. All rules of `luxtorch.optim` give the numbers that they give
    without shards; norms are those of whole gradients. Rules that need the shapes of components, such as LAMB, Muon
    and Adafactor, put a ComponentVector together again: give them a dict.

    Printing a sharded ComponentVector gathers it, which all ranks have to do together.

    Args:
        ps: The parameters: any tree. The values are those of the mesh's first rank, whatever the others have. They may
            be on the CPU where the mesh is one of GPUs. What is not a floating point tensor is kept.
        mesh: Over which ranks; by default all of them. Of a mesh of several dimensions, the last one shards, and the
            others hold copies.

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Raises:
        InputError: Inside of a transform or a compiled function.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import distributed, optim
        >>> distributed.initialize()
        >>> model = lt.Dense(2, 3)
        >>> ps, st = lt.setup(0, model)
        >>> ps = distributed.shard_parameters(lt.ComponentVector(ps))
        >>> opt_state = optim.setup(optim.Adam(0.1), ps)
        >>> grads = lt.gradient(lambda ps: model(torch.ones(4, 2), distributed.gather_parameters(ps), st)[0].sum(), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, grads)

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.
    """
    if transformed():
        raise InputError(
            "shard_parameters must be called outside of transforms and compiled functions.",
            fix="Call shard_parameters once, before training.",
        )
    if world_size() == 1:
        return ps

    def shard(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        where = mesh or (leaf.device_mesh if isinstance(leaf, DTensor) else _all_ranks(leaf.device.type))
        placements: list[Placement] = [Replicate()] * where.ndim
        if leaf.ndim > 0:
            placements[-1] = Shard(0)
        if isinstance(leaf, DTensor):
            return leaf.redistribute(placements=placements)
        return distribute_tensor(leaf.detach(), where, placements)

    with collective("sharding"):
        sharded: T = tree_map(shard, ps)
    return sharded


@lru_cache(maxsize=4)
def _mesh_of(device_type: str, group: dist.ProcessGroup | None) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(group),))


def _all_ranks(device_type: str) -> DeviceMesh:
    return _mesh_of(device_type, dist.group.WORLD)


def gather_parameters(ps: T) -> T:
    """Return whole parameters from sharded ones: an all-gather of each tensor, a single one for a ComponentVector.

    The derivative is the mean of the ranks' gradients, sharded: one reduce-scatter. So an objective that begins with
    it can be given to `lt.gradient` or to a training step, with the sharded parameters.

    Args:
        ps: The parameters. What is not sharded is kept; its gradients are for `average_gradients`.

    Returns:
        A tree of the same structure with plain tensors.

    Raises:
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import distributed, optim, training
        >>> def objective(model, ps, st, data):
        ...     return lt.MSELoss()(model, distributed.gather_parameters(ps), st, data)
        >>> model = lt.Dense(2, 3)
        >>> ps, st = lt.setup(0, model)
        >>> ps = distributed.shard_parameters(lt.ComponentVector(ps))
        >>> ts = training.TrainState(model, ps, st, optim.Adam(0.1))
        >>> data = distributed.shard_data((torch.ones(4, 2), torch.zeros(4, 3)))
        >>> grads, loss, stats, ts = training.single_train_step(objective, data, ts)
    """
    whole: T = tree_map(lambda leaf: _gather(leaf) if is_sharded(leaf) else leaf, ps)
    return whole


def scatter_gradients(grads: T, ps: Any) -> T:
    """Return the mean of the gradients of all ranks, sharded like the parameters: a reduce-scatter of each tensor.

    It is for gradients with respect to gathered parameters. With `gather_parameters` inside of the objective, there is
    nothing left to do.

    Args:
        grads: The gradients: a tree like the parameters, of plain tensors. None is kept.
        ps: The sharded parameters. Where they are not sharded, the gradients are kept.

    Returns:
        A tree of the same structure as the gradients.

    Raises:
        InputError: If the gradients have another structure than the parameters, or another shape.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps = distributed.shard_parameters(lt.ComponentVector({"weight": torch.ones(4)}))
        >>> grads = lt.gradient(lambda ps: ps.weight.sum(), distributed.gather_parameters(ps))
        >>> grads = distributed.scatter_gradients(grads, ps)
    """
    leaves, spec = tree_flatten(grads)
    like, like_spec = tree_flatten(ps)
    if spec != like_spec:
        raise InputError(
            "The gradients must have the structure of the parameters.",
            expected=f"{like_spec!s:.300}",
            got=f"{spec!s:.300}",
            fix="Differentiate with respect to gather_parameters(ps).",
        )
    scattered: T = tree_unflatten([_scattered(g, p) for g, p in zip(leaves, like, strict=True)], spec)
    return scattered


def _scattered(grad: Any, p: Any) -> Any:
    if not is_sharded(p) or is_sharded(grad) or not isinstance(grad, Tensor):
        return grad
    if grad.shape != p.shape:
        raise wrong_shape("A gradient", grad, f"{tuple(p.shape)}, that of its parameter")
    shards = sharded_part(p)
    assert isinstance(shards, DTensor)
    return _scatter_mean(grad, shards.device_mesh, shards.placements)


class Gathered(WrapperLayer):
    """Call a layer with sharded parameters, which are gathered for the call.

    In a model of such layers only one is whole at a time, and a model that does not fit on one device can be trained.
    The backward pass needs the whole parameters again: in `lt.Checkpointed(Gathered(layer))` they are gathered again
    for it, otherwise they are kept. With a ComponentVector for each layer, a call is one all-gather.

    Args:
        layer: The layer.

    Parameters:
        Those of the layer, sharded by `shard_parameters`; whole ones are used as they are.

    States:
        Those of the layer.

    Shape:
        That of the layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import distributed
        >>> block = lt.Checkpointed(distributed.Gathered(lt.Dense(8, 8, torch.tanh)))
        >>> model = lt.Chain(block, block)
        >>> ps, st = lt.setup(0, model)
        >>> ps = distributed.shard_parameters({name: lt.ComponentVector(part) for name, part in ps.items()})
        >>> y, st = model(torch.ones(2, 8), ps, st)
        >>> y.shape
        torch.Size([2, 8])

    Source: `torch.distributed.fsdp.fully_shard`; stage 3 of Rajbhandari et al., "ZeRO", 2020.
    """

    layer: Layer

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output and the state of the layer."""
        return self.layer(x, gather_parameters(ps), st)


# All-gather and reduce-scatter of a tensor with their derivatives.


def _gather(shards: Tensor) -> Tensor:
    """Return the whole tensor: an all-gather, whose derivative is `_scatter_mean`."""
    whole: Tensor = (_TracedGather if is_compiling() else _Gather).apply(shards)
    return whole


def _scatter_mean(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Return the mean of the ranks' tensors, sharded: a reduce-scatter."""
    shards: Tensor = (_TracedScatterMean if is_compiling() else _ScatterMean).apply(whole, mesh, tuple(placements))
    return shards


class _TracedGather(torch.autograd.Function):
    @staticmethod
    def forward(shards: Tensor) -> Tensor:
        if not isinstance(shards, DTensor):
            fix = "Take derivatives in reverse mode; make single directions by shard_parameters."
            problem = "A tangent of sharded parameters must be sharded like the parameters."
            raise InputError(problem, got=described(shards), fix=fix)
        with collective("all-gather"):
            return shards.full_tensor()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        shards = sharded_part(inputs[0])
        assert isinstance(shards, DTensor)
        ctx.place = shards.device_mesh, shards.placements

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _scatter_mean(grad, *ctx.place)


class _Gather(_TracedGather):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _gather(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], shards: Tensor) -> tuple[Tensor, int | None]:
        return _gather(shards), in_dims[0]


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
        # The derivative on a rank is its share of the mean over all ranks, and the mean is taken in `_Gather`.
        return _gather(grad), None, None


class _ScatterMean(_TracedScatterMean):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, mesh: None, placements: None) -> Tensor:
        return _scatter_mean(tangent, *ctx.place)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]
    ) -> tuple[Tensor, int]:
        # The split dimension moves by one if the batch dimension is in front of it.
        batch = in_dims[0]
        moved = [Shard(p.dim + (batch <= p.dim)) if isinstance(p, Shard) else p for p in placements]
        return _scatter_mean(whole, mesh, moved), batch
