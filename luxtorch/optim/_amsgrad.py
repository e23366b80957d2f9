"""AMSGrad."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _fused, _in_place
from ._adam import adam_averages
from ._formula import counted, decayed, sqrt
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class AMSGrad(LeafwiseRule):
    """Take Adam steps that are scaled by the largest average square so far.

    Args:
        lr, betas, eps: As for `Adam`.
        weight_decay: How much of the parameter is added to its gradient.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AMSGrad(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5000,  0.5000])

    Reddi, Kale and Kumar, "On the convergence of Adam and beyond", 2018. The numbers are those of
    `torch.optim.Adam(amsgrad=True)`; the name is that of Optimisers.jl.
    """

    lr: Number = 0.001
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    needs_params = True
    kernel = staticmethod(_fused.amsgrad)
    in_place = staticmethod(_in_place.amsgrad)

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        new, (filled1, filled2) = adam_averages(decayed(g, p, h), slots, h)
        new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], new["exp_avg_sq"])
        direction = new["exp_avg"] / filled1 / (sqrt(new["max_exp_avg_sq"]) / filled2.sqrt() + h["eps"])
        return -h["lr"] * direction, new
