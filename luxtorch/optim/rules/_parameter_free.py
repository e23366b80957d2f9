"""Rules that spare a learning rate or its schedule: Polyak step sizes, Prodigy, schedule-free AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from luxtorch.core._sharded import beside

from .._hyperparameters import Betas, Number, Numbers, Range, unpack
from .._leafwise import counted, sqrt, zeros
from .._leaves import Leaves
from .._rule import ListRule, Updates, needed
from .._rule_state import ALL, RuleState, Slots, check_names
from ._adam import AdamLike


class PolyakSGD(ListRule):
    """Gradient descent with Polyak's step size, `(value - f_min) / norm(grads)**2`, at most `max_lr`.

    Each step needs `value=`, the loss; a training step passes it.

    Args:
        max_lr: The largest step size.
        f_min: The least value of the loss.
        eps: Added to the square of the norm.
        scaling: A factor on the step size.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.tensor([3.0, 4.0])
        >>> opt_state = optim.setup(optim.PolyakSGD(), p)
        >>> opt_state, p = optim.update(opt_state, p, 2 * p, value=(p**2).sum())
        >>> p
        tensor([1.5000, 2.0000])

    Polyak, "Introduction to optimization", 1987; Loizou et al., "Stochastic Polyak step-size for SGD", 2021. The name
    and the defaults are those of optax.
    """

    max_lr: Number = 1.0
    f_min: Annotated[Number, Range("(-inf, inf)")] = 0.0
    eps: Number = 0.0
    scaling: Number = 1.0

    def by_parameter(self) -> bool:
        return False

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, state.leaves)
        value, h = needed(self, leaves, "value"), shared(self, state)
        norm = sum((g.square().sum() for g in leaves.grads if g is not None), torch.zeros(())) + h["eps"]
        known = norm > 0
        step = h["scaling"] * ((value - h["f_min"]) / torch.where(known, norm, 1.0)).clamp(min=0.0)
        step = torch.where(known, torch.minimum(step, h["scaling"] * h["max_lr"]), 0.0)
        return [None if g is None else (-step * g).to(g.dtype) for g in leaves.grads], state.after(state.leaves)


class Prodigy(ListRule):
    """Adam that finds its learning rate: it estimates how far the solution is from where it began.

    Args:
        lr: A factor on the learning rate that is found: 1, or a schedule.
        betas: How much of the two averages is kept.
        eps: Added to the root of the second average, times the estimate.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        d0: The first estimate of the distance, a small one.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.tensor([3.0, -2.0])
        >>> opt_state = optim.setup(optim.Prodigy(), p)
        >>> for _ in range(300):
        ...     opt_state, p = optim.update(opt_state, p, 2 * p)
        >>> p.abs().max() < 0.1
        tensor(True)

    Mishchenko and Defazio, "Prodigy: an expeditiously adaptive parameter-free learner", 2023, algorithm 4.
    """

    lr: Number = 1.0
    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    d0: Annotated[Number, Range("(0, inf)")] = 1e-6

    needs_params = True

    def by_parameter(self) -> bool:
        return False

    def slots(self, p: Tensor) -> Slots:
        return {**zeros(p, "exp_avg", "exp_avg_sq", "s"), "initial": p.detach().clone()}

    def init(self, params: Any) -> RuleState:
        state: RuleState = super().init(params)
        like = next(iter(self.leaves_of(params).params), torch.zeros(()))
        d = state.hyper[..., -1:].to(like.device, torch.float32) if isinstance(state.hyper, Tensor) else like
        d = beside(d, like)
        return state._replace(leaves={**state.leaves, ALL: {"d": d, "r": torch.zeros_like(d)}})

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, [name for name in state.leaves if name != ALL])
        h, d, slots = shared(self, state), state.leaves[ALL]["d"], dict(state.leaves)
        (beta1, beta2), lr = h["betas"], h["lr"]
        beta3 = beta2.sqrt()
        new1, new2, new3 = (1 - beta1) * d, (1 - beta2) * d**2, (1 - beta3) * lr * d**2
        given = [(n, p, g) for n, p, g in zip(leaves.names, leaves.params, leaves.grads, strict=True) if g is not None]
        r, s_norm = beta3 * state.leaves[ALL]["r"], torch.zeros_like(d)
        for name, p, g in given:
            old = state.leaves[name]
            exp_avg = beta1 * old["exp_avg"] + new1 * g
            exp_avg_sq = beta2 * old["exp_avg_sq"] + new2 * g**2
            s = beta3 * old["s"] + new3 * g
            r = r + new3 * (g * (old["initial"] - p)).sum()
            s_norm = s_norm + s.abs().sum()
            new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "s": s, "initial": old["initial"]}
            slots[name] = {slot: value.to(old[slot].dtype) for slot, value in new.items()}
        found = torch.where(s_norm > 0, r / torch.where(s_norm > 0, s_norm, 1.0), 0.0)
        slots[ALL] = {"d": torch.maximum(d, found.to(d.dtype)), "r": r.to(d.dtype)}
        updates, scale, eps = {}, -lr * d, d * h["eps"]
        for name, p, _ in given:
            direction = slots[name]["exp_avg"] / (sqrt(slots[name]["exp_avg_sq"]) + eps)
            updates[name] = (scale * (direction + h["weight_decay"] * p)).reshape(p.shape).to(p.dtype)
        return [updates.get(name) for name in leaves.names], state.after(slots)


class ScheduleFreeAdamW(AdamLike):
    """AdamW that averages its iterates in the place of a learning rate that falls.

    Gradients are taken at the parameters that are trained; evaluate with `optim.eval_parameters(opt_state, ps)`.

    Args:
        lr: The learning rate, constant after a warm-up: `optim.linear(0.0, lr, steps)`.
        betas: How near to the average the gradients are taken, and how much of the average square is kept.
        eps: Added to the root of the average square.
        weight_decay: How much the parameters shrink, relative to the learning rate.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.ScheduleFreeAdamW(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0]))
        >>> optim.eval_parameters(opt_state, p)
        tensor([-0.5000,  0.5000])

    Defazio et al., "The road less scheduled", 2024, algorithm 1.
    """

    lr: Number = 0.0025
    betas: Annotated[Numbers, Range("(0, 1)"), Range("[0, 1)")] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        new = counted(p, "exp_avg_sq")
        return {**new, "z": p.detach().clone(), "weight_sum": torch.zeros_like(new["step"])}

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        new = super().shared(h)
        return {**new, "(1-beta1)/beta1": new["1-beta1"] / new["beta1"]}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        lr = h["lr"] * super().by_count(counts, h)["root_correction2"]
        weight_sum = counts["weight_sum"] + lr * lr
        share = lr * lr / torch.where(weight_sum > 0, weight_sum, 1.0)
        return {"lr_now": lr, "weight_sum": weight_sum, "share": share}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        exp_avg_sq = h["beta2"] * slots["exp_avg_sq"] + h["1-beta2"] * g * g
        z = slots["z"] - h["lr_now"] * (g / (sqrt(exp_avg_sq) + h["eps"]) + h["weight_decay"] * p)
        x = self.eval_parameter(p, slots, h)
        x = x + h["share"] * (z - x)
        new = {"step": slots["step"] + 1, "exp_avg_sq": exp_avg_sq, "z": z, "weight_sum": h["weight_sum"]}
        return z + h["beta1"] * (x - z) - p, new

    def eval_parameter(self, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> Tensor:
        return p + h["(1-beta1)/beta1"] * (p - slots["z"])


def shared(rule: ListRule, state: RuleState) -> dict[str, Tensor]:
    """Return the hyperparameters of a rule that treats all parameters together."""
    hyper = rule.hyper_now(state)
    assert isinstance(hyper, Tensor)
    return unpack(hyper, rule.hyperparameters)
