"""What an objective must return, and the errors for what it returns instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from luxtorch.core import DTypeError, InputError

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
        raise DTypeError(
            "The objective is not a function.",
            expected="objective(model, ps, st, data) -> (loss, st, stats)",
            got=f"{objective!r:.80}",
            fix="Make the loss: lt.MSELoss(), not lt.MSELoss." if isinstance(objective, type) else "",
        )


def check_result(result: Any) -> tuple[Tensor, Weight, Any, Any]:
    """Return the loss and its weight, the states and the stats, or raise if that is not what an objective returned."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        items = isinstance(result, tuple | list)
        raise InputError(
            "The objective did not return three things.",
            expected=_FORM,
            got=f"a {type(result).__name__}" + (f" of {len(result)}" if items else ""),
            fix="Where there are no statistics, return (loss, st, {}).",
        )
    loss, st, stats = result
    weight: Weight = 1
    if isinstance(loss, tuple) and len(loss) == 2:
        loss, weight = loss
        _check_weight(weight)
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        raise InputError(
            "The objective did not return a scalar loss.",
            expected=_FORM,
            got=f"a loss of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a loss that is a {type(loss).__name__}",
            fix="Reduce it, for instance by .mean(), or by agg='mean' in a loss of luxtorch.",
        )
    if not loss.is_floating_point():
        raise DTypeError("The loss is not a real floating point number.", expected=_FORM, got=str(loss.dtype))
    return loss, weight, st, stats


def _check_weight(weight: Any) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (weight is None or number or (isinstance(weight, Tensor) and weight.ndim == 0)):
        raise InputError(
            "The weight of the loss is not a number.",
            expected="(sum, weight) with a 0-d tensor or a number, or (sum, None), in the place of the loss",
            got=f"a tensor of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"{weight!r:.80}",
        )
