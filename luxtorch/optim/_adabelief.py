"""AdaBelief."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _foreach
from ._adam import advance
from ._formula import counted, sqrt
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class AdaBelief(LeafwiseRule):
    """Scale the average gradient by how far the gradients are from it, where Adam takes how far they are from zero.

    Args:
        lr, betas: As for `Adam`.
        eps: Added to the average square at each step, and to its root.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AdaBelief(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5556,  0.5556])

    Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients", 2020. Name and
    defaults are those of Optimisers.jl.
    """

    lr: Number = 0.001
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-16

    kernel = staticmethod(_foreach.adabelief)

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_var")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        (beta1, beta2), (step, (filled1, filled2)) = h["betas"], advance(slots["step"], h["betas"])
        exp_avg = slots["exp_avg"] + (1 - beta1) * (g - slots["exp_avg"])
        surprise = g - exp_avg
        exp_avg_var = beta2 * slots["exp_avg_var"] + (1 - beta2) * surprise * surprise + h["eps"]
        direction = exp_avg / filled1 / (sqrt(exp_avg_var) / filled2.sqrt() + h["eps"])
        return -h["lr"] * direction, {"step": step, "exp_avg": exp_avg, "exp_avg_var": exp_avg_var}
