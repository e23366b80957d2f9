"""The fast path of eager steps: torch's own kernels, out of place, wherever nothing is watching.

A step by formula is a dozen passes over the parameters. Where no transform, no compiler and no autograd has
to see inside, the same numbers come from one kernel (Adam, AdaGrad) that updates fresh clones, or from one pass per
tensor (the descents, whose fused kernel would be slower: `g + momentum * v` already is a single pass out of
place).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import transformed, watched

from . import _in_place
from ._in_place import InPlace
from ._in_place import Slots as Slots

Step: TypeAlias = tuple[Sequence[Tensor], Sequence[Slots]]
"""New parameters and new slots."""

Kernel: TypeAlias = Callable[..., "Step | None"]
"""Takes lists of parameters, gradients and slots, and the hyperparameters as numbers, to a step, if it can."""


def unobserved() -> bool:
    """Say whether nothing transforms or traces what is computed now."""
    return not (transformed() or watched())


def numbers(hyper: Tensor) -> list[float] | None:
    """Return the hyperparameters as numbers, unless that would wait for a GPU or cut an autograd tape."""
    if type(hyper) is not Tensor or not hyper.is_cpu or (hyper.requires_grad and torch.is_grad_enabled()):
        return None
    values: list[float] = hyper.tolist()
    return values


def descent(params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots], lr: float) -> Step:
    """Return the step of `Descent`."""
    return _add(params, grads, -lr), slots


def momentum(
    params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots], lr: float, momentum: float
) -> Step | None:
    """Return the step of `Momentum`."""
    velocity = _velocity(grads, slots, momentum)
    if velocity is None:
        return None
    return _add(params, velocity, -lr), [{"velocity": v} for v in velocity]


def nesterov(
    params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots], lr: float, momentum: float
) -> Step | None:
    """Return the step of `Nesterov`."""
    velocity = _velocity(grads, slots, momentum)
    if velocity is None:
        return None
    return _add(params, _add(grads, velocity, momentum), -lr), [{"velocity": v} for v in velocity]


def _velocity(grads: Sequence[Tensor], slots: Sequence[Slots], momentum: float) -> Sequence[Tensor] | None:
    old = [leaf["velocity"] for leaf in slots]
    if any(v.dtype != g.dtype or v.shape != g.shape for v, g in zip(old, grads, strict=True)):
        return None
    return _add(grads, old, momentum)


def on_clones(kernel: InPlace) -> Kernel:
    """Return the step that a kernel takes in place, out of place."""

    def step(params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots], *hyper: float) -> Step | None:
        if not alike(params, grads, slots):
            return None
        params = [p.clone() for p in params]
        slots = [{name: value.clone() for name, value in leaf.items()} for leaf in slots]
        kernel(params, grads, slots, *hyper)
        return params, slots

    return step


adam = on_clones(_in_place.adam)
amsgrad = on_clones(_in_place.amsgrad)
adagrad = on_clones(_in_place.adagrad)


def _add(xs: Sequence[Tensor], ys: Sequence[Tensor], alpha: float) -> Sequence[Tensor]:
    """Return x + alpha * y of each pair."""
    if len(xs) == 1:
        return [torch.add(xs[0], ys[0], alpha=alpha)]
    new: tuple[Tensor, ...] = torch._foreach_add(list(xs), list(ys), alpha=alpha)
    return new


def alike(params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots]) -> bool:
    """Say whether a kernel that reads raw memory may read these.

    It checks neither shapes nor strides, reads beyond the end of a tensor that is too short, and leaves no trace
    on an autograd tape.
    """
    first = params[0]
    if not (first.is_cpu or first.is_cuda) or not first.is_floating_point():
        return False
    device, dtype, recording = first.get_device(), first.dtype, torch.is_grad_enabled()
    for p, g, leaf in zip(params, grads, slots, strict=True):
        if type(p) not in _PLAIN or type(g) not in _PLAIN or g.get_device() != device:
            return False
        if recording and (p.requires_grad or g.requires_grad):
            return False
        for value in (p, *(value for name, value in leaf.items() if name not in COUNTS)):
            if (
                value.get_device() != device
                or value.dtype != dtype
                or not value.is_contiguous()
                or value.shape != p.shape
                or (recording and value.requires_grad)
            ):
                return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)

COUNTS = ("step", "mu_product", "count")
"""The slots that hold one number for the whole parameter."""
