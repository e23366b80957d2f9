"""Steps in place: where the old training state is given away, the new one may live in its memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from luxtorch import optim
from luxtorch._torch import storage_id, storage_users
from luxtorch.core import map_tensors, tensors
from luxtorch.optim._kernels import numbers, unobserved
from luxtorch.optim._leaves import pair
from luxtorch.optim._rule import negative

from ._train_state import TrainState, Trees, make, peek, spend


def update_donated(ts: TrainState, grads: Any, st: Any) -> TrainState | None:
    """Return the training state after a step in the memory of `ts`, which is used up; None if there is no such step.

    The numbers are bit for bit those of `optim.update`, which runs the same kernels on copies. Memory that somebody
    else may hold is copied first, as at the first step. What was made here belongs to nobody else, unless the objective
    has kept or returned the parameters that it was given, or a view of them, in whatever form: then their memory has
    more than one user by torch's own count.

    Args:
        ts: The training state.
        grads: The gradients.
        st: The new states.
    """
    trees, own = peek(ts), ts._own
    layout, state = trees.optimizer_state.layout, trees.optimizer_state.state
    rule = layout.rule
    if not isinstance(rule, optim.LeafwiseRule) or rule.in_place is None or layout.by_component or not unobserved():
        return None
    hyper = rule.hyper_now(state)
    values = numbers(hyper) if isinstance(hyper, Tensor) else None
    if values is None:
        return None
    shared = own is None or sum(map(storage_users, own)) > len(own) * _alone()  # before views of them are made here
    names, params, gs, *_ = pair(trees.parameters, grads)
    frozen = set(layout.frozen)
    if not all(g is None or _readable(p, g) for p, g in zip(params, gs, strict=True)):
        return None
    ps, slots = trees.parameters, state.leaves
    if shared:
        if slots.keys() != set(names) or not all(
            _writable(p, slots[name]) for name, p in zip(names, params, strict=True)
        ):
            return None
        ps = map_tensors(_copy, ps)
        slots = {name: {slot: _copy(value) for slot, value in leaf.items()} for name, leaf in slots.items()}
        own = tuple(storage_id(p) for p in tensors(ps))
        params = pair(ps, None).params
    chosen = [i for i, g in enumerate(gs) if g is not None and names[i] not in frozen]
    if chosen:
        gs = negative(gs) if rule.maximize else gs
        rule.in_place([params[i] for i in chosen], [gs[i] for i in chosen], [slots[names[i]] for i in chosen], *values)
        state = state.after(slots)
    new = Trees(ps, st, optim.OptState(layout, state), trees.step + 1, trees.skipped)
    spend(ts)
    return make(ts._statics, new, own)


@cache
def _alone() -> int:
    """Return what is counted for memory with one user: the count itself may be another."""
    tensor = torch.empty(1)
    return storage_users(storage_id(tensor))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _readable(p: Tensor, g: Tensor) -> bool:
    """Say whether a kernel may read a gradient: it leaves no trace on a tape, and wants no other kind of tensor."""
    return type(g) is Tensor and g.device == p.device and not (g.requires_grad and torch.is_grad_enabled())


def _writable(p: Tensor, slots: dict[str, Tensor]) -> bool:
    """Say whether a kernel may write copies of a parameter and its slots, as far as it reads raw memory."""
    recording = torch.is_grad_enabled()
    return (
        type(p) in (Tensor, torch.nn.Parameter)
        and (p.is_cpu or p.is_cuda)
        and p.is_floating_point()
        and not (recording and p.requires_grad)
        and all(
            value.device == p.device
            and (name == "step" or (value.shape == p.shape and value.dtype == p.dtype))
            and not (recording and value.requires_grad)
            for name, value in slots.items()
        )
    )
