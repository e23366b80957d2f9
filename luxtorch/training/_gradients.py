"""Gradients of an objective: what it must return, in which precision, over microbatches, by a tape or by torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch import random
from luxtorch.autodiff._gradient import differentiate
from luxtorch.core import (
    InputError,
    described,
    map_tensors,
    named_leaves,
    out_of_range,
    tensors,
    tree_flatten,
    tree_unflatten,
    wrong_type,
)
from luxtorch.core._sharded import any_sharded, everywhere, own_parts
from luxtorch.core._weighted import watching_means

from ._train_state import TrainState

Objective: TypeAlias = Callable[[Any, Any, Any, Any], tuple[Tensor, Any, Any]]
"""A pure function `objective(model, ps, st, data) -> (loss, st, stats)`; every loss of luxtorch is one.

In place of the loss it may return a pair `(sum, weight)`, whose quotient is the loss, or `(sum, None)`, if the loss of
a batch is the sum of those of its parts.
"""

Weight: TypeAlias = "Tensor | float | None"
"""How much a microbatch counts in a mean; None in a sum."""

_FORM = "(loss, st, stats), with a scalar loss or (sum, weight), the model's new states and any statistics"


def check_objective(objective: Any) -> None:
    """Raise unless something can be called as an objective."""
    if isinstance(objective, type) or not callable(objective):
        fix = "Make the loss: lt.MSELoss(), not lt.MSELoss." if isinstance(objective, type) else ""
        raise wrong_type("objective", objective, "a function of (model, ps, st, data) to (loss, st, stats)", fix=fix)


def check_result(result: Any) -> tuple[Tensor, Weight, Any, Any]:
    """Return the loss and its weight, the states and the stats, or raise if that is not what an objective returned."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        fix = "Where there are no statistics, return (loss, st, {})."
        raise InputError("The objective must return three things.", expected=_FORM, got=described(result), fix=fix)
    loss, st, stats = result
    weight: Weight = 1
    if isinstance(loss, tuple) and len(loss) == 2:
        loss, weight = loss
        _check_weight(weight)
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        fix = "Reduce it, for instance by .mean(), or by agg='mean' in a loss of luxtorch."
        raise InputError("The loss must be a scalar tensor.", expected=_FORM, got=described(loss), fix=fix)
    if not loss.is_floating_point():
        raise wrong_type("The loss", loss, "a real floating point number")
    return loss, weight, st, stats


def _check_weight(weight: Any) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (weight is None or number or (isinstance(weight, Tensor) and weight.ndim == 0)):
        expected = "(sum, weight) with a 0-d tensor or a number, or (sum, None), in the place of the loss"
        raise InputError("The weight of the loss must be a number.", expected=expected, got=described(weight))


def all_finite(*trees: Any) -> Tensor:
    """Return whether all numbers of some trees are finite, as a 0-d boolean tensor."""
    checked = [tensor for tree in trees for tensor in tensors(tree)]
    found = [torch.isfinite(part).all() for part in own_parts(checked)]
    finite = torch.stack(found).all() if found else torch.tensor(True)
    return everywhere(finite, checked) if any_sharded(checked) else finite


def select(ok: Tensor, new: Any, old: Any) -> Any:
    """Return the new tree where `ok` is true and the old one elsewhere, without a branch on the tensor."""
    after, spec = tree_flatten(new)
    before, old_spec = tree_flatten(old)
    if spec != old_spec:
        raise InputError(
            "A step that may be skipped must keep the structure of the states.",
            expected=str(old_spec),
            got=str(spec),
            fix="Start from states that are made by one call of the model, or leave skip_nonfinite=True out.",
        )
    chosen = [b if a is b else _chosen(ok.to(a.device), a, b) for a, b in zip(after, before, strict=True)]
    return tree_unflatten(chosen, spec)


def _chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return random.where(ok, new, old) if new.dtype == old.dtype == torch.uint64 else torch.where(ok, new, old)


