"""Variants of Adam: NAdam (Nesterov momentum), RAdam (rectified), OAdam (optimistic), AdaBelief."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._hyperparameters import Betas, Number
from .._kernels import (
    SlotList,
    Step,
    Tensors,
    averages,
    averages_of_squares,
    bias_corrections,
    by_leaf,
    next_steps,
    roots,
    steps_of,
    with_decay,
)
from .._leafwise import counted, decayed, sqrt
from .._rule_state import Slots
from ._adam import AdamLike, adam_averages, adam_direction, adam_slots


class NAdam(AdamLike):
    """Adam with Nesterov momentum: steps along the average that the next step will have.

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
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    momentum_decay: Number = 0.004
    decoupled_weight_decay: bool = False

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        slots = adam_slots(p)
        return {**slots, "mu_product": torch.ones_like(slots["step"])}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # The momentum of this step and of the next, in one tensor: inductor computes that once.
        steps = torch.stack([counts["step"] + 1, counts["step"] + 2])
        mu, mu_next = h["beta1"] * (1 - 0.5 * 0.96 ** (steps * h["momentum_decay"]))
        # The product is rounded to float32 at each step, as torch's is.
        product = (counts["mu_product"].float() * mu.float()).to(mu.dtype)
        by_average, by_gradient = mu_next / (1 - product * mu_next), (1 - mu) / (1 - product)
        known = {"mu_product": product, "by_average": by_average, "by_gradient": by_gradient}
        return {**super().by_count(counts, h), **known}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        if not self.decoupled_weight_decay:
            g = decayed(g, p, h)
        new = {**adam_averages(g, slots, h), "mu_product": h["mu_product"]}
        ahead = h["by_average"] * new["exp_avg"] + h["by_gradient"] * g
        direction = ahead / (sqrt(new["exp_avg_sq"] / h["correction2"]) + h["eps"])
        if self.decoupled_weight_decay:
            direction = direction + h["weight_decay"] * p
        return h["-lr"] * direction, new

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, eps, weight_decay, momentum_decay = h
        steps = steps_of(params, grads, slots)
        if steps is None:
            return None
        params, grads = with_decay(params, grads, lr, weight_decay, self.decoupled_weight_decay)
        exp_avg = averages(slots, "exp_avg", grads, beta1)
        exp_avg_sq = averages_of_squares(slots, "exp_avg_sq", grads, beta2)
        mu, mu_next = ([beta1 * (1 - 0.5 * 0.96 ** ((s + n) * momentum_decay)) for s in steps] for n in (0, 1))
        mu_product = [leaf["mu_product"] * m for leaf, m in zip(slots, mu, strict=True)]
        now = [product.item() for product in mu_product]
        root = roots(exp_avg_sq, bias_corrections(steps, beta2), eps)
        by_grad = [-lr * (1 - m) / (1 - x) for m, x in zip(mu, now, strict=True)]
        by_average = [-lr * m / (1 - x * m) for m, x in zip(mu_next, now, strict=True)]
        new_params = torch._foreach_addcdiv(params, grads, root, by_grad)
        torch._foreach_addcdiv_(new_params, exp_avg, root, by_average)
        new = {"step": next_steps(slots), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "mu_product": mu_product}
        return new_params, by_leaf(new)


class RAdam(AdamLike):
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
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    decoupled_weight_decay: bool = False

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return adam_slots(p)

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        new = super().by_count(counts, h)
        rectification = _rectification(counts["step"] + 1, h["beta2"], new["correction2"])
        return {"correction1": new["correction1"], "rectification": rectification * new["root_correction2"]}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        if not self.decoupled_weight_decay:
            g = decayed(g, p, h)
        new = adam_averages(g, slots, h)
        adaptive = h["rectification"] / (sqrt(new["exp_avg_sq"]) + h["eps"])
        direction = new["exp_avg"] / h["correction1"] * torch.where(h["rectification"] > 0, adaptive, 1.0)
        if self.decoupled_weight_decay:
            direction = direction + h["weight_decay"] * p
        return h["-lr"] * direction, new

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, eps, weight_decay = h
        steps = steps_of(params, grads, slots)
        if steps is None:
            return None
        params, grads = with_decay(params, grads, lr, weight_decay, self.decoupled_weight_decay)
        exp_avg = averages(slots, "exp_avg", grads, beta1)
        exp_avg_sq = averages_of_squares(slots, "exp_avg_sq", grads, beta2)
        longest = 2 / (1 - beta2) - 1
        new_params = []
        for p, average, average_sq, step in zip(params, exp_avg, exp_avg_sq, steps, strict=True):
            bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
            length = longest - 2 * step * beta2**step / bias_correction2
            if length > 5:
                factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                scale = math.sqrt(factor * bias_correction2) / bias_correction1
                new_params.append(torch.addcdiv(p, average, average_sq.sqrt().add_(eps), value=-lr * scale))
            else:
                new_params.append(torch.add(p, average, alpha=-lr / bias_correction1))
        return new_params, by_leaf({"step": next_steps(slots), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})


