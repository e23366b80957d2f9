"""RMSProp."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _foreach
from ._formula import decayed, sqrt, zeros
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class RMSProp(LeafwiseRule):
    """Scale the gradient by the root of its average square.

    Args:
        lr: The learning rate.
        alpha: How much of the averages is kept.
        eps: Added to the root.
        weight_decay: How much of the parameter is added to its gradient.
        centered: Whether the average square is that of the gradient's distance from its own average.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.RMSProp(0.5, alpha=0.75), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-1.,  1.])

    Tieleman and Hinton, lecture 6.5 of "Neural networks for machine learning", 2012; centered by Graves,
    "Generating sequences with recurrent neural networks", 2013. The numbers and defaults are those of
    `torch.optim.RMSprop` without its momentum; the name is that of Optimisers.jl.
    """

    lr: Number = 0.01
    alpha: Number = 0.99
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    centered: bool = False

    needs_params = True
    kernel = staticmethod(_foreach.rmsprop)

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "square_avg", "grad_avg") if self.centered else zeros(p, "square_avg")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g, alpha = decayed(g, p, h), h["alpha"]
        spread = square_avg = alpha * slots["square_avg"] + (1 - alpha) * g * g
        new = {"square_avg": square_avg}
        if self.centered:
            new["grad_avg"] = slots["grad_avg"] + (1 - alpha) * (g - slots["grad_avg"])
            # Of a constant gradient no spread is left, but for rounding: torch's may become negative, and its root NaN.
            spread = (square_avg - new["grad_avg"] * new["grad_avg"]).clamp(min=0.0)
        return -h["lr"] * g / (sqrt(spread) + h["eps"]), new
