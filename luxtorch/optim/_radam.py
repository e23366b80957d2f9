"""Rectified Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _foreach, _fused
from ._adam import adam_averages, adam_slots
from ._formula import decayed, sqrt
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class RAdam(LeafwiseRule):
    """Take Adam steps, the smaller the fewer gradients the average square has seen; at first it is left out.

    Args:
        lr, betas, eps: As for `Adam`.
        weight_decay: How much of the parameter is added to its gradient, or to the step if it is decoupled.
        decoupled_weight_decay: Whether the parameter shrinks apart from the step, as for `AdamW`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.RAdam(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5000, 50.0000])

    Liu et al., "On the variance of the adaptive learning rate and beyond", 2020. The numbers and defaults are those
    of `torch.optim.RAdam`.
    """

    lr: Number = 0.001
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    decoupled_weight_decay: bool = False

    needs_params = True

    def kernel(self, *args: Any) -> _fused.Step | None:
        return _foreach.radam(*args, decoupled=self.decoupled_weight_decay)

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        if not self.decoupled_weight_decay:
            g = decayed(g, p, h)
        new, (filled1, filled2) = adam_averages(g, slots, h)
        rectified, rectification = _rectification(new["step"], h["betas"][1], filled2)
        adaptive = rectification * filled2.sqrt() / (sqrt(new["exp_avg_sq"]) + h["eps"])
        direction = new["exp_avg"] / filled1 * torch.where(rectified, adaptive, 1.0)
        if self.decoupled_weight_decay:
            direction = direction + h["weight_decay"] * p
        return -h["lr"] * direction, new


def _rectification(step: Tensor, beta2: Tensor, filled2: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the average square is of use by now, and the factor by which that shortens the step."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step.to(filled2.dtype) * (1 - filled2) / filled2
    rectified = length > 5
    # Where it is not, any lengths will do for which the root exists: its derivative must not be NaN.
    length, longest = torch.where(rectified, length, 6.0), torch.where(rectified, longest, 6.0)
    factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return rectified, factor.sqrt()