def _rectification(step: Tensor, beta2: Tensor, bias_correction2: Tensor) -> Tensor:
    """Return the factor by which the average square shortens the step; zero until it is of use."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * (1 - bias_correction2) / bias_correction2
    rectified = length > 5
    # Where it is not, any lengths will do for which the root exists: its derivative must not be NaN.
    length, longest = torch.where(rectified, length, 6.0), torch.where(rectified, longest, 6.0)
    factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(rectified, factor.sqrt(), 0.0)


class OAdam(AdamLike):
    """Take Adam steps twice, and take back the one before: for games, in which plain steps go round in circles.

    The learning rate multiplies the step that is taken back too: adjusting it takes effect at once. Optimisers.jl
    takes back the step that was taken; as long as the learning rate is constant the two agree.

    Args:
        lr, betas, eps: As for `Adam`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.OAdam(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-1.,  1.])

    Daskalakis, Ilyas, Syrgkanis and Zeng, "Training GANs with optimism", 2018. Name and defaults are those of
    Optimisers.jl.
    """

    lr: Number = 0.001
    betas: Betas = (0.5, 0.9)
    eps: Number = 1e-8

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_sq", "direction")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        direction, new = adam_direction(g, slots, h)
        return h["-lr"] * (2 * direction - slots["direction"]), {**new, "direction": direction}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, eps = h
        steps = steps_of(params, grads, slots)
        if steps is None:
            return None
        exp_avg = averages(slots, "exp_avg", grads, beta1)
        exp_avg_sq = averages_of_squares(slots, "exp_avg_sq", grads, beta2)
        direction = torch._foreach_div(exp_avg, roots(exp_avg_sq, bias_corrections(steps, beta2), eps))
        torch._foreach_div_(direction, bias_corrections(steps, beta1))
        new_params = torch._foreach_add(params, direction, alpha=-2 * lr)
        torch._foreach_add_(new_params, [leaf["direction"] for leaf in slots], alpha=lr)
        new = {"step": next_steps(slots), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "direction": direction}
        return new_params, by_leaf(new)


class AdaBelief(AdamLike):
    """Scale the average gradient by how far the gradients are from it, where Adam takes how far they are from zero.

    Args:
        lr, betas: As for `Adam`.
        eps: Added to the average square at each step, and to its root.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.AdaBelief(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> p
        tensor([-0.5556,  0.5556])

    Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients", 2020. Name and
    defaults are those of Optimisers.jl.
    """

    lr: Number = 0.001
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-16

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "exp_avg", "exp_avg_var")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        exp_avg = slots["exp_avg"] + h["1-beta1"] * (g - slots["exp_avg"])
        surprise = g - exp_avg
        exp_avg_var = h["beta2"] * slots["exp_avg_var"] + h["1-beta2"] * surprise * surprise + h["eps"]
        direction = exp_avg / h["correction1"] / (sqrt(exp_avg_var) / h["root_correction2"] + h["eps"])
        return h["-lr"] * direction, {"step": slots["step"] + 1, "exp_avg": exp_avg, "exp_avg_var": exp_avg_var}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, eps = h
        steps = steps_of(params, grads, slots)
        if steps is None:
            return None
        exp_avg = averages(slots, "exp_avg", grads, beta1)
        exp_avg_var = averages_of_squares(slots, "exp_avg_var", torch._foreach_sub(grads, exp_avg), beta2)
        torch._foreach_add_(exp_avg_var, eps)
        root = roots(exp_avg_var, bias_corrections(steps, beta2), eps)
        factors = [-lr / correction for correction in bias_corrections(steps, beta1)]
        new_params = torch._foreach_addcdiv(params, exp_avg, root, factors)
        return new_params, by_leaf({"step": next_steps(slots), "exp_avg": exp_avg, "exp_avg_var": exp_avg_var})
