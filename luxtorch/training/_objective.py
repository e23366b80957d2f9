"""What an objective must return, and the errors for what it returns instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from luxtorch.core import DTypeError, InputError

Objective: TypeAlias = Callable[[Any, Any, Any, Any], tuple[Tensor, Any, Any]]
"""A pure function `objective(model, ps, st, data) -> (loss, st, stats)`; every loss of luxtorch is one."""

_FORM = "(loss, st, stats), with a scalar loss, the model's new states and any statistics"


def check_objective(objective: Any) -> None:
    """Raise unless something can be called as an objective."""
    if isinstance(objective, type) or not callable(objective):
        raise DTypeError(
            "The objective is not a function.",
            expected="objective(model, ps, st, data) -> (loss, st, stats)",
            got=f"{objective!r:.80}",
            fix="Make the loss: lt.MSELoss(), not lt.MSELoss." if isinstance(objective, type) else "",
        )


def check_result(result: Any) -> tuple[Tensor, Any, Any]:
    """Return what an objective returned, or raise if it is not what it must be."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        items = isinstance(result, tuple | list)
        raise InputError(
            "The objective did not return three things.",
            expected=_FORM,
            got=f"a {type(result).__name__}" + (f" of {len(result)}" if items else ""),
            fix="Where there are no statistics, return (loss, st, {}).",
        )
    loss, st, stats = result
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
    return loss, st, stats
