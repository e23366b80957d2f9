"""Stochastic gradient descent (SGD): plain, with momentum, with Nesterov momentum; and by signs: Rprop, Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from .._hyperparameters import Betas, Number, Numbers, Range, Share
from .._kernels import SlotList, Step, Tensors, add_scaled, alike, averages, by_leaf, shrunk
from .._leafwise import LeafwiseRule, sign, zeros
from .._rule_state import Slots


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

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return -h["lr"] * g, {}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        return add_scaled(params, grads, -h[0]), slots

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        torch._foreach_add_(params, grads, alpha=-h[0])


class Momentum(LeafwiseRule):
    """Step along a decaying sum of the gradients: `v = momentum * v + g`, then `p - lr * v`.

    The learning rate multiplies the whole velocity, as in `torch.optim.SGD`: adjusting it takes effect at once.
    Optimisers.jl puts it into the velocity; as long as it is constant the two agree.

    Args:
        lr: The learning rate.
        momentum: How much of the velocity is kept.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.zeros(1), torch.ones(1)
        >>> opt_state = optim.setup(optim.Momentum(lr=0.1, momentum=0.5), p)
        >>> for _ in range(2):
        ...     opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-0.2500])

    The numbers are those of `torch.optim.SGD`; name and defaults are those of Optimisers.jl.
    """

    lr: Number = 0.01
    momentum: Share = 0.9

    def slots(self, p: Tensor) -> Slots:
        return {"velocity": torch.zeros_like(p)}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        velocity = h["momentum"] * slots["velocity"] + g
        return -h["lr"] * velocity, {"velocity": velocity}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, momentum = h
        velocity = _velocity(grads, slots, momentum)
        if velocity is None:
            return None
        return add_scaled(params, velocity, -lr), by_leaf({"velocity": velocity})

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        lr, momentum = h
        torch._foreach_add_(params, _velocity_(grads, slots, momentum), alpha=-lr)


class Nesterov(LeafwiseRule):
    """Step along the velocity that momentum will have: `v = momentum * v + g`, then `p - lr * (g + momentum * v)`.

    The learning rate multiplies the whole step, as in `torch.optim.SGD`. Optimisers.jl puts it into the velocity;
    as long as it is constant the two agree.

    Args:
        lr: The learning rate.
        momentum: How much of the velocity is kept.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.zeros(1), torch.ones(1)
        >>> opt_state = optim.setup(optim.Nesterov(lr=0.1, momentum=0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-0.1500])

    The numbers are those of `torch.optim.SGD(nesterov=True)`; name and defaults are those of Optimisers.jl.
    """

    lr: Number = 0.001
    momentum: Share = 0.9

    def slots(self, p: Tensor) -> Slots:
        return {"velocity": torch.zeros_like(p)}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        velocity = h["momentum"] * slots["velocity"] + g
        return -h["lr"] * (g + h["momentum"] * velocity), {"velocity": velocity}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, momentum = h
        velocity = _velocity(grads, slots, momentum)
        if velocity is None:
            return None
        return add_scaled(params, add_scaled(grads, velocity, momentum), -lr), by_leaf({"velocity": velocity})

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        lr, momentum = h
        ahead = torch._foreach_add(grads, _velocity_(grads, slots, momentum), alpha=momentum)
        torch._foreach_add_(params, ahead, alpha=-lr)


def _velocity(grads: Tensors, slots: SlotList, momentum: float) -> Tensors | None:
    old = [leaf["velocity"] for leaf in slots]
    if any(v.dtype != g.dtype or v.shape != g.shape for v, g in zip(old, grads, strict=True)):
        return None
    return add_scaled(grads, old, momentum)


def _velocity_(grads: Tensors, slots: SlotList, momentum: float) -> list[Tensor]:
    velocity = [leaf["velocity"] for leaf in slots]
    return [torch.add(g, v, alpha=momentum, out=v) for g, v in zip(grads, velocity, strict=True)]


class Rprop(LeafwiseRule):
    """Step by the sign of the gradient alone, each element with a step size that follows how often the sign changes.

    For gradients of the whole data: noise changes signs.

    Args:
        lr: The first step size of all elements. To adjust it later has no effect.
        etas: The factors of a step size when the sign has changed and when it has not.
        step_sizes: The least and the greatest step size.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(optim.Rprop(0.5), p)
        >>> for g in (torch.tensor([1.0, 1.0]), torch.tensor([100.0, -1.0])):
        ...     opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-1.1000, -0.5000])

    Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993.
    The numbers and defaults are those of `torch.optim.Rprop`.
    """

    lr: Number = 0.01
    etas: Annotated[Numbers, Range("(0, 1)"), Range("(1, inf)")] = (0.5, 1.2)
    step_sizes: Numbers = (1e-6, 50.0)

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "prev", "step_size")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        shrink, grow = h["etas"]
        least, greatest = h["step_sizes"]
        agreement = g * slots["prev"]
        turned = agreement < 0
        # A step size is never zero once it is set.
        size = torch.where(slots["step_size"] == 0, h["lr"], slots["step_size"])
        size = torch.where(turned, shrink * size, torch.where(agreement > 0, grow * size, size))
        size = torch.minimum(torch.maximum(size, least), greatest)
        # After a turn the element waits for a step, and forgets the sign.
        g = torch.where(turned, 0.0, g)
        return -sign(g) * size, {"prev": g, "step_size": size}


class Lion(LeafwiseRule):
    """Step by the learning rate along the sign of an average, and shrink the parameters apart from that.

    Args:
        lr: The learning rate: the length of each step.
        betas: How much of the average counts in the step, and how much of it is kept.
        weight_decay: How much the parameters shrink, relative to the learning rate.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(3)
        >>> opt_state = optim.setup(optim.Lion(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([1.0, -100.0, 0.0]))
        >>> p
        tensor([-0.5000,  0.5000,  0.0000])

    Chen et al., "Symbolic discovery of optimization algorithms", 2023, with the paper's defaults. Optimisers.jl
    keeps `1 - betas[1]` of the average.
    """

    lr: Number = 0.0001
    betas: Betas = (0.9, 0.99)
    weight_decay: Number = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return zeros(p, "exp_avg")

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        beta1, beta2 = h["betas"]
        exp_avg = slots["exp_avg"]
        direction = sign(beta1 * exp_avg + (1 - beta1) * g)
        return -h["lr"] * (direction + h["weight_decay"] * p), {"exp_avg": beta2 * exp_avg + (1 - beta2) * g}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, weight_decay = h
        if not alike(params, grads, slots):
            return None
        ahead = averages(slots, "exp_avg", grads, beta1)
        direction = torch._foreach_sign(ahead)
        torch._foreach_add_(direction, ahead, alpha=0.0)  # NaN has the sign zero, but must be seen
        new_params = torch._foreach_add(shrunk(params, lr, weight_decay), direction, alpha=-lr)
        return new_params, by_leaf({"exp_avg": averages(slots, "exp_avg", grads, beta2)})
