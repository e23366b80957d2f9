"""The three products of torch.func that all else is made of, over any trees, with any auxiliary output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import TreeSpec, tree_flatten, tree_map, tree_unflatten

from . import _level
from ._aux import Tree, pack, unpack
from ._forward_rules import differentiable
from ._level import Trees, WithAux


def value_and_gradients(f: WithAux, xs: Trees) -> tuple[Tensor, Tree, Trees]:
    """Return the scalar value of `f(*xs)`, its auxiliary output, and the gradients: trees like the arguments."""
    if _level.usable():
        return _level.value_and_gradients(f, xs)
    transform: Callable[..., Any] = torch.func.grad_and_value(_packed(f), tuple(range(len(xs))), has_aux=True)
    gradients, (value, aux) = transform(*xs)
    return value, unpack(aux), gradients


def vjp(f: WithAux, xs: Trees) -> tuple[Tree, Callable[[Tree], Trees], Tree]:
    """Return the value of `f(*xs)`, its pullback, and the auxiliary output."""
    if _level.usable():
        return _level.vjp(f, xs)
    leaves, spec = tree_flatten(xs)
    if not leaves:
        value, aux = f(*xs)
        return value, lambda u: xs, aux
    transform: Callable[..., Any] = torch.func.vjp
    value, back, aux = transform(_packed(f, spec), *leaves, has_aux=True)
    return value, lambda u: tree_unflatten(back(u), spec), unpack(aux)


def jvp(f: WithAux, xs: Trees, us: Sequence[Tensor]) -> tuple[Tree, Tree, Tree]:
    """Return the value of `f(*xs)`, the product of its Jacobian with vectors, one for each leaf, and the aux."""
    f = differentiable(f)
    if _level.usable():
        return _level.jvp(f, xs, us)
    leaves, spec = tree_flatten(xs)
    if not leaves:
        value, aux = f(*xs)
        return value, tree_map(torch.zeros_like, value), aux
    transform: Callable[..., Any] = torch.func.jvp
    value, product, aux = transform(_packed(f, spec), tuple(leaves), tuple(us), has_aux=True)
    return value, product, unpack(aux)


def _packed(f: WithAux, spec: TreeSpec | None = None) -> WithAux:
    """Return a function whose auxiliary output torch.func lets through; of leaves, where their structure is given."""

    def packed(*args: Any) -> tuple[Tree, Tree]:
        value, aux = f(*args) if spec is None else f(*tree_unflatten(args, spec))
        return value, pack(aux)

    return packed
