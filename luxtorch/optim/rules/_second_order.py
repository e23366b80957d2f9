"""Rules that know something of the curvature: Sophia (diagonal Hessian) and SOAP (Adam in Shampoo's eigenbasis)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from luxtorch import random
from luxtorch.autodiff import hvp
from luxtorch.autodiff._linear import hutchinson
from luxtorch.core import out_of_range
from luxtorch.core._sharded import beside

from .._hyperparameters import Betas, Number, Range
from .._kernels import unobserved
from .._leafwise import shares, sqrt, zeros
from .._leaves import Leaves
from .._rule import ListRule, Updates, needed
from .._rule_state import RuleState, Slots, by_leaf, check_names
from ._adam import AdamLike


class Sophia(ListRule):
    """Clipped second-order steps: an average gradient over an average of the Hessian's diagonal, no element above 1.

    Every `update_period` steps, from the first on, the diagonal is asked for: as `hessian=`, a tree like the
    parameters; or as `value_fn=`, a function of the parameters that returns the loss, with a `key=` for Hutchinson's
    estimate, `u * (H @ u)` for random signs u.

    Args:
        lr: The learning rate.
        betas: How much of the average gradient and of the average diagonal is kept.
        gamma: What the diagonal is multiplied by: the less, the more elements are clipped.
        eps: The least divisor.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        update_period: After how many steps the diagonal is estimated anew.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import optim
        >>> curvature = torch.tensor([1.0, 100.0])
        >>> loss = lambda p: (curvature * p**2).sum() / 2
        >>> p = torch.ones(2)
        >>> opt_state = optim.setup(optim.Sophia(0.1, gamma=10.0), p)
        >>> opt_state, p = optim.update(opt_state, p, curvature * p, value_fn=loss, key=lt.random.key(0))
        >>> p
        tensor([0.9600, 0.9600])

    Liu et al., "Sophia: a scalable stochastic second-order optimizer for language model pre-training", 2024,
    algorithm 3 with the estimator of Hutchinson.
    """

    lr: Number = 1e-3
    betas: Betas = (0.96, 0.99)
    gamma: Number = 0.01
    eps: Number = 1e-12
    weight_decay: Number = 0.0
    update_period: int = 10

    needs_params = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_period("update_period", self.update_period)

    def counts(self) -> bool:
        return True

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "exp_avg", "hessian")

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, state.leaves)
        assert isinstance(state.steps, Tensor)
        given = {n: (p, g) for n, p, g in zip(*leaves[:3], strict=True) if g is not None}
        due, params = state.steps % self.update_period == 0, {name: p for name, (p, _) in given.items()}
        hyper = by_leaf(self.hyper_now(state), self.hyperparameters, params, _terms)
        old = {name: state.leaves[name]["hessian"] for name in given}

        def estimated() -> dict[str, Tensor]:
            found = self._estimate(leaves, params)
            return {n: (hyper[n]["beta2"] * old[n] + hyper[n]["1-beta2"] * found[n]).to(old[n].dtype) for n in given}

        hessians, slots, updates = when(due, estimated, old), dict(state.leaves), {}
        for name, (p, g) in given.items():
            h, average = hyper[name], state.leaves[name]["exp_avg"]
            exp_avg = average + h["1-beta1"] * (g - average)
            ratio = exp_avg / torch.maximum(h["gamma"] * hessians[name], h["eps"].to(p.device))
            updates[name] = (h["-lr"] * (ratio.clamp(-1.0, 1.0) + h["weight_decay"] * p)).to(p.dtype)
            slots[name] = {"exp_avg": exp_avg.to(average.dtype), "hessian": hessians[name]}
        return [updates.get(name) for name in leaves.names], state.after(slots)

    def _estimate(self, leaves: Leaves, params: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an estimate of the Hessian's diagonal for some parameters."""
        hessian: Mapping[str, Tensor] | None = leaves.extra.get("hessian")
        if hessian is not None:
            return hessian
        value_fn, key = needed(self, leaves, "value_fn"), needed(self, leaves, "key")
        keys = [random.fold_in(key, i) for i, name in enumerate(leaves.names) if name in params]
        found: dict[str, Tensor] = hutchinson(lambda u: hvp(value_fn, params, u, mode="forward"), params, keys)
        return found


