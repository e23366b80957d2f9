"""Parameters of which every rank holds a part."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, tree_flatten, tree_map, tree_unflatten

from ._failure import collective
from ._sharded_tensor import gather, innermost, is_sharded, scatter_mean
from ._world import world_size


def shard_parameters(ps: Any, mesh: DeviceMesh | None = None) -> Any:
    """Return parameters of which every rank holds a part: tensors become `DTensor`s, split along their first dimension.

    A ComponentVector is one flat tensor, so that its parts are of equal size, one element more or less. A rule that is
    set up with sharded parameters has a sharded state, and its step is one of the rank's own part: memory and work of
    the optimizer are divided by the number of ranks. All rules of `luxtorch.optim` give the numbers that they give
    without shards; norms are those of whole gradients. Rules that need the shapes of components, such as LAMB, Muon
    and Adafactor, put a ComponentVector together again: give them a dict.

    Printing a sharded ComponentVector gathers it, which all ranks have to do together.

    Args:
        ps: The parameters: any tree. The values are those of the mesh's first rank, whatever the others have. They may
            be on the CPU where the mesh is one of GPUs. What is no floating point tensor is kept.
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
            "Parameters cannot be sharded inside of a transform or a compiled function.",
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
        return tree_map(shard, ps)


@lru_cache(maxsize=4)
def _mesh_of(device_type: str, group: Any) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(group),))


def _all_ranks(device_type: str) -> DeviceMesh:
    return _mesh_of(device_type, dist.group.WORLD)


def gather_parameters(ps: Any) -> Any:
    """Return whole parameters from sharded ones: an all-gather of each tensor, of a ComponentVector one in all.

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
    return tree_map(lambda leaf: gather(leaf) if is_sharded(leaf) else leaf, ps)


def scatter_gradients(grads: Any, ps: Any) -> Any:
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
            "The gradients have another structure than the parameters.",
            expected=f"{like_spec!s:.300}",
            got=f"{spec!s:.300}",
            fix="Differentiate with respect to gather_parameters(ps).",
        )
    return tree_unflatten([_scattered(g, p) for g, p in zip(leaves, like, strict=True)], spec)


def _scattered(grad: Any, p: Any) -> Any:
    if not is_sharded(p) or is_sharded(grad) or not isinstance(grad, Tensor):
        return grad
    if grad.shape != p.shape:
        raise InputError(
            "A gradient has another shape than its parameter.", expected=str(tuple(p.shape)), got=str(tuple(grad.shape))
        )
    shards = innermost(p)
    assert isinstance(shards, DTensor)
    return scatter_mean(grad, shards.device_mesh, shards.placements)
