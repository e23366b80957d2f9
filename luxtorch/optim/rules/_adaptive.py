"""Adaptive learning rates without momentum: AdaGrad, AdaDelta, RMSProp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import fused_adagrad_
from luxtorch.core import InputError, out_of_range

from .._hyperparameters import Fixed, Number, Share
from .._kernels import SlotList, Step, Tensors, alike, averages, averages_of_squares, by_leaf, run_fused, with_penalty
from .._leafwise import LeafwiseRule, counted, decayed, sqrt, zeros
from .._rule_state import RuleState, Slots


class AdaGrad(LeafwiseRule):
    """Scale the gradient by the root of the sum of all its squares.

    Args:
        lr: The learning rate.
        lr_decay: How much the step count diminishes the learning rate: `lr / (1 + lr_decay * (step - 1))`.
        weight_decay: How much of the parameter is added to its gradient.
        eps: Added to the root.
        initial_accumulator_value: Where the sums of squares begin.

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
    initial_accumulator_value: Fixed[float] = 0.0

    needs_params = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.initial_accumulator_value < math.inf:
            raise out_of_range("initial_accumulator_value", self.initial_accumulator_value, "in [0, inf)")

    def slots(self, p: Tensor) -> Slots:
        return {**counted(p), "sum": torch.full_like(p, self.initial_accumulator_value)}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"-lr_now": h["-lr"] / (1 + counts["step"] * h["lr_decay"])}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g = decayed(g, p, h)
        total = slots["sum"] + g * g
        return h["-lr_now"] * g / (sqrt(total) + h["eps"]), {"step": slots["step"] + 1, "sum": total}

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        lr, lr_decay, weight_decay, eps = h
        options = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        run_fused(fused_adagrad_, params, grads, slots, ("sum", "step"), **options)


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
    rho: Share = 0.9
    eps: Number = 1e-6
    weight_decay: Number = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "square_avg", "acc_delta")

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().shared(h), "1-rho": 1 - h["rho"]}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g, rho = decayed(g, p, h), h["rho"]
        square_avg = rho * slots["square_avg"] + h["1-rho"] * g * g
        direction = sqrt(slots["acc_delta"] + h["eps"]) / sqrt(square_avg + h["eps"]) * g
        acc_delta = rho * slots["acc_delta"] + h["1-rho"] * direction * direction
        return h["-lr"] * direction, {"square_avg": square_avg, "acc_delta": acc_delta}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, rho, eps, weight_decay = h
        if not alike(params, grads, slots):
            return None
        grads = with_penalty(grads, params, weight_decay)
        square_avg = averages_of_squares(slots, "square_avg", grads, rho)
        direction = torch._foreach_add([leaf["acc_delta"] for leaf in slots], eps)
        torch._foreach_div_(direction, torch._foreach_add(square_avg, eps))
        torch._foreach_sqrt_(direction)
        torch._foreach_mul_(direction, grads)
        acc_delta = averages_of_squares(slots, "acc_delta", direction, rho)
        new_params = torch._foreach_add(params, direction, alpha=-lr)
        return new_params, by_leaf({"square_avg": square_avg, "acc_delta": acc_delta})


class RMSProp(LeafwiseRule):
    """Scale the gradient by the root of its average square.

    Args:
        lr: The learning rate.
        alpha: How much of the averages is kept.
        eps: Added to the root.
        weight_decay: How much of the parameter is added to its gradient.
        centered: Whether the average square is that of the gradient's distance from its own average.
        momentum: How much of a velocity is kept, which the scaled gradients are added to. A rule that is set up with 0
            has no velocity.

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
    `torch.optim.RMSprop`; the name is that of Optimisers.jl.
    """

    lr: Number = 0.01
    alpha: Share = 0.99
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    centered: bool = False
    momentum: Share = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        centered = ("grad_avg",) if self.centered else ()
        plain = isinstance(self.momentum, (int, float)) and self.momentum == 0
        return zeros(p, "square_avg", *centered, *(() if plain else ("momentum_buffer",)))

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().shared(h), "1-alpha": 1 - h["alpha"]}

    def check_adjusted(self, values: Mapping[str, Any], state: RuleState) -> None:
        if "momentum" in values and not any("momentum_buffer" in slots for slots in state.leaves.values()):
            raise InputError(
                "RMSProp was set up without momentum.",
                expected="a rule with a momentum from the beginning",
                got=f"momentum={values['momentum']!r}",
                fix="Change the rule: optim.transfer(opt_state, optim.RMSProp(momentum=0.9), ps).",
            )

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g = decayed(g, p, h)
        spread = square_avg = h["alpha"] * slots["square_avg"] + h["1-alpha"] * g * g
        new = {"square_avg": square_avg}
        if self.centered:
            new["grad_avg"] = slots["grad_avg"] + h["1-alpha"] * (g - slots["grad_avg"])
            # Of a constant gradient no spread is left, but for rounding: torch's may become negative, and its root NaN.
            spread = (square_avg - new["grad_avg"] * new["grad_avg"]).clamp(min=0.0)
        direction = g / (sqrt(spread) + h["eps"])
        if "momentum_buffer" in slots:
            direction = new["momentum_buffer"] = h["momentum"] * slots["momentum_buffer"] + direction
        return h["-lr"] * direction, new

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, alpha, eps, weight_decay, momentum = h
        if not alike(params, grads, slots):
            return None
        grads = with_penalty(grads, params, weight_decay)
        spread = square_avg = averages_of_squares(slots, "square_avg", grads, alpha)
        new = {"square_avg": square_avg}
        if self.centered:
            new["grad_avg"] = grad_avg = averages(slots, "grad_avg", grads, alpha)
            spread = torch._foreach_addcmul(square_avg, grad_avg, grad_avg, value=-1)
            torch._foreach_clamp_min_(spread, 0.0)
        root = torch._foreach_sqrt(spread)
        torch._foreach_add_(root, eps)
        if "momentum_buffer" not in slots[0]:
            return torch._foreach_addcdiv(params, grads, root, value=-lr), by_leaf(new)
        new["momentum_buffer"] = velocity = torch._foreach_mul([leaf["momentum_buffer"] for leaf in slots], momentum)
        torch._foreach_addcdiv_(velocity, grads, root)
        return torch._foreach_add(params, velocity, alpha=-lr), by_leaf(new)
