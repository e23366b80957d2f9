"""The operators of recurrent units with their derivatives: reverse mode, of any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, unwrap_if_dead
from luxtorch._transforms import reverse_alone

from ._rnn_kernels import fused
from ._rnn_loops import given
from ._rnn_ops import recurrent, recurrent_backward
from ._rnn_steps import run


def recurrent_layer(unit: str, train: bool, xs: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """Run `recurrent`, with derivatives, by a fused kernel where there is one."""
    return Recurrent.apply(fused(unit, xs), train, xs, *rest)  # type: ignore[no-any-return]


@compile_constant
def keep_opaque() -> None:
    """Keep torch.compile from looking into `recurrent_layer`, which it could not follow."""
    torch.compiler.allow_in_graph(recurrent_layer)  # type: ignore[no-untyped-call]


class Recurrent(torch.autograd.Function):
    """The operators with reverse-mode derivatives of any order, also inside of one transform of torch.func.

    What an operator registers for autograd is refused there.
    """

    @staticmethod
    def forward(unit: str, train: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run `recurrent`."""
        return recurrent(unit, train, *tensors)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the arguments, and what the operator has kept."""
        unit, train, *tensors = inputs
        ys, _, last, saved = output
        ctx.set_materialize_grads(False)
        ctx.unit, ctx.train, ctx.present = unit, train, [part is not None for part in tensors]
        ctx.save_for_backward(ys, last, saved, *given(*tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients by the operator, or where it may not be used by the steps."""
        ys, last, saved, *tensors = ctx.saved_tensors
        gy, gh, gc = grads[0], grads[1], grads[2] if ctx.present[2] else None
        if ctx.train and reverse_alone():
            found = RecurrentBackward.apply(ctx.unit, gy, gh, gc, *_spread(tensors, ctx.present), ys, last, saved)
            return None, None, *(grad if there else None for grad, there in zip(found, ctx.present, strict=True))
        return None, None, *_spread(_by_steps(ctx.unit, ctx.present, (gy, gh, gc), tensors), ctx.present)


class RecurrentBackward(torch.autograd.Function):
    """The gradients, with derivatives of their own: those of the steps."""

    @staticmethod
    def forward(unit: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run `recurrent_backward`."""
        return recurrent_backward(unit, *tensors)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what the gradients are functions of."""
        unit, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.unit, ctx.present = unit, [part is not None for part in tensors[:10]]
        ctx.save_for_backward(*given(*tensors[:10]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the gradients."""
        asked, present = ctx.present[:3], ctx.present[3:]
        pairs = [(grad is not None, grad) for grad, there in zip(grads, present, strict=True) if there]

        def gradients(*tensors: Tensor) -> list[Tensor]:
            number = sum(asked)
            found = _by_steps(ctx.unit, present, _spread(tensors[:number], asked), tensors[number:])
            return [grad for grad, (wanted, _) in zip(found, pairs, strict=True) if wanted]

        _, pull, *_ = torch.func.vjp(gradients, *ctx.saved_tensors)
        found = pull([grad for _, grad in pairs if grad is not None])
        # What the forward operator returned is a function of the other arguments, and has its share with these.
        return None, *_spread(found, ctx.present), None, None, None


def _by_steps(
    unit: str, present: list[bool], grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients by the steps, which can be differentiated and batched in any way."""

    def outputs(*tensors: Tensor) -> list[Tensor]:
        xs, h, c, *weights = _spread(tensors, present)
        assert xs is not None, "it always is there"
        found = run(unit.rpartition("/")[2], xs, tuple(given(h, c)), given(*weights))
        return [output for output, grad in zip(found, grads, strict=False) if grad is not None]

    # What a pullback has kept may be of a transform that is over.
    _, pull, *_ = torch.func.vjp(outputs, *map(unwrap_if_dead, tensors))
    return pull(given(*grads))  # type: ignore[no-any-return]


def _spread(parts: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """Return the parts with None between them where there is none."""
    remaining = iter(parts)
    return [next(remaining) if there else None for there in present]
