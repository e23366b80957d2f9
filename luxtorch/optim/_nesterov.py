"""Gradient descent with Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _fused, _in_place
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class Nesterov(LeafwiseRule):
    """Step along the velocity that momentum will have: `v = momentum * v + g`, then `p - lr * (g + momentum * v)`.

    The learning rate multiplies the whole step, as in `torch.optim.SGD`. Optimisers.jl puts it into the velocity;
    as long as it is constant the two agree.

    Args:
        lr: The learning rate.
        momentum: How much of the velocity is kept.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.zeros(1), torch.ones(1)
        >>> opt_state = optim.setup(optim.Nesterov(lr=0.1, momentum=0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-0.1500])

    The numbers are those of `torch.optim.SGD(nesterov=True)`; name and defaults are those of Optimisers.jl.
    """

    lr: Number = 0.001
    momentum: Number = 0.9

    kernel = staticmethod(_fused.nesterov)
    in_place = staticmethod(_in_place.nesterov)

    def slots(self, p: Tensor) -> Slots:
        return {"velocity": torch.zeros_like(p)}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        velocity = h["momentum"] * slots["velocity"] + g
        return -h["lr"] * (g + h["momentum"] * velocity), {"velocity": velocity}
