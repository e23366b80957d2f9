"""Training steps: gradient and update in one, in the memory of a training state that is donated where that can be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from luxtorch import optim
from luxtorch._torch import storage_id, storage_users
from luxtorch._transforms import transformed
from luxtorch.core import map_tensors, tensors
from luxtorch.core._sharded import any_sharded, own_parts
from luxtorch.optim._kernels import numbers, unobserved
from luxtorch.optim._leaves import pair, rebuild
from luxtorch.optim._rule import negative
from luxtorch.optim._update import changing_rate

from ._gradients import Objective, all_finite, check_state, gradients, select
from ._train_state import TrainState, Trees


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
    trees, owned = ts._trees, ts._owned
    layout, state = trees.optimizer_state.layout, trees.optimizer_state.state
    rule = layout.rule
    if not isinstance(rule, optim.LeafwiseRule) or rule.in_place is None or layout.by_component or not unobserved():
        return None
    hyper = rule.hyper_now(state)
    values = numbers(hyper) if isinstance(hyper, Tensor) else None
    if values is None:
        return None
    shared = (
        owned is None or sum(map(storage_users, owned)) > len(owned) * _alone()
    )  # before views of them are made here
    names, params, gs, *_ = pair(trees.parameters, grads)
    sharded = any_sharded(params)
    own = own_parts if sharded else _same
    if sharded and not rule.elementwise():
        return None
    params, gs = own(params), own(gs)
    frozen = set(layout.frozen)
    if not all(g is None or _readable(p, g) for p, g in zip(params, gs, strict=True)):
        return None
    ps, slots = trees.parameters, state.leaves
    if shared:
        parts = own(slots)
        if slots.keys() != set(names) or not all(_writable(p, parts[n]) for n, p in zip(names, params, strict=True)):
            return None
        ps = map_tensors(_copy, ps)
        slots = {name: {slot: _copy(value) for slot, value in leaf.items()} for name, leaf in slots.items()}
        owned = tuple(storage_id(p) for p in own(tensors(ps)))
        params = own(pair(ps, None).params)
    chosen = [i for i, g in enumerate(gs) if g is not None and names[i] not in frozen]
    if chosen:
        gs = negative(gs) if rule.maximize else gs
        remembered = [own(slots[names[i]]) for i in chosen]
        rule.in_place([params[i] for i in chosen], [gs[i] for i in chosen], remembered, *values)
        state = state.after(slots)
    new = Trees(ps, st, optim.OptState(layout, state), trees.step + 1, trees.skipped)
    ts._give_away()
    return ts._with(new, owned)


def _placed(grads: Any, ts: TrainState) -> Any:
    """Return gradients whose sums over ranks are taken: of summands nobody knows whether the sum is finite."""
    ps = ts._trees.parameters
    return rebuild(ps, iter(pair(ps, grads).grads)) if any_sharded(tensors(ps)) else grads


def _same(tree: Any) -> Any:
    return tree


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


def apply_gradients(
    ts: TrainState, grads: Any, *, skip_nonfinite: bool = False, donate: bool = False, **extra: Any
) -> TrainState:
    """Take the optimizer's step.

    To clip gradients is a matter of the rule: `optim.OptimiserChain(optim.ClipNorm(1.0), optim.Adam())`.

    Args:
        ts: The training state.
        grads: The gradients, a tree like the parameters. Where there is none, or None, the parameter and what the
            optimizer remembers of it are left alone, and so are frozen parameters.
        skip_nonfinite: Whether to leave parameters, optimizer and step as they were where a gradient is not finite,
            and count that in `ts.skipped` instead.
        donate: Whether `ts` may be used up; see `single_train_step`.
        **extra: What the rule asks for besides, such as `value`, the loss; see `luxtorch.optim.update`.

    Returns:
        The new training state.

    Raises:
        KeyNameError: If the gradients have a name that the parameters lack.
        InputError: If their structure or a shape differs from that of the parameters.
        DTypeError: If a dtype does.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import optim, training
        >>> model = lt.Scale(1)
        >>> ts = training.TrainState(model, *lt.setup(0, model), optim.Descent(0.1))
        >>> ts = training.apply_gradients(ts, {"weight": torch.ones(1)})
        >>> ts.parameters["weight"], ts.step
        (tensor([0.9000]), tensor(1))

    Source: `Training.apply_gradients` of Lux.
    """
    check_state(ts)
    ok = None
    if skip_nonfinite:
        grads = _placed(grads, ts)
        ok = all_finite(grads)
    return _stepped(ts, grads, ts._trees.states, ok, donate, extra)


def single_train_step(
    objective: Objective,
    data: Any,
    ts: TrainState,
    *,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    loss_scale: float | Tensor | None = None,
    skip_nonfinite: bool = False,
    donate: bool = False,
    differentiable: bool = False,
) -> tuple[Any, Tensor, Any, TrainState]:
    """Compute the gradient of an objective and take the optimizer's step.

    It is `compute_gradients`, then `apply_gradients`. The whole of it can be compiled and batched by `torch.vmap`.

    Args:
        objective: A pure function `objective(model, ps, st, data) -> (loss, st, stats)`; any loss of luxtorch is one.
        data: What it takes.
        ts: The training state.
        accumulate: In how many microbatches to compute; see `compute_gradients`.
        dtype: What the model computes in; see `compute_gradients`.
        loss_scale: A factor on the loss while it is differentiated; see `compute_gradients`.
        skip_nonfinite: Whether to leave out the step where the loss or a gradient is not finite: parameters, states,
            optimizer and `step` are then as they were, and `skipped` is one more.
        donate: Whether `ts` may be used up: its memory is reused where torch can update in place, and each later use
            of it is an error. The numbers are the same. Only memory that the steps themselves have made is reused,
            and none that was read out of `ts` or that the objective has kept of its parameters: no tensor outside of it
            changes. (Not noticed is what a compiled function returns of the optimizer's state as it is, and an
            `UntypedStorage`: clone these.) Inside of transforms and of a compiler it has no effect.
        differentiable: Whether the step is on the autograd tape of what the objective closes over; see
            `compute_gradients`.

    Returns:
        `(grads, loss, stats, ts)`: the gradients, the loss and the stats before the step, and the new training state.
        Where the learning rate follows a schedule, or `optim.ReduceLROnPlateau`, stats that are a dict without "rate"
        get it: that of this step, as from `optim.rate`.

    Raises:
        InputError: If the objective returns something else, or the data cannot be split.
        LuxtorchError: If `ts` was donated to an earlier step.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import optim, training
        >>> def objective(model, ps, st, data):
        ...     x, y = data
        ...     y_hat, st = model(x, ps, st)
        ...     return (y_hat - y).square().mean(), st, {"largest": y_hat.max()}
        >>> model = lt.Scale(1)
        >>> ts = training.TrainState(model, *lt.setup(0, model), optim.Descent(0.25))
        >>> data = torch.ones(2, 1), torch.zeros(2, 1)
        >>> grads, loss, stats, ts = training.single_train_step(objective, data, ts)
        >>> loss, stats, ts.parameters
        (tensor(1.), {'largest': tensor(1.)}, {'weight': tensor([0.5000]), 'bias': tensor([-0.5000])})

    Source: `Training.single_train_step` of Lux; `donate=True` stands for `single_train_step!`.
    """
    check_state(ts)
    grads, loss, stats, st = gradients(objective, data, ts, accumulate, dtype, loss_scale, differentiable)
    stats = _with_rate(stats, ts)
    ok = None
    if skip_nonfinite:
        grads = _placed(grads, ts)
        ok = all_finite(loss, grads)
    return grads, loss, stats, _stepped(ts, grads, st, ok, donate, {"value": loss})


def _with_rate(stats: Any, ts: TrainState) -> Any:
    """Return the stats of a step with the learning rate in them, where it changes and there is room for it."""
    if not isinstance(stats, dict) or "rate" in stats:
        return stats
    rate = changing_rate(ts._trees.optimizer_state)
    return stats if rate is None else {**stats, "rate": rate}


def _stepped(
    ts: TrainState, grads: Any, st: Any, ok: Tensor | None, donate: bool, extra: Mapping[str, Any]
) -> TrainState:
    """Return the training state after a step, or where `ok` is false as it was."""
    old = ts._trees
    if donate and ok is None:
        new = update_donated(ts, grads, st)
        if new is not None:
            return new
    optimizer_state, ps = optim.update(old.optimizer_state, old.parameters, grads, **extra)
    trees = Trees(ps, st, optimizer_state, old.step + 1, old.skipped)
    if ok is not None:
        kept = old._replace(skipped=old.skipped + 1)
        trees = Trees(*(select(ok, after, before) for after, before in zip(trees, kept, strict=True)))
    if donate and not transformed():
        ts._give_away()
    return ts._with(trees)
