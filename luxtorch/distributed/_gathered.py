"""A layer whose parameters are put together while it is called."""

from __future__ import annotations

from typing import Any

from luxtorch.core import Layer, Parameters, States, WrapperLayer

from ._sharded import gather_parameters


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
