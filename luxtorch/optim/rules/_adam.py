"""Adam, and its nearest relatives: AdamW, AMSGrad, AdaMax, LAMB."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luxtorch._torch import fused_adam_, fused_adamw_

from .._hyperparameters import Betas, Number
from .._kernels import (
    SlotList,
    Step,
    Tensors,
    averages,
    bias_corrections,
    by_leaf,
    next_steps,
    run_fused,
    steps_of,
    with_penalty,
)
from .._leafwise import LeafwiseRule, counted, decayed, shares, sqrt
from .._rule_state import Slots


class AdamLike(LeafwiseRule):
    """A rule with the hyperparameter `betas`, of two running averages, whose bias is corrected."""

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().shared(h), **shares(h)}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # 1 - betas**step, written so that inductor computes both once, and not anew for each element: three times as
        # fast.
        corrections = 1 - torch.exp((counts["step"] + 1).unsqueeze(-1) * h["betas"].log())
        correction1, correction2 = corrections.unbind(-1)
        return {"correction1": correction1, "correction2": correction2, "root_correction2": correction2.sqrt()}


class Adam(AdamLike):
    """Scale each step by running averages of the gradient and of its square.

    Args:
        lr: The learning rate.
        betas: How much of the two averages is kept.
        eps: Added to the root of the second average.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2)}
        >>> opt_state = optim.setup(optim.Adam(0.5), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.tensor([1.0, -100.0])})
        >>> ps
        {'weight': tensor([-0.5000,  0.5000])}

    Kingma and Ba, "Adam: a method for stochastic optimization", 2015. The numbers are those of `torch.optim.Adam`.
    """

    lr: Number = 0.001
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(g, slots, h)
        return h["-lr"] * direction, slots

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        _adamw_(params, grads, slots, *h)


class AdamW(AdamLike):
    """Take Adam steps and, apart from them, shrink the parameters: `p - lr * (adam + weight_decay * p)`.

    Args:
        lr: The learning rate.
        betas: How much of the two averages is kept.
        eps: Added to the root of the second average.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        amsgrad: Whether steps are scaled by the largest average square so far, as those of `AMSGrad` are.

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
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.01
    amsgrad: bool = False

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else adam_slots(p)

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(g, slots, h)
        return h["-lr"] * (direction + h["weight_decay"] * p), slots

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        _adamw_(params, grads, slots, *h, amsgrad=self.amsgrad)


class AMSGrad(AdamLike):
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
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, slots = adam_direction(decayed(g, p, h), slots, h)
        return h["-lr"] * direction, slots

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        lr, beta1, beta2, eps, weight_decay = h
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps, "amsgrad": True}
        run_fused(fused_adam_, params, grads, slots, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"), **options)


class AdaMax(AdamLike):
    """Scale the average gradient by its largest recent magnitude, where Adam takes the root of a mean square.

    Args:
        lr: The learning rate.
        betas: How much of the average and of the magnitude is kept.
        eps: Added to the magnitude of each gradient.
        weight_decay: How much of the parameter is added to its gradient.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AdaMax(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5000,  0.5000])

    Kingma and Ba, "Adam: a method for stochastic optimization", 2015. The numbers and defaults are those of
    `torch.optim.Adamax`; the name is that of Optimisers.jl.
    """

    lr: Number = 0.002
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_inf")

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"-lr/correction1": h["-lr"] / super().by_count(counts, h)["correction1"]}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g = decayed(g, p, h)
        exp_avg = slots["exp_avg"] + h["1-beta1"] * (g - slots["exp_avg"])
        exp_inf = torch.maximum(h["beta2"] * slots["exp_inf"], g.abs() + h["eps"])
        new = {"step": slots["step"] + 1, "exp_avg": exp_avg, "exp_inf": exp_inf}
        return h["-lr/correction1"] * exp_avg / exp_inf, new

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, eps, weight_decay = h
        steps = steps_of(params, grads, slots)
        if steps is None:
            return None
        grads = with_penalty(grads, params, weight_decay)
        exp_avg = averages(slots, "exp_avg", grads, beta1)
        exp_inf = torch._foreach_mul([leaf["exp_inf"] for leaf in slots], beta2)
        size = torch._foreach_abs(grads)
        torch._foreach_add_(size, eps)
        torch._foreach_maximum_(exp_inf, size)
        factors = [-lr / correction for correction in bias_corrections(steps, beta1)]
        new_params = torch._foreach_addcdiv(params, exp_avg, exp_inf, factors)
        return new_params, by_leaf({"step": next_steps(slots), "exp_avg": exp_avg, "exp_inf": exp_inf})


class LAMB(AdamLike):
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
    betas: Betas = (0.9, 0.999)
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
        return h["-lr"] * _trust(p, direction) * direction, slots


def _trust(p: Tensor, direction: Tensor) -> Tensor:
    """Return the norm of the parameter over that of its step."""
    norm, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(direction)
    known = (norm > 0) & (length > 0)
    return torch.where(known, norm / torch.where(known, length, 1.0), 1.0)


def adam_slots(p: Tensor) -> Slots:
    """Return the step count and the two averages of a parameter before the first step."""
    return counted(p, "exp_avg", "exp_avg_sq")


def adam_direction(g: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
    """Return the direction of an Adam step, to be multiplied by the learning rate, and the new slots.

    Where there is a slot for the largest average square so far, that is the scale.
    """
    new = adam_averages(g, slots, h)
    square = new["exp_avg_sq"]
    if "max_exp_avg_sq" in slots:
        square = new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], square)
    return new["exp_avg"] / h["correction1"] / (sqrt(square) / h["root_correction2"] + h["eps"]), new


def adam_averages(g: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> Slots:
    """Return the new step count and averages."""
    exp_avg = slots["exp_avg"] + h["1-beta1"] * (g - slots["exp_avg"])
    exp_avg_sq = h["beta2"] * slots["exp_avg_sq"] + h["1-beta2"] * g * g
    return {"step": slots["step"] + 1, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _adamw_(
    params: Tensors,
    grads: Tensors,
    slots: SlotList,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    *,
    amsgrad: bool = False,
) -> None:
    """Take the step of AdamW in place; without decay it is that of Adam."""
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps, "amsgrad": amsgrad}
    run_fused(
        fused_adamw_,
        params,
        grads,
        slots,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else "", "step"),
        **options,
    )
