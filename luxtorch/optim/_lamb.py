"""LAMB."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._adam import adam_direction, adam_slots
from ._hyperparameters import Number, Numbers
from ._leafwise import LeafwiseRule, Slots


class LAMB(LeafwiseRule):
    """Take Adam steps with decay, each parameter by a length in proportion to its own norm: for large batches.

    Each component of a ComponentVector is a parameter of its own.

    Args:
        lr, betas, eps: As for `Adam`.
        weight_decay: How much of the parameter is added to the direction of its step.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.full((4,), 3.0)}
        >>> opt_state = optim.setup(optim.LAMB(0.5, weight_decay=0.0), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.tensor([1.0, -1.0, 1.0, -1.0])})
        >>> ps
        {'weight': tensor([1.5000, 4.5000, 1.5000, 4.5000])}

    You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", 2020. Where the norm of
    a parameter or of its step is zero, the step is taken as it is.
    """

    lr: Number = 0.001
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-6
    weight_decay: Number = 0.01

    needs_params = True

    def splits_vectors(self) -> bool:
        return True

    def takes_complex(self) -> bool:
        return True  # the norm of the parts is that of the whole

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(g, slots, h)
        direction = (direction + h["weight_decay"] * p).to(p.dtype)
        return -h["lr"] * _trust(p, direction) * direction, slots


def _trust(p: Tensor, direction: Tensor) -> Tensor:
    """Return the norm of the parameter over that of its step."""
    norm, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(direction)
    known = (norm > 0) & (length > 0)
    return torch.where(known, norm / torch.where(known, length, 1.0), 1.0)
