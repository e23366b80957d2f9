"""Lion."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _foreach
from ._formula import sign, zeros
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class Lion(LeafwiseRule):
    """Step by the learning rate along the sign of an average, and shrink the parameters apart from that.

    Args:
        lr: The learning rate: the length of each step.
        betas: How much of the average counts in the step, and how much of it is kept.
        weight_decay: How much the parameters shrink, relative to the learning rate.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(3)
        >>> opt_state = optim.setup(optim.Lion(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0, 0.0]))
        >>> p
        tensor([-0.5000,  0.5000,  0.0000])

    Chen et al., "Symbolic discovery of optimization algorithms", 2023, with the paper's defaults. Optimisers.jl
    keeps `1 - betas[1]` of the average.
    """

    lr: Number = 0.0001
    betas: Numbers = (0.9, 0.99)
    weight_decay: Number = 0.0

    needs_params = True
    kernel = staticmethod(_foreach.lion)

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "exp_avg")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        beta1, beta2 = h["betas"]
        exp_avg = slots["exp_avg"]
        direction = sign(beta1 * exp_avg + (1 - beta1) * g)
        return -h["lr"] * (direction + h["weight_decay"] * p), {"exp_avg": beta2 * exp_avg + (1 - beta2) * g}
