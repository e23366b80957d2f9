"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _fused, _in_place
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class Momentum(LeafwiseRule):
    """Step along a decaying sum of the gradients: `v = momentum * v + g`, then `p - lr * v`.

    The learning rate multiplies the whole velocity, as in `torch.optim.SGD`: adjusting it takes effect at once.
    Optimisers.jl puts it into the velocity; as long as it is constant the two agree.

    Args:
        lr: The learning rate.
        momentum: How much of the velocity is kept.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.zeros(1), torch.ones(1)
        >>> opt_state = optim.setup(optim.Momentum(lr=0.1, momentum=0.5), p)
        >>> for _ in range(2):
        ...     opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-0.2500])

    The numbers are those of `torch.optim.SGD`; name and defaults are those of Optimisers.jl.
    """

    lr: Number = 0.01
    momentum: Number = 0.9

    kernel = staticmethod(_fused.momentum)
    in_place = staticmethod(_in_place.momentum)

    def slots(self, p: Tensor) -> Slots:
        return {"velocity": torch.zeros_like(p)}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        velocity = h["momentum"] * slots["velocity"] + g
        return -h["lr"] * velocity, {"velocity": velocity}
