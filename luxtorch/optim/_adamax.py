"""AdaMax."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _foreach
from ._adam import advance
from ._formula import counted, decayed
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class AdaMax(LeafwiseRule):
    """Scale the average gradient by its largest recent magnitude, where Adam takes the root of a mean square.

    Args:
        lr: The learning rate.
        betas: How much of the average and of the magnitude is kept.
        eps: Added to the magnitude of each gradient.
        weight_decay: How much of the parameter is added to its gradient.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AdaMax(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5000,  0.5000])

    Kingma and Ba, "Adam: a method for stochastic optimization", 2015. The numbers and defaults are those of
    `torch.optim.Adamax`; the name is that of Optimisers.jl.
    """

    lr: Number = 0.002
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    needs_params = True
    kernel = staticmethod(_foreach.adamax)

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_inf")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g = decayed(g, p, h)
        (beta1, beta2), (step, (filled1, _)) = h["betas"], advance(slots["step"], h["betas"])
        exp_avg = slots["exp_avg"] + (1 - beta1) * (g - slots["exp_avg"])
        exp_inf = torch.maximum(beta2 * slots["exp_inf"], g.abs() + h["eps"])
        return -h["lr"] / filled1 * exp_avg / exp_inf, {"step": step, "exp_avg": exp_avg, "exp_inf": exp_inf}
