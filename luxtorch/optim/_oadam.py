"""Optimistic Adam."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _foreach
from ._adam import adam_direction
from ._formula import counted
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class OAdam(LeafwiseRule):
    """Take Adam steps twice, and take back the one before: for games, in which plain steps go round in circles.

    The learning rate multiplies the step that is taken back too: adjusting it takes effect at once. Optimisers.jl
    takes back the step that was taken; as long as the learning rate is constant the two agree.

    Args:
        lr, betas, eps: As for `Adam`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.OAdam(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-1.,  1.])

    Daskalakis, Ilyas, Syrgkanis and Zeng, "Training GANs with optimism", 2018. Name and defaults are those of
    Optimisers.jl.
    """

    lr: Number = 0.001
    betas: Numbers = (0.5, 0.9)
    eps: Number = 1e-8

    kernel = staticmethod(_foreach.oadam)

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_sq", "direction")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, new = adam_direction(g, slots, h)
        return -h["lr"] * (2 * direction - slots["direction"]), {**new, "direction": direction}
