"""The fast path of rules for which torch has no fused kernel: as few passes over memory as its operations allow.

A formula takes two to three times as many: each product with a hyperparameter is a pass of its own there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ._fused import Slots, Step, alike

Tensors: TypeAlias = "list[Tensor] | tuple[Tensor, ...]"


def rmsprop(
    params: Tensors, grads: Tensors, slots: Sequence[Slots], lr: float, alpha: float, eps: float, weight_decay: float
) -> Step | None:
    """Return the step of `RMSProp`."""
    if not alike(params, grads, slots):
        return None
    grads = _decayed(grads, params, weight_decay)
    spread = square_avg = _average_square(slots, "square_avg", grads, alpha)
    new = {"square_avg": square_avg}
    if "grad_avg" in slots[0]:
        new["grad_avg"] = grad_avg = _average(slots, "grad_avg", grads, alpha)
        spread = torch._foreach_addcmul(square_avg, grad_avg, grad_avg, value=-1)
        torch._foreach_clamp_min_(spread, 0.0)
    root = torch._foreach_sqrt(spread)
    torch._foreach_add_(root, eps)
    return torch._foreach_addcdiv(params, grads, root, value=-lr), _by_leaf(new)


def adadelta(
    params: Tensors, grads: Tensors, slots: Sequence[Slots], lr: float, rho: float, eps: float, weight_decay: float
) -> Step | None:
    """Return the step of `AdaDelta`."""
    if not alike(params, grads, slots):
        return None
    grads = _decayed(grads, params, weight_decay)
    square_avg = _average_square(slots, "square_avg", grads, rho)
    direction = torch._foreach_add([leaf["acc_delta"] for leaf in slots], eps)
    torch._foreach_div_(direction, torch._foreach_add(square_avg, eps))
    torch._foreach_sqrt_(direction)
    torch._foreach_mul_(direction, grads)
    acc_delta = _average_square(slots, "acc_delta", direction, rho)
    new_params = torch._foreach_add(params, direction, alpha=-lr)
    return new_params, _by_leaf({"square_avg": square_avg, "acc_delta": acc_delta})


def adamax(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Step | None:
    """Return the step of `AdaMax`."""
    steps = _steps(params, grads, slots)
    if steps is None:
        return None
    grads = _decayed(grads, params, weight_decay)
    exp_avg = _average(slots, "exp_avg", grads, beta1)
    exp_inf = torch._foreach_mul([leaf["exp_inf"] for leaf in slots], beta2)
    size = torch._foreach_abs(grads)
    torch._foreach_add_(size, eps)
    torch._foreach_maximum_(exp_inf, size)
    new_params = torch._foreach_addcdiv(params, exp_avg, exp_inf, [-lr / filled for filled in _filled(steps, beta1)])
    return new_params, _by_leaf({"step": _next(slots), "exp_avg": exp_avg, "exp_inf": exp_inf})


def nadam(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    *,
    decoupled: bool,
) -> Step | None:
    """Return the step of `NAdam`."""
    steps = _steps(params, grads, slots)
    if steps is None:
        return None
    params, grads = _with_decay(params, grads, lr, weight_decay, decoupled)
    exp_avg, exp_avg_sq = _average(slots, "exp_avg", grads, beta1), _average_square(slots, "exp_avg_sq", grads, beta2)
    mu, mu_next = ([beta1 * (1 - 0.5 * 0.96 ** ((s + n) * momentum_decay)) for s in steps] for n in (0, 1))
    mu_product = [leaf["mu_product"] * m for leaf, m in zip(slots, mu, strict=True)]
    now = [product.item() for product in mu_product]
    root = _root(exp_avg_sq, _filled(steps, beta2), eps)
    by_grad = [-lr * (1 - m) / (1 - x) for m, x in zip(mu, now, strict=True)]
    by_average = [-lr * m / (1 - x * m) for m, x in zip(mu_next, now, strict=True)]
    new_params = torch._foreach_addcdiv(params, grads, root, by_grad)
    torch._foreach_addcdiv_(new_params, exp_avg, root, by_average)
    new = {"step": _next(slots), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "mu_product": mu_product}
    return new_params, _by_leaf(new)


def radam(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *,
    decoupled: bool,
) -> Step | None:
    """Return the step of `RAdam`."""
    steps = _steps(params, grads, slots)
    if steps is None:
        return None
    params, grads = _with_decay(params, grads, lr, weight_decay, decoupled)
    exp_avg, exp_avg_sq = _average(slots, "exp_avg", grads, beta1), _average_square(slots, "exp_avg_sq", grads, beta2)
    longest = 2 / (1 - beta2) - 1
    new_params = []
    for p, average, average_sq, step in zip(params, exp_avg, exp_avg_sq, steps, strict=True):
        filled1, filled2 = 1 - beta1**step, 1 - beta2**step
        length = longest - 2 * step * beta2**step / filled2
        if length > 5:
            factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            root = average_sq.sqrt().add_(eps)
            new_params.append(torch.addcdiv(p, average, root, value=-lr * math.sqrt(factor * filled2) / filled1))
        else:
            new_params.append(torch.add(p, average, alpha=-lr / filled1))
    return new_params, _by_leaf({"step": _next(slots), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})


def oadam(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Step | None:
    """Return the step of `OAdam`."""
    steps = _steps(params, grads, slots)
    if steps is None:
        return None
    exp_avg, exp_avg_sq = _average(slots, "exp_avg", grads, beta1), _average_square(slots, "exp_avg_sq", grads, beta2)
    direction = torch._foreach_div(exp_avg, _root(exp_avg_sq, _filled(steps, beta2), eps))
    torch._foreach_div_(direction, _filled(steps, beta1))
    new_params = torch._foreach_add(params, direction, alpha=-2 * lr)
    torch._foreach_add_(new_params, [leaf["direction"] for leaf in slots], alpha=lr)
    new = {"step": _next(slots), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "direction": direction}
    return new_params, _by_leaf(new)


def adabelief(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Step | None:
    """Return the step of `AdaBelief`."""
    steps = _steps(params, grads, slots)
    if steps is None:
        return None
    exp_avg = _average(slots, "exp_avg", grads, beta1)
    exp_avg_var = _average_square(slots, "exp_avg_var", torch._foreach_sub(grads, exp_avg), beta2)
    torch._foreach_add_(exp_avg_var, eps)
    root = _root(exp_avg_var, _filled(steps, beta2), eps)
    new_params = torch._foreach_addcdiv(params, exp_avg, root, [-lr / filled for filled in _filled(steps, beta1)])
    return new_params, _by_leaf({"step": _next(slots), "exp_avg": exp_avg, "exp_avg_var": exp_avg_var})


def lion(
    params: Tensors, grads: Tensors, slots: Sequence[Slots], lr: float, beta1: float, beta2: float, weight_decay: float
) -> Step | None:
    """Return the step of `Lion`."""
    if not alike(params, grads, slots):
        return None
    ahead = _average(slots, "exp_avg", grads, beta1)
    direction = torch._foreach_sign(ahead)
    torch._foreach_add_(direction, ahead, alpha=0.0)  # NaN has the sign zero, but must be seen
    new_params = torch._foreach_add(_shrunk(params, lr, weight_decay), direction, alpha=-lr)
    return new_params, _by_leaf({"exp_avg": _average(slots, "exp_avg", grads, beta2)})


def _steps(params: Tensors, grads: Tensors, slots: Sequence[Slots]) -> list[float] | None:
    """Return the numbers of the steps to be taken, unless that would wait for a GPU."""
    if not (alike(params, grads, slots) and params[0].is_cpu):
        return None
    return [leaf["step"].item() + 1 for leaf in slots]


def _next(slots: Sequence[Slots]) -> Tensors:
    return [leaf["step"] + 1 for leaf in slots]


def _filled(steps: list[float], beta: float) -> list[float]:
    """Return by how much averages that keep beta are filled by now."""
    return [1 - beta**step for step in steps]


def _shrunk(params: Tensors, lr: float, weight_decay: float) -> Tensors:
    return torch._foreach_mul(params, 1 - lr * weight_decay) if weight_decay else params


def _with_decay(
    params: Tensors, grads: Tensors, lr: float, weight_decay: float, decoupled: bool
) -> tuple[Tensors, Tensors]:
    """Return parameters and gradients with the decay in the one or in the other."""
    if decoupled:
        return _shrunk(params, lr, weight_decay), grads
    return params, _decayed(grads, params, weight_decay)


def _decayed(grads: Tensors, params: Tensors, weight_decay: float) -> Tensors:
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads


def _average(slots: Sequence[Slots], name: str, values: Tensors, kept: float) -> Tensors:
    return torch._foreach_lerp([leaf[name] for leaf in slots], values, 1 - kept)


def _average_square(slots: Sequence[Slots], name: str, values: Tensors, kept: float) -> Tensors:
    averages = torch._foreach_mul([leaf[name] for leaf in slots], kept)
    torch._foreach_addcmul_(averages, values, values, value=1 - kept)
    return averages


def _root(averages: Tensors, filled: list[float], eps: float) -> Tensors:
    """Return `sqrt(average / filled) + eps`."""
    roots = torch._foreach_div(averages, filled)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    return roots


def _by_leaf(columns: dict[str, Tensors]) -> list[Slots]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
