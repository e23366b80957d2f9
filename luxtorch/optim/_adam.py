"""Adam."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _fused, _in_place
from ._formula import counted, sqrt
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class Adam(LeafwiseRule):
    """Scale each step by running averages of the gradient and of its square.

    Args:
        lr: The learning rate.
        betas: How much of the two averages is kept.
        eps: Added to the root of the second average.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2)}
        >>> opt_state = optim.setup(optim.Adam(0.5), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.tensor([1.0, -100.0])})
        >>> ps
        {'weight': tensor([-0.5000,  0.5000])}

    Kingma and Ba, "Adam: a method for stochastic optimization", 2015. The numbers are those of `torch.optim.Adam`.
    """

    lr: Number = 0.001
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-8

    kernel = staticmethod(_fused.adam)
    in_place = staticmethod(_in_place.adam)

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(g, slots, h)
        return -h["lr"] * direction, slots


def adam_slots(p: Tensor) -> Slots:
    """Return the step count and the two averages of a parameter before the first step."""
    return counted(p, "exp_avg", "exp_avg_sq")


def adam_direction(g: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
    """Return the direction of an Adam step, to be multiplied by the learning rate, and the new slots."""
    new, (filled1, filled2) = adam_averages(g, slots, h)
    return new["exp_avg"] / filled1 / (sqrt(new["exp_avg_sq"]) / filled2.sqrt() + h["eps"]), new


def adam_averages(g: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Slots, Tensor]:
    """Return the new step count and averages, and by how much each average is filled."""
    step, filled = advance(slots["step"], h["betas"])
    beta1, beta2 = h["betas"]
    exp_avg = slots["exp_avg"] + (1 - beta1) * (g - slots["exp_avg"])
    exp_avg_sq = beta2 * slots["exp_avg_sq"] + (1 - beta2) * g * g
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, filled


def advance(step: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next step count, and by how much the averages, once zero, are filled then."""
    step = step + 1
    # 1 - betas**step, written so that inductor computes both once, and not anew for each element: three times as fast.
    return step, 1 - torch.exp(step.to(betas.dtype) * betas.log())
