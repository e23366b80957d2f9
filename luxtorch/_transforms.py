"""Detect active transforms of torch.func, tracers and dispatch modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._torch import (
    TRACERS,
    TransformType,
    all_transforms,
    batch_dim_of,
    below_transform,
    compile_constant,
    current_autograd_node,
    dispatch_modes,
    forward_level,
    get_dispatch_mode,
    get_unwrapped,
    innermost_transform,
    is_batched,
    is_wrapped,
    level_of,
    saved_tensors_hooks,
    tangent_of,
)


def transformed() -> bool:
    """Tell whether a transform of torch.func, forward-mode differentiation or a compiler is at work.

    Some of torch's fused kernels have no rule for these; where this is False they may be used. An ordinary
    autograd tape does not count: every kernel knows it.

    Example:
        >>> import torch
        >>> transformed(), bool(torch.func.vmap(lambda x: x + transformed())(torch.zeros(1)))
        (False, True)
    """
    return torch.compiler.is_compiling() or functional()


def functional() -> bool:
    """Tell whether a transform of torch.func or forward-mode differentiation is at work, compiled or not."""
    return innermost_transform() is not None or forward_level() >= 0


def watched() -> bool:
    """Tell whether a dispatch mode sees every operator, as when `jit` traces: a tensor may have no numbers then."""
    return dispatch_modes() > 0


def readable(tensor: Tensor) -> bool:
    """Tell whether the numbers of a tensor are seen without waiting for a device, and are what later calls will get."""
    return tensor.device.type == "cpu" and not (transformed() or watched())


def traced() -> bool:
    """Tell whether operators are recorded, or run on tensors without numbers, instead of being run."""
    return torch.compiler.is_compiling() or any(map(get_dispatch_mode, TRACERS))


_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silenced() -> Iterator[None]:
    """Leave out what `lt.debug` would do, for a while: what is computed again has been seen before."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def is_silenced() -> bool:
    """Tell whether what `lt.debug` would do is left out."""
    return _SILENT.get()


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor behind one that transforms of torch.func have wrapped; under vmap, the whole batch."""
    while is_wrapped(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def vmap_levels(tensor: Tensor) -> tuple[int, ...]:
    """Return the levels of the vmaps to which a tensor is a batch."""
    levels = []
    while is_wrapped(tensor):
        if is_batched(tensor):
            levels.append(level_of(tensor))
        tensor = get_unwrapped(tensor)
    return tuple(levels)


@compile_constant
def reverse_alone() -> bool:
    """Tell whether nothing is at work but an autograd tape and at most one reverse-mode transform of torch.func."""
    kinds = [kind for kind in _kinds() if kind != TransformType.Functionalize]
    return forward_level() < 0 and kinds in ([], [TransformType.Grad])


def differentiated() -> bool:
    """Tell whether a transform of torch.func, or forward mode, differentiates what is computed now."""
    kinds = _kinds()
    return forward_level() >= 0 or TransformType.Grad in kinds or TransformType.Jvp in kinds


@compile_constant
def derivatives() -> int:
    """Return how many derivatives are taken of what is computed now, those of an autograd tape left out."""
    kinds = _kinds()
    forward = kinds.count(TransformType.Jvp)
    return kinds.count(TransformType.Grad) + (forward or int(forward_level() >= 0))


@compile_constant
def vectorized() -> bool:
    """Tell whether a vmap is at work."""
    return TransformType.Vmap in _kinds()


def recorders(tensor: Tensor) -> tuple[int, bool]:
    """Return how many transforms differentiate a tensor, in any mode, and whether an autograd tape records it."""
    top = innermost_transform()
    if top is None:
        dual = forward_level() >= 0 and tangent_of(tensor) is not None
        return int(dual), tensor.requires_grad
    kind = top.key()
    here = kind == TransformType.Grad and tensor.requires_grad
    here = here or (kind == TransformType.Jvp and tangent_of(tensor) is not None)
    below = get_unwrapped(tensor) if is_wrapped(tensor) and level_of(tensor) == top.level() else tensor
    with below_transform():
        number, taped = recorders(below)
    return number + here, taped


def sample(tensor: Tensor) -> Tensor:
    """Return the plain tensor behind one that transforms have wrapped; under vmap, the first of the batch.

    It is to be called outside of all transforms.
    """
    if not is_wrapped(tensor):
        return tensor.detach()
    dim = batch_dim_of(tensor) if is_batched(tensor) else None
    below = sample(get_unwrapped(tensor))
    return below if dim is None else below.select(dim, 0)


def in_reverse() -> bool:
    """Tell whether a transform of torch.func differentiates what is computed now in reverse mode."""
    return TransformType.Grad in _kinds()


def first_order(*tensors: Tensor | None) -> bool:
    """Tell whether what is computed now is differentiated once at most, and in reverse mode.

    Some of torch's fused kernels have a derivative that is right, and one of that which is not. Where a transform of
    torch.func is at work, a tape around it, which `tensors` may be on, can be differentiated any number of times.

    Args:
        tensors: What the kernel would get.
    """
    return _one_reverse() and (torch.compiler.is_compiling() or not any(map(_taped, tensors)))


@compile_constant
def _one_reverse() -> bool:
    """Tell whether all transforms of torch.func at work are vmaps, but for one of reverse mode at most."""
    kinds = _kinds()
    return forward_level() < 0 and kinds.count(TransformType.Grad) <= 1 and TransformType.Jvp not in kinds


def _kinds() -> list[Any]:
    """Return the kinds of the transforms of torch.func that are at work."""
    return [level.key() for level in all_transforms() or ()]


def _taped(tensor: Tensor | None) -> bool:
    """Tell whether a tape records a tensor, outside of all transforms of torch.func."""
    return tensor is not None and unwrapped(tensor).requires_grad


def saved_aside() -> bool:
    """Tell whether hooks take away what a tape saves, as those of a checkpoint do, which give it back once only."""
    return not torch.compiler.is_compiling() and saved_tensors_hooks(True) is not None and torch.is_grad_enabled()


def differentiate_again(y: Tensor, formula: Callable[[Any], Callable[..., Tensor] | None]) -> Tensor:
    """Return what a kernel computed, with the derivatives of a formula where those are recorded to be differentiated.

    The backward of the kernel runs as ever, and costs a call more. What it records is wrong from some order on; so
    where a tape records it, as with `create_graph=True`, the formula's derivative takes its place.

    Args:
        y: What the kernel computed, at once, from `x`, and from a weight and a bias if it has those.
        formula: Takes the node of the tape that saved the kernel's arguments to a function `(x, weight, bias)`, or to
            None where it is another kernel's. The bias counts as 0.
    """
    if y.requires_grad and current_autograd_node is not None and not (torch.compiler.is_compiling() or watched()):
        y.grad_fn.register_hook(_hooks(formula))  # type: ignore[union-attr]
    return y


@lru_cache
def _hooks(formula: Callable[[Any], Callable[..., Tensor] | None]) -> Callable[..., Any]:
    def hook(gradients: tuple[Tensor | None, ...], cotangents: tuple[Tensor, ...]) -> Any:
        if not torch.is_grad_enabled():
            return None
        node = current_autograd_node()  # type: ignore[misc]
        computed = formula(node)
        if computed is None:
            return None
        x, weight = node._saved_input, node._saved_weight
        bias = None if gradients[2] is None else torch.zeros_like(gradients[2]).requires_grad_()
        # Of tensors that are the same each needs a gradient of its own.
        x, weight = (None if tensor is None else tensor.view_as(tensor) for tensor in (x, weight))
        wanted: Any = [tensor for tensor, found in zip((x, weight, bias), gradients, strict=False) if found is not None]
        slopes = iter(torch.autograd.grad(computed(x, weight, bias), wanted, cotangents[0], create_graph=True))
        return tuple(None if found is None else next(slopes) for found in gradients)

    return hook


def kernel_with_formula(
    kernel: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """Return what a kernel computes, with the derivatives of a formula where those are recorded to be differentiated.

    It is `differentiate_again` for every kernel, and where hooks take away what the tape saves. It costs more, but the
    tape holds what the kernel itself keeps, and nothing besides: inside of a checkpoint, nothing.

    Args:
        kernel: What to compute.
        formula: What has the same values, and right derivatives of any order.
        inputs: What both take.
    """
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return kernel(*inputs)
    cotangents: list[Tensor] = []
    y: Any = kernel(*_BeforeKernel.apply(formula, cotangents, *inputs))
    y.register_hook(lambda cotangent: cotangents.append(cotangent) if torch.is_grad_enabled() else None)
    return y  # type: ignore[no-any-return]


class _BeforeKernel(torch.autograd.Function):
    """Pass the inputs on; backward, pass on what the kernel's derivative gave, or recorded, take the formula's."""

    @staticmethod
    def forward(ctx: Any, formula: Any, cotangents: list[Tensor], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.formula, ctx.cotangents = formula, cotangents
        ctx.save_for_backward(*inputs)
        outputs = tuple(None if x is None else x.view_as(x) for x in inputs)
        constant = (y for y, need in zip(outputs, ctx.needs_input_grad[2:], strict=True) if not need)
        ctx.mark_non_differentiable(*(y for y in constant if y is not None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, None, *gradients
        # Of tensors that are the same each needs a gradient of its own.
        inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        needed = ctx.needs_input_grad[2:]
        wanted: Any = [x for x, need in zip(inputs, needed, strict=True) if need]
        slopes = iter(torch.autograd.grad(ctx.formula(*inputs), wanted, ctx.cotangents.pop(), create_graph=True))
        return None, None, *(next(slopes) if need else None for need in needed)


@compile_constant
def transform_level() -> int:
    """Return how many transforms of torch.func surround the caller.

    torch.compile enters the levels while it traces, and so takes the number of the place as a constant.
    """
    top = innermost_transform()
    return 0 if top is None else top.level()
