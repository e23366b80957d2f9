"""The first half of a training step: the gradient of the objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, map_tensors

from ._differentiate import differentiate, on_a_tape
from ._finite import all_finite, select
from ._microbatches import accumulated, nonzero, of_microbatch
from ._objective import Objective, Weight, check_objective, check_result
from ._precision import in_precision
from ._train_state import TrainState, Trees, make, peek


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
    trees = peek(ts)
    grads, loss, stats, st = gradients(objective, data, ts, accumulate, dtype, loss_scale, differentiable)
    if skip_nonfinite:
        st = select(all_finite(loss, grads), st, trees.states)
    new = Trees(trees.parameters, st, trees.optimizer_state, trees.step, trees.skipped)
    return grads, loss, stats, make(ts._statics, new)


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
    trees, model = peek(ts), ts._statics.model
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

        grads, loss, (new, stats, weight) = differentiate(scaled, ps, differentiable=differentiable)
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
        raise InputError(
            "The training state is not a TrainState.",
            expected="(objective, data, ts), in this order",
            got=f"a {type(ts).__name__} as ts",
            fix="Make one: TrainState(model, ps, st, rule).",
        )
