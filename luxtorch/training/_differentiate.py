"""The gradient of a training step: by the plain tape where nothing else looks on, true to torch.func elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.autodiff import withgradient
from luxtorch.autodiff._torch_func import gradients
from luxtorch.components import ComponentVector
from luxtorch.components._views import split_once
from luxtorch.core import InputError, map_tensors, tensors

Objective = Callable[[Any], tuple[Tensor, Any]]


def differentiate(f: Objective, ps: Any, *, differentiable: bool) -> tuple[Any, Tensor, Any]:
    """Return the gradient of `f` at the parameters, its value, and what it returns besides; `f` is called once.

    The plain tape costs less than a transform and lets torch's fused kernels be used, with the same numbers. But an
    outer transform or an outer tape would not see through it: where one is to see all, the gradient is torch.func's.

    Args:
        f: Takes the parameters to `(value, aux)`.
        ps: The parameters.
        differentiable: Whether the results are to be on the tape of what `f` closes over.
    """
    found = None if differentiable or transformed() else _by_tape(f, ps)
    if found is not None:
        return found
    (value, aux), grads = withgradient(f, ps, has_aux=True)
    return grads, value, aux


def _by_tape(f: Objective, ps: Any) -> tuple[Any, Tensor, Any] | None:
    """Return the same by torch.autograd.grad, on no tape at all, or None where a parameter forbids it."""
    if torch.is_inference_mode_enabled():
        raise InputError("There are no gradients in inference mode.", fix="Use torch.no_grad() instead.")
    if not all(p.is_floating_point() or p.is_complex() for p in tensors(ps)):
        return None
    tree = map_tensors(lambda p: p.detach().requires_grad_(), ps)
    if isinstance(tree, ComponentVector):
        tree = split_once(tree)
    inputs = tensors(tree)
    if not inputs:
        return None
    with torch.enable_grad():
        value, aux = f(tree)
    aux = map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, aux)
    remaining = iter(gradients((value,), None, inputs, retain=False, create=False))
    return map_tensors(lambda _: next(remaining), tree), value.detach(), aux


def on_a_tape(*trees: Any) -> bool:
    """Say whether a tensor of some trees is recorded by autograd at the moment."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tree in trees for tensor in tensors(tree))
