"""Torch's fused kernels of recurrent layers, forward and backward: those of oneDNN and of cuDNN.

A unit here is "mkldnn/lstm", or "cudnn/" and "lstm", "gru", "tanh" or "relu". What a kernel keeps for its
derivative has a size that it alone knows. (oneDNN also works in that memory on the way back, but over what it does not
read: it serves many times.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._rnn_loops import Kept, filled

_aten = torch.ops.aten
_MODES = {"relu": 0, "tanh": 1, "lstm": 2, "gru": 3}  # as torch and cuDNN number the units
_CUDNN_DTYPES = frozenset((torch.float16, torch.float32, torch.float64))


def fused(unit: str, xs: Tensor) -> str:
    """Return the unit by the fused kernel where there is one, else as it is."""
    # What the kernels keep is known for given sizes alone.
    if not all(isinstance(size, int) for size in xs.shape) or not xs.numel():
        return unit
    if xs.is_cuda and torch.version.hip is None and xs.dtype in _CUDNN_DTYPES:
        return f"cudnn/{unit}" if torch._C._has_cudnn and torch._C._get_cudnn_enabled() else unit
    if unit == "lstm" and xs.device.type == "cpu" and xs.dtype == torch.float32:
        return f"mkldnn/{unit}" if torch._C._has_mkldnn and torch._C._get_mkldnn_enabled() else unit
    return unit


def forward(unit: str, train: bool, xs: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]) -> Kept:
    """Return hidden states of all steps, the last memory and what the derivative needs; empty where there is none."""
    xs, h = xs.contiguous(), h.contiguous()
    # The kernels keep something only where they believe to be recorded.
    with torch.set_grad_enabled(train):
        if unit.startswith("mkldnn"):
            assert c is not None, "it is an LSTM"
            states: tuple[Any, ...] = (h, c.contiguous())
            options: tuple[Any, ...] = (False, [], _MODES["lstm"], h.shape[-1], 1, True, False, False, train)
            ys, _, last, saved = _aten.mkldnn_rnn_layer(xs, *_four(weights), *states, *options)
        else:
            pieces, flat = _in_one_piece(_four(weights))
            states = (h[None], None if c is None else c[None].contiguous())
            options = (_MODES[unit.removeprefix("cudnn/")], h.shape[-1], 0, 1, False, 0.0, train, False, [], None)
            ys, _, last, saved, _ = _aten._cudnn_rnn(xs, pieces, len(pieces), flat, *states, *options)
            last = None if c is None else last[0]
    empty = xs.new_empty(0)
    return ys, empty if last is None else last, saved if train else empty.to(torch.uint8)


def backward(
    unit: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    xs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: list[Tensor],
    kept: Kept,
) -> tuple[Tensor, ...]:
    """Return the gradients of xs, h, c (empty if there is none), and of the weights."""
    ys, last, saved = kept
    gy, gh, gc = (g.contiguous() for g in filled(grads, ys, h))
    xs, h = xs.contiguous(), h.contiguous()
    if c is not None and unit.startswith("mkldnn"):
        states: tuple[Any, ...] = (h, c.contiguous(), ys, ys[-1], last, gy, gh, gc)
        options: tuple[Any, ...] = (False, _MODES["lstm"], h.shape[-1], 1, True, True, False, [], False, saved)
        dxs, *dweights, dh, dc = _aten.mkldnn_rnn_layer_backward(xs, *_four(weights), *states, *options)
        return dxs, dh, dc, *dweights[: len(weights)]
    pieces, flat = _in_one_piece(_four(weights))
    memory, grad = (None, None) if c is None else (c[None].contiguous(), gc[None])
    states = (h[None], memory, ys, gy, gh[None], grad)
    options = (_MODES[unit.removeprefix("cudnn/")], h.shape[-1], 0, 1, False, 0.0, True, False, [], None)
    mask = [True, True, c is not None, True]
    used = saved.clone()  # cuDNN writes over it, and there may be another way back
    dxs, dh, dc, dweights = _aten._cudnn_rnn_backward(xs, pieces, len(pieces), flat, *states, *options, used, mask)
    # They are views of one tensor, which an operator may not return.
    return dxs, dh[0], xs.new_empty(0) if c is None else dc[0], *(part.clone() for part in dweights[: len(weights)])


def kept_size(unit: str, xs: Tensor, h: Tensor, weights: list[Tensor]) -> int:
    """Return how many bytes the kernel keeps for these, of which only the shapes matter."""
    return _kept_size(unit, *xs.shape, h.shape[-1], len(weights[0]), len(weights) > 2, xs.dtype, xs.device)


@functools.cache
def _kept_size(
    unit: str,
    time: int,
    batch: int,
    features: int,
    size: int,
    rows: int,
    biased: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    # Nothing but the kernel tells: it is run once.
    with _disable_current_modes(), torch.no_grad():
        shapes = [(rows, features), (rows, size), *([(rows,), (rows,)] if biased else [])]
        weights = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        h = torch.zeros(batch, size, dtype=dtype, device=device)
        xs = torch.zeros(time, batch, features, dtype=dtype, device=device)
        return forward(unit, True, xs, h, h if unit.endswith("lstm") else None, weights)[-1].numel()


def _four(weights: list[Tensor]) -> list[Tensor]:
    if len(weights) == 4:
        return weights
    return [*weights, *(weights[0].new_zeros(len(weights[0])) for _ in range(2))]


def _in_one_piece(weights: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the weights as views of one tensor, as cuDNN wants them, and that tensor."""
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    pieces = torch.split(flat, [weight.numel() for weight in weights])
    return [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)], flat
