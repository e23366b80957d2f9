"""Fast eager steps: torch's fused and foreach kernels, where no transform, compiler or tape is watching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import transformed, watched

from ._rule_state import COUNTS, Slots

Tensors: TypeAlias = "list[Tensor] | tuple[Tensor, ...]"
SlotList: TypeAlias = Sequence[Slots]

Step: TypeAlias = "tuple[Tensors, SlotList]"
"""New parameters and new slots."""

Kernel: TypeAlias = "Callable[..., Step | None]"
"""Takes lists of parameters, gradients and slots, and the hyperparameters as numbers, to a step, if it can."""

InPlace: TypeAlias = "Callable[..., None]"
"""Takes the same, and writes parameters and slots: for those who own that memory, and have looked with `alike`."""


def unobserved() -> bool:
    """Say whether nothing transforms or traces what is computed now."""
    return not (transformed() or watched())


def numbers(hyper: Tensor) -> list[float] | None:
    """Return the hyperparameters as numbers, unless that would wait for a GPU or cut an autograd tape."""
    if type(hyper) is not Tensor or not hyper.is_cpu or (hyper.requires_grad and torch.is_grad_enabled()):
        return None
    values: list[float] = hyper.tolist()
    return values


def on_clones(in_place: InPlace, params: Tensors, grads: Tensors, slots: SlotList, *h: float) -> Step | None:
    """Return the step that a kernel takes in place, out of place."""
    if not alike(params, grads, slots):
        return None
    params = [p.clone() for p in params]
    slots = [{name: value.clone() for name, value in leaf.items()} for leaf in slots]
    in_place(params, grads, slots, *h)
    return params, slots


def alike(params: Sequence[Tensor], grads: Sequence[Tensor], slots: SlotList) -> bool:
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


def run_fused(
    kernel: Callable[..., None],
    params: Tensors,
    grads: Tensors,
    slots: SlotList,
    names: Sequence[str],
    **options: Any,
) -> None:
    """Run a fused kernel, which takes the slots with these names, a list each."""
    columns = [[leaf[name] for leaf in slots] if name else [] for name in names]
    torch._foreach_add_(columns[-1], 1)  # the step counts
    kernel(list(params), [g.contiguous() for g in grads], *columns, maximize=False, **options)


def add_scaled(xs: Tensors, ys: Tensors, alpha: float) -> Tensors:
    """Return x + alpha * y of each pair."""
    if len(xs) == 1:
        return [torch.add(xs[0], ys[0], alpha=alpha)]
    new: tuple[Tensor, ...] = torch._foreach_add(xs, ys, alpha=alpha)
    return new


def steps_of(params: Tensors, grads: Tensors, slots: SlotList) -> list[float] | None:
    """Return the numbers of the steps to be taken, unless that would wait for a GPU."""
    if not (alike(params, grads, slots) and params[0].is_cpu):
        return None
    return [leaf["step"].item() + 1 for leaf in slots]


def next_steps(slots: SlotList) -> Tensors:
    """Return the step counts after this step."""
    return [leaf["step"] + 1 for leaf in slots]


def bias_corrections(steps: list[float], beta: float) -> list[float]:
    """Return `1 - beta**step` for each step."""
    return [1 - beta**step for step in steps]


def shrunk(params: Tensors, lr: float, weight_decay: float) -> Tensors:
    """Return parameters after decoupled weight decay."""
    return torch._foreach_mul(params, 1 - lr * weight_decay) if weight_decay else params


def with_penalty(grads: Tensors, params: Tensors, weight_decay: float) -> Tensors:
    """Return the gradients with those of `weight_decay / 2 * (p * p).sum()`."""
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads


def with_decay(
    params: Tensors, grads: Tensors, lr: float, weight_decay: float, decoupled: bool
) -> tuple[Tensors, Tensors]:
    """Return parameters and gradients with the decay in the one or in the other."""
    if decoupled:
        return shrunk(params, lr, weight_decay), grads
    return params, with_penalty(grads, params, weight_decay)


def averages(slots: SlotList, name: str, values: Tensors, kept: float) -> Tensors:
    """Return the running averages of some values."""
    return torch._foreach_lerp([leaf[name] for leaf in slots], values, 1 - kept)


def averages_of_squares(slots: SlotList, name: str, values: Tensors, kept: float) -> Tensors:
    """Return the running averages of the squares of some values."""
    new = torch._foreach_mul([leaf[name] for leaf in slots], kept)
    torch._foreach_addcmul_(new, values, values, value=1 - kept)
    return new


def roots(squares: Tensors, corrections: list[float], eps: float) -> Tensors:
    """Return `sqrt(square / correction) + eps`."""
    new = torch._foreach_div(squares, corrections)
    torch._foreach_sqrt_(new)
    torch._foreach_add_(new, eps)
    return new


def by_leaf(columns: dict[str, Tensors]) -> list[Slots]:
    """Return lists of slots, one list for each name, as slots of each parameter."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
