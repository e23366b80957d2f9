"""What operators do beside what they return: effects such as printing, and tensors that they write to."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._library.effects import EffectType

EFFECTS: set[Any] = set()
"""The operators of luxtorch that have effects."""


def register_effect(operator: Any) -> None:
    """Let all compilers keep the calls of an operator, and their order."""
    EFFECTS.add(operator)
    torch.library._register_effectful_op(operator, EffectType.ORDERED)


def has_effects(graph: fx.GraphModule) -> bool:
    """Tell whether an operator of a graph has effects."""
    return any(is_effect(node) for node in graph.graph.nodes)


def is_effect(node: fx.Node) -> bool:
    """Tell whether a node of a graph has effects."""
    return node.op == "call_function" and node.target in EFFECTS


_aten = torch.ops.aten

# In training, these operators write to arguments that their schemas declare as inputs.
_STATISTICS = ("running_mean", "running_var")
_UNDECLARED = (
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
    declared, undeclared = _places(func)
    places = declared
    if undeclared and arguments(func, args, kwargs).get("training", True):
        places = declared + undeclared
    return tensors_in(args[i] if i < len(args) else kwargs.get(name) for i, name in places)


def writes(func: Any) -> bool:
    """Tell whether an operator may write to an argument; of one whose schema is not known, that it may."""
    if not isinstance(func, torch._ops.OpOverload):
        return func is not operator.getitem
    return func._schema.is_mutable or func.overloadpacket in _UNDECLARED


def with_declared_writes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Return a function that does the same as an operator, by operators that declare all their writes.

    None means that there is no such function.
    """
    declared, undeclared = _places(func) if isinstance(func, torch._ops.OpOverload) else ((), ())
    given = arguments(func, args, kwargs) if undeclared or func in _BACKWARD else {}
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
    """Return the arguments that an operator writes to: those in its schema, and undeclared ones."""
    places = list(enumerate(func._schema.arguments))
    declared = tuple((i, one.name) for i, one in places if one.alias_info is not None and one.alias_info.is_write)
    secret = func.overloadpacket in _UNDECLARED
    return declared, tuple((i, one.name) for i, one in places if secret and one.name in _STATISTICS)


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
    """Normalize in training as `native_batch_norm` does, with declared writes to the statistics."""
    y, mean, inverse, new_mean, new_var = _aten._native_batch_norm_legit_functional.default(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    _aten.copy_.default(running_mean, new_mean)
    _aten.copy_.default(running_var, new_var)
    return y, mean, inverse


def _cudnn(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    # The backward pass gets the reserve of cuDNN, which is empty here.
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