def _terms(h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"-lr": -h["lr"], **shares(h)}


class SOAP(AdamLike):
    """Adam in the eigenbasis of Shampoo's preconditioner, for matrices; other parameters take plain Adam steps.

    Args:
        lr, betas, eps: As for `Adam`.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        shampoo_beta: How much of the two averages `g @ g.T` and `g.T @ g` is kept.
        precondition_frequency: After how many steps the eigenbases are improved, by one step of power iteration.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2, 2)}
        >>> opt_state = optim.setup(optim.SOAP(0.5), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.tensor([[3.0, 0.0], [0.0, -3.0]])})
        >>> ps
        {'weight': tensor([[-0.5000,  0.0000],
                [ 0.0000,  0.5000]])}

    Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024, algorithms 3 and 4. The bases begin with
    the identity: the first steps are those of Adam.
    """

    lr: Number = 0.003
    betas: Betas = (0.95, 0.95)
    eps: Number = 1e-8
    weight_decay: Number = 0.01
    shampoo_beta: Annotated[Number, Range("[0, 1)")] = 0.95
    precondition_frequency: int = 10

    needs_params = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_period("precondition_frequency", self.precondition_frequency)

    def splits_vectors(self) -> bool:
        return True

    def slots(self, p: Tensor) -> Slots:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        new = {"step": step, **zeros(p, "exp_avg", "exp_avg_sq")}
        if p.ndim != 2:
            return new
        for side, size in zip(("left", "right"), p.shape, strict=True):
            new[side] = p.new_zeros(size, size)
            new[f"{side}_basis"] = beside(torch.eye(size, dtype=p.dtype, device=p.device), p)
        return new

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().shared(h), "1-shampoo_beta": 1 - h["shampoo_beta"]}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().by_count(counts, h), "phase": (counts["step"] + 1) % self.precondition_frequency}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        exp_avg = slots["exp_avg"] + h["1-beta1"] * (g - slots["exp_avg"])
        matrix = "left" in slots
        left, right = (slots[f"{side}_basis"].to(g.dtype) if matrix else None for side in ("left", "right"))
        turned = _turn(left, g, right)
        exp_avg_sq = h["beta2"] * slots["exp_avg_sq"] + h["1-beta2"] * turned * turned
        root = sqrt((exp_avg_sq / h["correction2"]).clamp(min=0.0)) + h["eps"]
        direction = (_turn(left, exp_avg.to(g.dtype), right) / h["correction1"] / root).to(g.dtype)
        new = {"step": slots["step"] + 1, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if left is not None and right is not None:
            direction = left @ direction @ right.T
            due = h["phase"] == 0
            for side, square in (("left", g @ g.T), ("right", g.T @ g)):
                new[side] = average = h["shampoo_beta"] * slots[side] + h["1-shampoo_beta"] * square
                bases = {f"{side}_basis": slots[f"{side}_basis"]}
                new |= when(due, partial(_power_iteration, average, bases), bases)
        return h["-lr"] * (direction + h["weight_decay"] * p), new


def _turn(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    """Return a matrix in two bases."""
    return x if left is None or right is None else left.T @ x @ right


def _power_iteration(average: Tensor, bases: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return better eigenbases of a symmetric matrix; no derivatives flow through them."""
    dtype = torch.promote_types(average.dtype, torch.float32)
    products = {name: (average.to(dtype) @ basis.to(dtype)).detach() for name, basis in bases.items()}
    return {name: torch.linalg.qr(product)[0].to(bases[name].dtype) for name, product in products.items()}


def when(due: Tensor, new: Callable[[], dict[str, Any]], old: dict[str, Any]) -> dict[str, Any]:
    """Return new tensors where they are due, and old ones otherwise, computed only then if that can be found out."""
    if unobserved():
        return new() if bool(due) else old
    return {name: torch.where(due.to(value.device), value, old[name]) for name, value in new().items()}


def check_period(name: str, value: object) -> None:
    """Raise unless a number of steps is a positive integer."""
    if type(value) is not int or value < 1:
        raise out_of_range(name, value, "a positive integer")
