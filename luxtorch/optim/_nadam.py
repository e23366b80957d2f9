"""Adam with Nesterov momentum."""

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


class NAdam(LeafwiseRule):
    """Take Adam steps along the average that the next step will have.

    Args:
        lr, betas, eps: As for `Adam`.
        weight_decay: How much of the parameter is added to its gradient, or to the step if it is decoupled.
        momentum_decay: How fast the momentum grows from half of `betas[0]` to all of it.
        decoupled_weight_decay: Whether the parameter shrinks apart from the step, as for `AdamW`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.NAdam(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5282,  0.5282])

    Dozat, "Incorporating Nesterov momentum into Adam", 2016. The numbers and defaults are those of
    `torch.optim.NAdam`, with its schedule of the momentum, which Optimisers.jl leaves out.
    """

    lr: Number = 0.002
    betas: Numbers = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    momentum_decay: Number = 0.004
    decoupled_weight_decay: bool = False

    needs_params = True

    def kernel(self, *args: Any) -> _fused.Step | None:
        return _foreach.nadam(*args, decoupled=self.decoupled_weight_decay)

    def slots(self, p: Tensor) -> Slots:
        slots = adam_slots(p)
        return {**slots, "mu_product": torch.ones_like(slots["step"])}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        if not self.decoupled_weight_decay:
            g = decayed(g, p, h)
        new, (_, filled2) = adam_averages(g, slots, h)
        mu, mu_next = _momenta(new["step"], h)
        # The product is rounded to float32 at each step, as torch's is.
        product = (slots["mu_product"] * mu.to(slots["mu_product"].dtype)).to(mu.dtype)
        ahead = mu_next / (1 - product * mu_next) * new["exp_avg"] + (1 - mu) / (1 - product) * g
        direction = ahead / (sqrt(new["exp_avg_sq"] / filled2) + h["eps"])
        if self.decoupled_weight_decay:
            direction = direction + h["weight_decay"] * p
        return -h["lr"] * direction, {**new, "mu_product": product}


def _momenta(step: Tensor, h: Mapping[str, Tensor]) -> Tensor:
    """Return the momentum of this step and of the next, in one tensor: inductor computes that once."""
    steps = torch.stack([step, step + 1]).to(h["momentum_decay"].dtype)
    return h["betas"][0] * (1 - 0.5 * 0.96 ** (steps * h["momentum_decay"]))
