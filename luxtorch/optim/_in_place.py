"""Steps that write parameters and slots where they are, for those who own that memory.

They believe what they get: whoever calls one has made sure that nothing observes it (`_fused.unobserved`) and that
the tensors are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import fused_adagrad_, fused_adam_, fused_adamw_

Tensors: TypeAlias = Sequence[Tensor]

Slots: TypeAlias = dict[str, Tensor]
"""What a rule remembers of one parameter."""

InPlace: TypeAlias = Callable[..., None]
"""Takes lists of parameters, gradients and slots, and the hyperparameters as numbers; writes parameters and slots."""


def descent(params: Tensors, grads: Tensors, slots: Sequence[Slots], lr: float) -> None:
    """Take the step of `Descent`."""
    torch._foreach_add_(list(params), list(grads), alpha=-lr)


def momentum(params: Tensors, grads: Tensors, slots: Sequence[Slots], lr: float, momentum: float) -> None:
    """Take the step of `Momentum`."""
    torch._foreach_add_(list(params), _velocity(grads, slots, momentum), alpha=-lr)


def nesterov(params: Tensors, grads: Tensors, slots: Sequence[Slots], lr: float, momentum: float) -> None:
    """Take the step of `Nesterov`."""
    ahead = torch._foreach_add(list(grads), _velocity(grads, slots, momentum), alpha=momentum)
    torch._foreach_add_(list(params), list(ahead), alpha=-lr)


def _velocity(grads: Tensors, slots: Sequence[Slots], momentum: float) -> list[Tensor]:
    velocity = [leaf["velocity"] for leaf in slots]
    return [torch.add(g, v, alpha=momentum, out=v) for g, v in zip(grads, velocity, strict=True)]


def _adam(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    *,
    amsgrad: bool,
) -> None:
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps, "amsgrad": amsgrad}
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else "", "step")
    _run(fused_adam_ if amsgrad else fused_adamw_, params, grads, slots, names, **options)


adam: InPlace = partial(_adam, amsgrad=False)
"""Take the step of `Adam`, and with a decay that of `AdamW`: without, the two are one."""

amsgrad: InPlace = partial(_adam, amsgrad=True)
"""Take the step of `AMSGrad`."""


def adagrad(
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
) -> None:
    """Take the step of `AdaGrad`."""
    options = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
    _run(fused_adagrad_, params, grads, slots, ("sum", "step"), **options)


def _run(
    kernel: Callable[..., None],
    params: Tensors,
    grads: Tensors,
    slots: Sequence[Slots],
    names: Sequence[str],
    **options: Any,
) -> None:
    """Run a fused kernel, which takes the slots with these names, a list each."""
    columns = [[leaf[name] for leaf in slots] if name else [] for name in names]
    torch._foreach_add_(columns[-1], 1)  # the step counts
    kernel(list(params), [g.contiguous() for g in grads], *columns, maximize=False, **options)
