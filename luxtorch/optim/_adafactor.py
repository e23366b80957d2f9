"""Adafactor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._formula import counted, rms
from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class Adafactor(LeafwiseRule):
    """Scale the gradient by its average square, of which only the means of rows and of columns are kept.

    The state of a matrix is as long as its two sides. Steps are in proportion to the parameter's own size.
    Each component of a ComponentVector is a parameter of its own.

    Args:
        lr: The most that a step may be, relative to the parameter: `min(lr, step**-0.5)`.
        decay_rate: The averages keep `1 - step**-decay_rate`.
        d: The root mean square from which on an update is scaled down.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        eps2: The least size of a parameter.
        eps1: The least root of an average square; None is the resolution of the parameter's dtype.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.full((2, 3), 2.0)}
        >>> opt_state = optim.setup(optim.Adafactor(0.25), ps)
        >>> opt_state.state.leaves["weight"]["row_var"].shape
        torch.Size([2, 1])
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2, 3)})
        >>> ps
        {'weight': tensor([[1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000]])}

    Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018. The numbers and
    defaults are those of `torch.optim.Adafactor`, whose `beta2_decay` is `-decay_rate` and whose `eps` is
    `(eps1, eps2)`.
    """

    lr: Number = 0.01
    decay_rate: Number = 0.8
    d: Number = 1.0
    weight_decay: Number = 0.0
    eps2: Number = 1e-3
    eps1: float | None = None

    needs_params = True

    def splits_vectors(self) -> bool:
        return True

    def slots(self, p: Tensor) -> Slots:
        if p.ndim < 2:
            return counted(p, "variance")
        row_var, col_var = p.new_zeros((*p.shape[:-1], 1)), p.new_zeros((*p.shape[:-2], 1, p.shape[-1]))
        return {**counted(p), "row_var": row_var, "col_var": col_var}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        eps1 = torch.finfo(p.dtype).eps if self.eps1 is None else self.eps1
        count = slots["step"] + 1
        step = count.to(h["lr"].dtype)
        new_share = step ** -h["decay_rate"]
        if p.ndim < 2:
            averages = {"variance": g * g}
        else:
            averages = {"row_var": _mean_square(g, -1), "col_var": _mean_square(g, -2)}
        new = {name: slots[name] + new_share * (mean - slots[name]) for name, mean in averages.items()}
        if p.ndim < 2:
            variance = new["variance"]
        else:
            variance = new["row_var"] * new["col_var"] / new["row_var"].mean(-2, keepdim=True).clamp(min=eps1)
        update = (g * variance.clamp(min=eps1 * eps1).rsqrt()).to(p.dtype)
        size = torch.maximum(rms(p).to(step.dtype), h["eps2"])
        excess = torch.clamp(rms(update).to(step.dtype) / h["d"], min=1.0)
        relative = torch.minimum(h["lr"], step.rsqrt())
        return -relative * size / excess * update - h["lr"] * h["weight_decay"] * p, {"step": count, **new}


def _mean_square(g: Tensor, dim: int) -> Tensor:
    return (g * g).mean(dim, keepdim=True)
