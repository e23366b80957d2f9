"""Adam."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _fused
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

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(g, slots, h)
        return -h["lr"] * direction, slots


def adam_slots(p: Tensor) -> Slots:
    """Return the step count and the two averages of a parameter before the first step."""
    # The step count is what the fused kernels take: float32, beside the parameter. It is exact up to 2**24 steps.
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def adam_direction(g: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
    """Return the direction of an Adam step, to be multiplied by the learning rate, and the new slots."""
    step = slots["step"] + 1
    betas = h["betas"].to(step.device, non_blocking=True)  # two numbers on the CPU could not meet a step on a GPU
    beta1, beta2 = betas
    exp_avg = slots["exp_avg"] + (1 - beta1) * (g - slots["exp_avg"])
    exp_avg_sq = beta2 * slots["exp_avg_sq"] + (1 - beta2) * g * g
    # betas**step, written so that inductor computes both once, and not anew for each element: three times as fast.
    powers = torch.exp(step.to(betas.dtype) * betas.log())
    correction1, correction2 = 1 - powers
    direction = exp_avg / correction1 / (sqrt(exp_avg_sq) / correction2.sqrt() + h["eps"])
    return direction, {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def sqrt(x: Tensor) -> Tensor:
    """Return the square root, with derivative zero where x is zero.

    An infinite derivative there would make every gradient through a step NaN as soon as one entry of the
    gradient is zero, as it is for each dead unit.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
