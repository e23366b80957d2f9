"""A function that changes nothing, and shows the gradient that passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tap(tensor: Any, look: Callable[[Tensor], None]) -> Any:
    """Return a tensor as it is; in the backward pass, call a function on its gradient.

    Anything that has no gradient is returned too. It takes part in reverse mode, in forward mode and in vmap; where
    gradients are differentiated again, what flows through the first time is shown.
    """
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return _Tap.apply(tensor, look)


class _Tap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        return tensor.clone()  # a view would forbid a module of torch.nn to write into it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.look = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.look(grad)
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # torch switches forward mode off in here: to an outer one the result of an operator would be a constant.
        return _Tap.apply(tangent, _ignore)  # type: ignore[no-any-return]


def _ignore(grad: Tensor) -> None:
    """Look at nothing: tangents are not watched."""
