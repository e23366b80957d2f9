"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _fused, _in_place
from ._adam import adam_direction, adam_slots
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class AdamW(LeafwiseRule):
    """Take Adam steps and, apart from them, shrink the parameters: `p - lr * (adam + weight_decay * p)`.

    Args:
        lr: The learning rate.
        betas: How much of the two averages is kept.
        eps: Added to the root of the second average.
        weight_decay: How much the parameters shrink, relative to the learning rate.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.ones(2)}
        >>> opt_state = optim.setup(optim.AdamW(0.5, weight_decay=0.1), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.tensor([1.0, 0.0])})
        >>> ps
        {'weight': tensor([0.4500, 0.9500])}

    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019. The numbers and defaults are those of
    `torch.optim.AdamW`.
    """

    lr: Number = 0.001
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.01

    needs_params = True
    kernel = staticmethod(_fused.adam)
    in_place = staticmethod(_in_place.adam)

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(g, slots, h)
        return -h["lr"] * (direction + h["weight_decay"] * p), slots
