"""Rprop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._formula import sign, zeros
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class Rprop(LeafwiseRule):
    """Step by the sign of the gradient alone, each element with a step size that follows how often the sign changes.

    For gradients of the whole data: noise changes signs.

    Args:
        lr: The first step size of all elements. To adjust it later has no effect.
        etas: The factors of a step size when the sign has changed and when it has not.
        step_sizes: The least and the greatest step size.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.Rprop(0.5), p)
        >>> for g in (torch.tensor([1.0, 1.0]), torch.tensor([100.0, -1.0])):
        ...     opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-1.1000, -0.5000])

    Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993.
    The numbers and defaults are those of `torch.optim.Rprop`.
    """

    lr: Number = 0.01
    etas: Numbers = (0.5, 1.2)
    step_sizes: Numbers = (1e-6, 50.0)

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "prev", "step_size")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        shrink, grow = h["etas"]
        least, greatest = h["step_sizes"]
        agreement = g * slots["prev"]
        turned = agreement < 0
        # A step size is never zero once it is set.
        size = torch.where(slots["step_size"] == 0, h["lr"], slots["step_size"])
        size = torch.where(turned, shrink * size, torch.where(agreement > 0, grow * size, size))
        size = torch.minimum(torch.maximum(size, least), greatest)
        # After a turn the element waits for a step, and forgets the sign.
        g = torch.where(turned, 0.0, g)
        return -sign(g) * size, {"prev": g, "step_size": size}
