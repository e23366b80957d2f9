"""AdaDelta."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _foreach
from ._formula import decayed, sqrt, zeros
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class AdaDelta(LeafwiseRule):
    """Scale the gradient by the root of the average square of the steps over that of the gradients.

    Args:
        lr: The learning rate. Not of the method itself, which has none: one.
        rho: How much of the averages is kept.
        eps: Added to both averages.
        weight_decay: How much of the parameter is added to its gradient.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AdaDelta(rho=0.75), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.0020,  0.0020])

    Zeiler, "ADADELTA: an adaptive learning rate method", 2012. The numbers and defaults are those of
    `torch.optim.Adadelta`; the name is that of Optimisers.jl.
    """

    lr: Number = 1.0
    rho: Number = 0.9
    eps: Number = 1e-6
    weight_decay: Number = 0.0

    needs_params = True
    kernel = staticmethod(_foreach.adadelta)

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "square_avg", "acc_delta")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g, rho = decayed(g, p, h), h["rho"]
        square_avg = rho * slots["square_avg"] + (1 - rho) * g * g
        direction = sqrt(slots["acc_delta"] + h["eps"]) / sqrt(square_avg + h["eps"]) * g
        acc_delta = rho * slots["acc_delta"] + (1 - rho) * direction * direction
        return -h["lr"] * direction, {"square_avg": square_avg, "acc_delta": acc_delta}
