"""The gradient of a training step: by the plain tape where nothing else looks on, true to torch.func elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.autodiff import withgradient
from luxtorch.autodiff._level import gradients
from luxtorch.autodiff._trees import map_tensors, tensors
from luxtorch.components import ComponentVector
from luxtorch.components._reading import split_once
from luxtorch.core import InputError

from ._observed import on_other_tapes

Objective = Callable[[Any], tuple[Tensor, Any]]


def differentiate(f: Objective, ps: Any) -> tuple[Any, Tensor, Any]:
    """Return the gradient of `f` at the parameters, its value, and what it returns besides.

    The plain tape costs less than a transform and lets torch's fused kernels be used, with the same numbers. But an
    outer transform or an outer tape would not see through it: where there is one, the gradient is torch.func's.

    Args:
        f: Takes the parameters to `(value, aux)`.
        ps: The parameters.
    """
    found = None if transformed() else _by_tape(f, ps)
    if found is not None:
        return found
    (value, aux), grads = withgradient(f, ps, has_aux=True)
    return grads, value, aux


def _by_tape(f: Objective, ps: Any) -> tuple[Any, Tensor, Any] | None:
    """Return the same by torch.autograd.grad, or None where an outer tape or a wrong parameter forbids it."""
    if torch.is_inference_mode_enabled():
        raise InputError("There are no gradients in inference mode.", fix="Use torch.no_grad() instead.")
    outer = torch.is_grad_enabled()
    if not all(_fits(p, outer) for p in tensors(ps)):
        return None
    tree = map_tensors(lambda p: p.detach().requires_grad_(), ps)
    if isinstance(tree, ComponentVector):
        tree = split_once(tree)
    inputs = tensors(tree)
    if not inputs:
        return None
    with torch.enable_grad():
        value, aux = f(tree)
    recorded = [value]

    def cut(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            recorded.append(tensor)
            return tensor.detach()
        return tensor

    aux = map_tensors(cut, aux)
    if outer and on_other_tapes(recorded, inputs):
        return None
    remaining = iter(gradients((value,), None, inputs, retain=False, create=False))
    return map_tensors(lambda _: next(remaining), tree), value.detach(), aux


def _fits(p: Tensor, outer: bool) -> bool:
    """Say whether the plain tape may be used for a parameter, which is on no outer tape then."""
    return (p.is_floating_point() or p.is_complex()) and not (outer and p.requires_grad)
