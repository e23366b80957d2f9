"""The two products of torch.func that all else is made of: over lists of tensors, with auxiliary output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ._aux import Tree

WithAux = Callable[..., tuple[Tree, Tree]]
Tensors = tuple[Tensor, ...]


def vjp(f: WithAux, xs: Tensors) -> tuple[Tree, Callable[[Tree], Tensors], Tree]:
    """Return the value of `f(*xs)`, its pullback, and the auxiliary output."""
    if not xs:
        value, aux = f()
        return value, lambda u: (), aux
    transform: Callable[..., Any] = torch.func.vjp
    value, back, aux = transform(f, *xs, has_aux=True)
    return value, back, aux


def jvp(f: WithAux, xs: Tensors, us: Tensors) -> tuple[Tree, Tree, Tree]:
    """Return the value of `f(*xs)`, the product of its Jacobian with `us`, and the auxiliary output."""
    if not xs:
        value, aux = f()
        return value, pytree.tree_map(torch.zeros_like, value), aux
    transform: Callable[..., Any] = torch.func.jvp
    value, product, aux = transform(f, xs, us, has_aux=True)
    return value, product, aux
