"""Recurrent units over a whole sequence as operators of torch: one node of a graph forward, and one for the gradients.

What compiles a function would otherwise unroll all steps, and take minutes for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luxtorch._torch import autocast_disabled

from . import _rnn_kernels, _rnn_loops
from ._rnn_loops import given


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
        unit: "lstm", "gru", "tanh" or "relu", or what `_rnn_kernels.fused` makes of it.
        train: Whether to keep what the derivative needs.
        xs: The inputs.
        h: The first hidden state, (batch, hidden).
        c: The first memory, if the unit has one.
        weight_ih: The weight of the inputs.
        weight_hh: The weight of the hidden state.
        bias_ih: The bias of the inputs, if there are any.
        bias_hh: The bias of the hidden state.

    Returns:
        The hidden states of all steps, the last of them, the last memory, and what the derivative needs; both are
        empty where there is no such thing.
    """
    ways = _rnn_kernels if "/" in unit else _rnn_loops
    # Whoever asked for a precision has cast already.
    with autocast_disabled():
        ys, last, saved = ways.forward(unit, train, xs, h, c, given(weight_ih, weight_hh, bias_ih, bias_hh))
    return ys, ys[-1].clone(), last, saved


@recurrent.register_fake
def _(
    unit: str, train: bool, xs: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (time, batch, _), size = xs.shape, h.shape[-1]
    if "/" in unit:
        saved = xs.new_empty(_rnn_kernels.kept_size(unit, xs, h, given(*weights)) if train else 0, dtype=torch.uint8)
    else:
        kept = _rnn_loops.KEPT[unit] if train else 0
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
    ways, grads = (_rnn_kernels if "/" in unit else _rnn_loops), (gy, gh, gc)
    weights = given(weight_ih, weight_hh, bias_ih, bias_hh)
    with autocast_disabled():
        found = ways.backward(unit, grads, xs, h, c, weights, (ys, last, saved))
    dxs, dh, dc, dw, du, *biases = found
    # An operator may not return a tensor twice.
    db, dk = (biases[0], biases[1].clone()) if bias_ih is not None else (xs.new_empty(0), xs.new_empty(0))
    return dxs, dh, dc, dw, du, db, dk


@recurrent_backward.register_fake
def _(
    unit: str, gy: Tensor | None, gh: Tensor | None, gc: Tensor | None, xs: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    like = (xs, *others[:6])  # the states and the weights; after them comes what the forward returned
    return tuple(xs.new_empty(0 if part is None else part.shape) for part in like)
