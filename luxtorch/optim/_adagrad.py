"""AdaGrad."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _fused, _in_place
from ._formula import counted, decayed, sqrt
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class AdaGrad(LeafwiseRule):
    """Scale the gradient by the root of the sum of all its squares.

    Args:
        lr: The learning rate.
        lr_decay: How much the step count diminishes the learning rate: `lr / (1 + lr_decay * (step - 1))`.
        weight_decay: How much of the parameter is added to its gradient.
        eps: Added to the root.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AdaGrad(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5000,  0.5000])

    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization", 2011.
    The numbers and defaults are those of `torch.optim.Adagrad`; the name is that of Optimisers.jl, where the sum
    starts at eps.
    """

    lr: Number = 0.01
    lr_decay: Number = 0.0
    weight_decay: Number = 0.0
    eps: Number = 1e-10

    needs_params = True
    kernel = staticmethod(_fused.adagrad)
    in_place = staticmethod(_in_place.adagrad)

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "sum")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g = decayed(g, p, h)
        total = slots["sum"] + g * g
        lr = h["lr"] / (1 + slots["step"] * h["lr_decay"])
        return -lr * g / (sqrt(total) + h["eps"]), {"step": slots["step"] + 1, "sum": total}
