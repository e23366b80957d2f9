"""Gradient descent."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import _fused, _in_place
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class Descent(LeafwiseRule):
    """Take plain gradient descent steps: `p - lr * g`.

    Args:
        lr: The learning rate.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps, gs = {"weight": torch.ones(2)}, {"weight": torch.tensor([1.0, -1.0])}
        >>> opt = optim.Descent(0.25)
        >>> opt_state = optim.setup(opt, ps)
        >>> opt_state, ps = optim.update(opt_state, ps, gs)
        >>> ps
        {'weight': tensor([0.7500, 1.2500])}

    The numbers are those of `torch.optim.SGD`; the name is that of Optimisers.jl.
    """

    lr: Number = 0.1

    kernel = staticmethod(_fused.descent)
    in_place = staticmethod(_in_place.descent)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return -h["lr"] * g, {}
