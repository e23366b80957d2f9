"""Stochastic gradient descent (SGD): plain, with momentum, with Nesterov momentum; and by signs: Rprop, Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from .._hyperparameters import Betas, Number, Numbers, Range, Share
from .._kernels import SlotList, Step, Tensors, add_scaled, alike, averages, by_leaf, shrunk, with_penalty
from .._leafwise import LeafwiseRule, counted, decayed, shares, sign, zeros
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
        return h["-lr"] * g, {}

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
        return h["-lr"] * velocity, {"velocity": velocity}

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
        return h["-lr"] * (g + h["momentum"] * velocity), {"velocity": velocity}

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


class SGD(LeafwiseRule):
    """Stochastic gradient descent with all options of `torch.optim.SGD`.

    `Descent`, `Momentum` and `Nesterov` are the same in fewer words; they remember less.

    Args:
        lr: The learning rate.
        momentum: How much of the velocity is kept.
        dampening: How much of a gradient is left out of the velocity, but for the first.
        weight_decay: How much of the parameter is added to its gradient.
        nesterov: Whether to step along the velocity that momentum will have.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.zeros(1), torch.ones(1)
        >>> opt_state = optim.setup(optim.SGD(0.5, momentum=0.5, dampening=0.5), p)
        >>> for _ in range(2):
        ...     opt_state, p = optim.update(opt_state, p, g)
        >>> p
        tensor([-1.])

    Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning", 2013.
    The numbers and defaults are those of `torch.optim.SGD`.
    """

    lr: Number = 0.001
    momentum: Share = 0.0
    dampening: Share = 0.0
    weight_decay: Number = 0.0
    nesterov: bool = False

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return counted(p, "momentum_buffer")

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        later = (counts["step"] != 0) & (h["momentum"] != 0)  # the first gradient is taken whole, as in torch.optim
        return {"share": 1 - h["dampening"] * later}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        g = decayed(g, p, h)
        buffer = h["momentum"] * slots["momentum_buffer"] + h["share"] * g
        direction = g + h["momentum"] * buffer if self.nesterov else buffer
        return h["-lr"] * direction, {"step": slots["step"] + 1, "momentum_buffer": buffer}

    def in_place(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> None:
        lr, momentum, dampening, weight_decay = h
        grads = with_penalty(grads, params, weight_decay)
        steps, buffers = ([leaf[name] for leaf in slots] for name in ("step", "momentum_buffer"))
        torch._foreach_mul_(buffers, momentum)
        if dampening and momentum:
            # Of the first gradient all is taken, as in torch.optim.
            parts = [(1 - dampening * (s != 0).double()).to(g) for s, g in zip(steps, grads, strict=True)]
            torch._foreach_add_(buffers, torch._foreach_mul(grads, parts))
        else:
            torch._foreach_add_(buffers, grads)
        torch._foreach_add_(steps, 1)
        direction = torch._foreach_add(grads, buffers, alpha=momentum) if self.nesterov else buffers
        torch._foreach_add_(params, direction, alpha=-lr)


class ASGD(LeafwiseRule):
    """Averaged stochastic gradient descent: the average of the parameters is for `eval_parameters`.

    Args:
        lr: The first learning rate, which falls as `lr / (1 + lambd * lr * step) ** alpha`.
        lambd: How much the parameters shrink, relative to the learning rate.
        alpha: The power by which the learning rate falls.
        t0: The step at which averaging begins.
        weight_decay: How much of the parameter is added to its gradient.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(1)
        >>> opt_state = optim.setup(optim.ASGD(0.5, t0=0.0), p)
        >>> for _ in range(3):
        ...     opt_state, p = optim.update(opt_state, p, torch.ones(1))
        >>> p, optim.eval_parameters(opt_state, p)
        (tensor([-1.4999]), tensor([-1.2499]))

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992. The numbers and defaults are
    those of `torch.optim.ASGD`.
    """

    lr: Number = 0.01
    lambd: Number = 1e-4
    alpha: Number = 0.75
    t0: Number = 1e6
    weight_decay: Number = 0.0

    needs_params = True

    def slots(self, p: Tensor) -> Slots:
        return {**counted(p), "ax": p.detach().clone()}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        before = counts["step"]
        mu = 1 / (before - h["t0"]).clamp(min=1.0)
        return {"-eta": h["-lr"] / (1 + h["lambd"] * h["lr"] * before) ** h["alpha"], "mu": mu}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        step, mu = h["-eta"] * (h["lambd"] * p + decayed(g, p, h)), h["mu"]
        ax = torch.where(mu == 1, p + step, slots["ax"] + mu * (p + step - slots["ax"]))
        return step, {"step": slots["step"] + 1, "ax": ax}

    def eval_parameter(self, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> Tensor:
        return slots["ax"]


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

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        (shrink, grow), (least, greatest) = h["etas"], h["step_sizes"]
        return {"shrink": shrink, "grow": grow, "least": least, "greatest": greatest}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        agreement = g * slots["prev"]
        turned = agreement < 0
        # A step size is never zero once it is set.
        size = torch.where(slots["step_size"] == 0, h["lr"], slots["step_size"])
        size = torch.where(turned, h["shrink"] * size, torch.where(agreement > 0, h["grow"] * size, size))
        size = torch.minimum(torch.maximum(size, h["least"]), h["greatest"])
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

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().shared(h), **shares(h)}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        exp_avg = slots["exp_avg"]
        direction = sign(h["beta1"] * exp_avg + h["1-beta1"] * g)
        step = h["-lr"] * (direction + h["weight_decay"] * p)
        return step, {"exp_avg": h["beta2"] * exp_avg + h["1-beta2"] * g}

    def kernel(self, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
        lr, beta1, beta2, weight_decay = h
        if not alike(params, grads, slots):
            return None
        ahead = averages(slots, "exp_avg", grads, beta1)
        direction = torch._foreach_sign(ahead)
        torch._foreach_add_(direction, ahead, alpha=0.0)  # NaN has the sign zero, but must be seen
        new_params = torch._foreach_add(shrunk(params, lr, weight_decay), direction, alpha=-lr)
        return new_params, by_leaf({"exp_avg": averages(slots, "exp_avg", grads, beta2)})