class InPrecision:
    """Call a model in some precision: parameters and inputs are cast on the way in, outputs and states on the way out.

    Derivatives flow through the casts, so that gradients have the parameters' own dtype. Losses are computed from
    outputs that are cast back: outside the model, nothing is in low precision. States are passed as they are, since
    running statistics should not lose precision; the new ones get the dtypes of the old.

    Args:
        model: The model.
        dtype: What it computes in.
        back: What its outputs are cast to.
    """

    def __init__(self, model: Any, dtype: torch.dtype, back: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.back = back

    def __call__(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Return the model's output and states."""
        y, new = self.model(_cast(x, self.dtype), _cast(ps, self.dtype), st)
        return _cast(y, self.back), _like(new, st)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def in_precision(model: Any, dtype: torch.dtype, ps: Any) -> InPrecision:
    """Return a model that computes in some precision, and whose outputs have that of the parameters."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise wrong_type("dtype", dtype, "a floating point dtype, for instance torch.bfloat16")
    numbers = (leaf.real.dtype for leaf in tensors(ps))
    masters = (dtype for dtype in numbers if dtype.is_floating_point)
    return InPrecision(model, dtype, next(masters, torch.float32))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, tree)


def _like(new: Any, old: Any) -> Any:
    """Return states in the dtypes of the states before, where there is one."""
    before, spec = tree_flatten(old)
    after, new_spec = tree_flatten(new)
    if new_spec != spec:
        return new
    return tree_unflatten([a.to(b.dtype) for a, b in zip(after, before, strict=True)], spec)


def split_data(data: Any, n: int) -> list[Any]:
    """Return the data in `n` parts of equal size along the first dimension of its tensors.

    Tensors without dimensions, and leaves that are no tensors, are in every part.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise out_of_range("accumulate", n, "a positive integer")
    leaves, spec = tree_flatten(data)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0}
    if len(sizes) != 1 or (size := sizes.pop()) % n or not size:
        found = ((name, leaf) for name, leaf in named_leaves(data) if isinstance(leaf, Tensor))
        shapes = ", ".join(f"{name or 'data'} {tuple(leaf.shape)}" for name, leaf in found)
        raise InputError(
            "Microbatches must be of equal size.",
            expected=f"tensors whose first dimension is the same multiple of {n}",
            got=shapes or described(data),
            fix="Choose another accumulate, or drop the last batch of the loader.",
        )
    parts = [
        torch.split(leaf, size // n) if isinstance(leaf, Tensor) and leaf.ndim > 0 else (leaf,) * n for leaf in leaves
    ]
    return [tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def accumulated(
    gradients: Callable[[Any, Any], tuple[Any, Tensor, Any, Any, Weight]], data: Any, st: Any, n: int
) -> tuple[Any, Tensor, Any, Any]:
    """Return gradients and loss of the whole from those of microbatches, a tuple of stats, and the last states.

    Args:
        gradients: Takes a microbatch and states to gradients, loss, stats, new states and the weight in the mean.
        data: The data of all.
        st: The states before the first; each microbatch gets those of the one before.
        n: How many there are.
    """
    total: list[Tensor] = []
    losses, weights, all_stats, grads, unit = [], [], [], None, None
    for part in split_data(data, n):
        grads, loss, stats, st, weight = gradients(part, st)
        if isinstance(weight, int | float):  # microbatches of one size: a number too large for float16 is spared
            unit = unit or weight
            weight = weight / unit if unit else weight
        found = [_times(g, nonzero(weight)) for g in tensors(grads)]  # which is what it was divided by
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        losses.append(_times(loss, nonzero(weight)))
        weights.append(weight)
        all_stats.append(stats)
    whole = torch.stack(losses).sum()
    if all(weight is None for weight in weights):
        means, value = iter(total), whole
    else:
        by: Any = sum(0 if weight is None else weight for weight in weights)
        means, value = iter([_over(g, nonzero(by)) for g in total]), _over(whole, by)
    return map_tensors(lambda _: next(means), grads), value, tuple(all_stats), st


def of_microbatch(objective: Objective) -> Objective:
    """Return an objective that refuses a number where a weighted mean was taken: the mean of such is another one."""

    def called(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return objective(*args)
        with watching_means() as taken:
            result = objective(*args)
        told = isinstance(result, tuple | list) and bool(result) and isinstance(result[0], tuple)
        if taken and not told:
            raise InputError(
                "The mean over microbatches must be weighted where their weights differ.",
                expected="an objective that returns ((sum, weight), st, stats)",
                got=f"a number, though {taken[0]!r} weighs its targets or leaves some out",
                fix="Return loss.sum_and_weight(y_hat, y) in the place of loss(y_hat, y).",
            )
        return result

    return called


def nonzero(weight: Any) -> Any:
    """Return a weight, but 1 for none and for 0, as where all targets are ignored."""
    return torch.where(weight == 0, 1, weight) if isinstance(weight, Tensor) else weight or 1


def _times(x: Tensor, weight: Weight) -> Tensor:
    if weight is None or (not isinstance(weight, Tensor) and weight == 1):
        return x
    return (x * (weight.to(x.device) if isinstance(weight, Tensor) else weight)).to(x.dtype)


def _over(x: Tensor, weight: Any) -> Tensor:
    return (x / (weight.to(x.device) if isinstance(weight, Tensor) else weight)).to(x.dtype)


def on_a_tape(*trees: Any) -> bool:
    """Say whether a tensor of some trees is recorded by autograd at the moment."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tree in trees for tensor in tensors(tree))


def compute_gradients(
    objective: Objective,
    data: Any,
    ts: TrainState,
    *,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    loss_scale: float | Tensor | None = None,
    skip_nonfinite: bool = False,
    differentiable: bool = False,
) -> tuple[Any, Tensor, Any, TrainState]:
    """Compute the gradient of an objective with respect to the parameters.

    Outermost, the gradient is taken by the plain tape, which is cheap, keeps torch's fused kernels, and lets the
    objective call `torch.autograd.grad` itself; inside of transforms and of torch.compile it is that of torch.func. The
    numbers are the same. The objective is called once, or once for each microbatch.

    What is returned is on no autograd tape, even if the objective closes over a `torch.nn.Module` that is not frozen,
    or the data require gradients. To differentiate whole steps, take a transform of torch.func; on the plain tape, put
    the parameters or states of `ts` on it, or say `differentiable=True`.

    Args:
        objective: A pure function `objective(model, ps, st, data) -> (loss, st, stats)`; any loss of luxtorch is one.
        data: What it takes.
        ts: The training state.
        accumulate: In how many microbatches to compute. The tensors of `data` are split along their first dimension,
            states go from one microbatch to the next, and gradients and losses are averaged. There is then a tuple
            of stats, one for each. The result is that of the whole batch for every loss of luxtorch: weights of
            classes, ignored targets and `agg="sum"` included. An objective of your own that returns a number is
            averaged as a plain mean over the samples; if it is another mean, or a sum, have it return
            `(sum, weight)` in the place of the loss, for instance `loss.sum_and_weight(y_hat, y)`.
        dtype: What the model computes in, such as `torch.bfloat16`. Its parameters and inputs are cast to it and its
            outputs back; gradients and parameters keep their dtype, and so do complex tensors. It is the model passed
            to the objective that casts: what the objective computes without it stays as it is.
        loss_scale: A factor on the loss while it is differentiated, taken off the gradients afterwards, so that
            those of float16 do not become zero; 1024 for instance.
        skip_nonfinite: Whether to return the states as they were where the loss or a gradient is not finite.
        differentiable: Whether all that is returned is on the autograd tape of data and of what the objective closes
            over, as in `torch.optim`. It is where parameters or states of `ts` are on a tape already.

    Returns:
        `(grads, loss, stats, ts)`: the gradients, a tree like the parameters; the loss; the stats; and the training
        state with the new states of the model.

    Raises:
        InputError: If the objective returns something else, or the data cannot be split.
        DTypeError: If a parameter cannot be differentiated.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import optim, training
        >>> model = lt.Scale(1, bias=False)
        >>> ts = training.TrainState(model, *lt.setup(0, model), optim.Descent(0.1))
        >>> data = torch.ones(2, 1), torch.zeros(2, 1)
        >>> grads, loss, stats, ts = training.compute_gradients(lt.MSELoss(), data, ts)
        >>> grads, loss
        ({'weight': tensor([2.])}, tensor(1.))

    Source: `Training.compute_gradients` of Lux.
    """
    check_state(ts)
    trees = ts._trees
    grads, loss, stats, st = gradients(objective, data, ts, accumulate, dtype, loss_scale, differentiable)
    if skip_nonfinite:
        st = select(all_finite(loss, grads), st, trees.states)
    return grads, loss, stats, ts._with(trees._replace(states=st))


def gradients(
    objective: Objective,
    data: Any,
    ts: TrainState,
    accumulate: int,
    dtype: torch.dtype | None,
    loss_scale: float | Tensor | None,
    differentiable: bool,
) -> tuple[Any, Tensor, Any, Any]:
    """Return gradients, loss, stats and new states."""
    check_objective(objective)
    trees, model = ts._trees, ts._statics.model
    ps = trees.parameters
    if dtype is not None:
        model = in_precision(model, dtype, ps)
    differentiable = differentiable or on_a_tape(ps, trees.states)
    called: Objective = objective

    def gradients_of(data: Any, st: Any) -> tuple[Any, Tensor, Any, Any, Weight]:
        def scaled(ps: Any) -> tuple[Tensor, Any]:
            loss, weight, new, stats = check_result(called(model, ps, st, data))
            if weight is not None and not (isinstance(weight, int) and weight == 1):
                loss = loss / (weight if accumulate == 1 else nonzero(weight))
            return loss if loss_scale is None else loss * loss_scale, (new, stats, weight)

        loss, (new, stats, weight), grads = differentiate(scaled, ps, differentiable=differentiable)
        if loss_scale is not None:
            grads, loss = map_tensors(lambda g: (g / loss_scale).to(g.dtype), grads), (loss / loss_scale).to(loss.dtype)
        return grads, loss, stats, new, weight

    if accumulate == 1:
        return gradients_of(data, trees.states)[:4]
    called = getattr(objective, "of_microbatch", None) or of_microbatch(objective)  # a loss knows what it divides by
    return accumulated(gradients_of, data, trees.states, accumulate)


def check_state(ts: Any) -> None:
    """Raise unless the argument is a training state."""
    if not isinstance(ts, TrainState):
        fix = "The order is (objective, data, ts), with ts = TrainState(model, ps, st, rule)."
        raise InputError("ts must be a TrainState.", got=described(ts), fix=fix)
