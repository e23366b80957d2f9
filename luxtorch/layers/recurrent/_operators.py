"""Recurrent layers as operators of torch (one node in a graph), with derivatives of any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import autocast_disabled, compile_constant, unwrap_if_dead
from luxtorch._transforms import reverse_alone

from ._fused import run
from ._kernels import (
    SAVED_SIZES,
    fused,
    kernel_backward,
    kernel_forward,
    loop_backward,
    loop_forward,
    not_none,
    saved_size,
)


@torch.library.custom_op("luxtorch::recurrent", mutates_args=())
def recurrent(
    unit: str,
    train: bool,
    xs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a unit over (time, batch, features).

    Args:
        unit: "lstm", "gru", "tanh" or "relu", or the name of its fused kernel from `fused`.
        train: Whether to save tensors for the derivative.
        xs: The inputs.
        h: The first hidden state, (batch, hidden).
        c: The first memory, if the unit has one.
        weight_ih: The weight of the inputs.
        weight_hh: The weight of the hidden state.
        bias_ih: The bias of the inputs, if there are any.
        bias_hh: The bias of the hidden state.

    Returns:
        The hidden states of all steps, the last of them, the last memory, and saved tensors for the derivative; the
        latter two are empty where there are none.
    """
    forward = kernel_forward if "/" in unit else loop_forward
    # The caller has already cast for autocast.
    with autocast_disabled():
        ys, last, saved = forward(unit, train, xs, h, c, not_none(weight_ih, weight_hh, bias_ih, bias_hh))
    return ys, ys[-1].clone(), last, saved


@recurrent.register_fake
def _(
    unit: str, train: bool, xs: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (time, batch, _), size = xs.shape, h.shape[-1]
    if "/" in unit:
        saved = xs.new_empty(saved_size(unit, xs, h, not_none(*weights)) if train else 0, dtype=torch.uint8)
    else:
        kept = SAVED_SIZES[unit] if train else 0
        saved = xs.new_empty((time, batch, kept * size) if kept else 0)
    last = xs.new_empty(0) if c is None else xs.new_empty((batch, size))
    return xs.new_empty((time, batch, size)), xs.new_empty((batch, size)), last, saved


@torch.library.custom_op("luxtorch::recurrent_backward", mutates_args=())
def recurrent_backward(
    unit: str,
    gy: Tensor | None,
    gh: Tensor | None,
    gc: Tensor | None,
    xs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    ys: Tensor,
    last: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of xs, h, c, both weights and both biases, from those of what `recurrent` returned."""
    backward, grads = (kernel_backward if "/" in unit else loop_backward), (gy, gh, gc)
    weights = not_none(weight_ih, weight_hh, bias_ih, bias_hh)
    with autocast_disabled():
        found = backward(unit, grads, xs, h, c, weights, (ys, last, saved))
    dxs, dh, dc, dw, du, *biases = found
    # An operator must not return a tensor twice.
    db, dk = (biases[0], biases[1].clone()) if bias_ih is not None else (xs.new_empty(0), xs.new_empty(0))
    return dxs, dh, dc, dw, du, db, dk


@recurrent_backward.register_fake
def _(
    unit: str, gy: Tensor | None, gh: Tensor | None, gc: Tensor | None, xs: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    like = (xs, *others[:6])  # the states and the weights, then the outputs of the forward operator
    return tuple(xs.new_empty(0 if part is None else part.shape) for part in like)


def recurrent_layer(unit: str, train: bool, xs: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """Run `recurrent`, with derivatives, by a fused kernel where there is one."""
    return Recurrent.apply(fused(unit, xs), train, xs, *rest)  # type: ignore[no-any-return]


@compile_constant
def keep_opaque() -> None:
    """Keep torch.compile from tracing into `recurrent_layer`, which it does not support."""
    torch.compiler.allow_in_graph(recurrent_layer)  # type: ignore[no-untyped-call]


class Recurrent(torch.autograd.Function):
    """The operators with reverse-mode derivatives of any order, also inside a transform of torch.func.

    Derivatives registered with `register_autograd` are not supported there.
    """

    @staticmethod
    def forward(unit: str, train: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run `recurrent`."""
        return recurrent(unit, train, *tensors)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the arguments and outputs."""
        unit, train, *tensors = inputs
        ys, _, last, saved = output
        ctx.set_materialize_grads(False)
        ctx.unit, ctx.train, ctx.present = unit, train, [part is not None for part in tensors]
        ctx.save_for_backward(ys, last, saved, *not_none(*tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients by the operator, or step by step where it cannot be used."""
        ys, last, saved, *tensors = ctx.saved_tensors
        gy, gh, gc = grads[0], grads[1], grads[2] if ctx.present[2] else None
        if ctx.train and reverse_alone():
            found = RecurrentBackward.apply(ctx.unit, gy, gh, gc, *_with_nones(tensors, ctx.present), ys, last, saved)
            return None, None, *(grad if there else None for grad, there in zip(found, ctx.present, strict=True))
        return None, None, *_with_nones(_stepwise_gradients(ctx.unit, ctx.present, (gy, gh, gc), tensors), ctx.present)


class RecurrentBackward(torch.autograd.Function):
    """The gradients, with derivatives computed step by step."""

    @staticmethod
    def forward(unit: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run `recurrent_backward`."""
        return recurrent_backward(unit, *tensors)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the arguments."""
        unit, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.unit, ctx.present = unit, [part is not None for part in tensors[:10]]
        ctx.save_for_backward(*not_none(*tensors[:10]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the gradients."""
        asked, present = ctx.present[:3], ctx.present[3:]
        pairs = [(grad is not None, grad) for grad, there in zip(grads, present, strict=True) if there]

        def gradients(*tensors: Tensor) -> list[Tensor]:
            number = sum(asked)
            found = _stepwise_gradients(ctx.unit, present, _with_nones(tensors[:number], asked), tensors[number:])
            return [grad for grad, (wanted, _) in zip(found, pairs, strict=True) if wanted]

        _, pull, *_ = torch.func.vjp(gradients, *ctx.saved_tensors)
        found = pull([grad for _, grad in pairs if grad is not None])
        # The outputs of the forward operator are functions of the other arguments, whose gradients include theirs.
        return None, *_with_nones(found, ctx.present), None, None, None


def _stepwise_gradients(
    unit: str, present: list[bool], grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients step by step, which can be differentiated and batched in any way."""

    def outputs(*tensors: Tensor) -> list[Tensor]:
        xs, h, c, *weights = _with_nones(tensors, present)
        assert xs is not None, "it always is there"
        found = run(unit.rpartition("/")[2], xs, tuple(not_none(h, c)), not_none(*weights))
        return [output for output, grad in zip(found, grads, strict=False) if grad is not None]

    # Saved tensors may belong to a transform that has ended.
    _, pull, *_ = torch.func.vjp(outputs, *map(unwrap_if_dead, tensors))
    return pull(not_none(*grads))  # type: ignore[no-any-return]


def _with_nones(parts: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """Return the tensors with None in the places of missing ones."""
    remaining = iter(parts)
    return [next(remaining) if there else None for there in present]
