"""Which tensors an operator writes to. Those of batch normalization write to the running statistics in secret."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

# What the schemas of these operators calls inputs, they write to, where they train.
_STATISTICS = ("running_mean", "running_var")
_UNSAID = (
    _aten.native_batch_norm,
    _aten.cudnn_batch_norm,
    _aten.miopen_batch_norm,
    _aten.batch_norm_update_stats,
    _aten.batch_norm_gather_stats,
    _aten.batch_norm_gather_stats_with_counts,
)


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call of an operator writes to."""
    if not isinstance(func, torch._ops.OpOverload):
        return []
    said, unsaid = _places(func)
    places = said
    if unsaid and arguments(func, args, kwargs).get("training", True):
        places = said + unsaid
    return tensors_in(args[i] if i < len(args) else kwargs.get(name) for i, name in places)


def as_it_writes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Return what does the same as a call of an operator in operators whose schemas say what they write to.

    None stands for an operator that has no such form.
    """
    said, unsaid = _places(func) if isinstance(func, torch._ops.OpOverload) else ((), ())
    given = arguments(func, args, kwargs) if unsaid or func in _BACKWARD else {}
    if given.get("running_mean") is None or given.get("running_var") is None:
        return func  # type: ignore[no-any-return]
    if func in _BACKWARD:
        return _backward
    if not given.get("training", True):
        return func  # type: ignore[no-any-return]
    return _FORWARD.get(func)


def arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an operator by their names, with the defaults."""
    known = func._schema.arguments
    given = {one.name: one.default_value for one in known if one.has_default_value()}
    return given | dict(zip((one.name for one in known), args, strict=False)) | dict(kwargs)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operator, also those in lists."""
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]


@functools.cache
def _places(func: Any) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]:
    """Return which arguments an operator writes to as its schema says, and which in secret."""
    places = list(enumerate(func._schema.arguments))
    said = tuple((i, one.name) for i, one in places if one.alias_info is not None and one.alias_info.is_write)
    secret = func.overloadpacket in _UNSAID
    return said, tuple((i, one.name) for i, one in places if secret and one.name in _STATISTICS)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize in training as `native_batch_norm` does, and write the statistics for all to see."""
    y, mean, inverse, new_mean, new_var = _aten._native_batch_norm_legit_functional.default(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    _aten.copy_.default(running_mean, new_mean)
    _aten.copy_.default(running_var, new_var)
    return y, mean, inverse


def _cudnn(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    # Their backward gets what cuDNN keeps for itself, which is nothing here.
    return *_batch_norm(x, *others), _aten.new_empty.default(x, [0], dtype=torch.uint8)


def _backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse: Tensor,
    eps: float,
    *reserve: Tensor,
) -> Any:
    # The backward pass that goes with `_batch_norm`.
    return _aten.native_batch_norm_backward.default(
        grad, x, weight, running_mean, running_var, mean, inverse, True, eps, [True, True, True]
    )


_FORWARD: dict[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.cudnn_batch_norm.default: _cudnn,
    _aten.miopen_batch_norm.default: _batch_norm,
}
_BACKWARD = (_aten.cudnn_batch_norm_backward.default, _aten.miopen_batch_norm_backward.default)
