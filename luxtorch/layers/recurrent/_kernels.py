"""Forward and backward passes of LSTM, GRU and RNN: torch's fused kernels, and loops over in-place operators.

The loops are the CPU fallback. A forward loop keeps what its derivative needs. The derivative of each unit is linear in
the gradient that comes from the next step: its factors are computed for all steps at once, so that the backward loop
has one matrix product and two to four small operations a step. On a CPU this takes a third to half of the time of
`torch.gru` and `torch.rnn_tanh` with their gradients. (oneDNN's LSTM is faster still.)

A unit of a fused kernel is called "mkldnn/lstm", or "cudnn/" and "lstm", "gru", "tanh" or "relu". What a kernel keeps
for its derivative has a size that only the kernel knows. (oneDNN also works in that memory in the backward pass, but
only over what it does not read: it can be used many times.)
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Saved: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Hidden states of all steps, the last memory, and saved tensors for the derivative; empty where there is none."""

SAVED_SIZES = {"lstm": 5, "gru": 4, "tanh": 0, "relu": 0}
"""Size of the saved tensor for each step, in units of the hidden size."""


def not_none(*parts: Tensor | None) -> list[Tensor]:
    """Return the tensors that are not None."""
    return [part for part in parts if part is not None]


def with_zeros(grads: tuple[Tensor | None, Tensor | None, Tensor | None], ys: Tensor, h: Tensor) -> list[Tensor]:
    """Return the gradients of all hidden states, the last one and the last memory, with zeros for None."""
    return [torch.zeros_like(like) if g is None else g for g, like in zip(grads, (ys, h, h), strict=True)]


def lstm_forward(projected: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the last memory, and (time, batch, 5 * hidden): the four gates and the memories."""
    size, weight = h.shape[-1], weight_hh.t()
    saved = projected.new_empty(*projected.shape[:-1], 5 * size)
    saved[..., : 4 * size] = projected
    ys = projected.new_empty(*projected.shape[:-1], size)
    tanh = torch.empty_like(h)
    sums, sigmoids = saved[..., : 4 * size].unbind(), saved[..., : 2 * size].unbind()
    parts = zip(sums, sigmoids, *(part.unbind() for part in torch.split(saved, size, -1)), ys.unbind(), strict=True)
    for total, i_and_f, i, f, g, o, memory, y in parts:
        total.addmm_(h, weight)
        i_and_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=memory)
        memory.addcmul_(i, g)
        torch.tanh(memory, out=tanh)
        torch.mul(o, tanh, out=y)
        h, c = y, memory
    return ys, c.clone(), saved


def lstm_backward(
    gy: Tensor, gh: Tensor, gc: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates' preactivations, of the first hidden state and of the first memory."""
    size = h.shape[-1]
    i, f, g, o, memory = torch.split(saved, size, -1)
    tanh = memory.tanh()
    into_memory = o * (1 - tanh * tanh)
    before = torch.cat((c[None], memory[:-1]))
    factors = saved.new_empty(*saved.shape[:-1], 4, size)
    torch.mul(i * (1 - i), g, out=factors[..., 0, :])
    torch.mul(f * (1 - f), before, out=factors[..., 1, :])
    torch.mul(1 - g * g, i, out=factors[..., 2, :])
    torch.mul(o * (1 - o), tanh, out=factors[..., 3, :])
    sums = factors.flatten(-2)
    of_memory, of_output = factors[..., :3, :].unbind(), factors[..., 3, :].unbind()
    gys, forgets, flat, inwards = gy.unbind(), f.unbind(), sums.unbind(), into_memory.unbind()
    gh, gc = gh + gys[-1], gc.clone()
    for t in reversed(range(len(gys))):
        gc.addcmul_(gh, inwards[t])
        of_memory[t].mul_(gc.unsqueeze(1))
        of_output[t].mul_(gh)
        gc.mul_(forgets[t])
        gh = torch.addmm(gys[t - 1], flat[t], weight_hh) if t else flat[t] @ weight_hh
    return sums, gh, gc


def gru_forward(projected: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden states, and (time, batch, 4 * hidden): the three gates, and the factor of the reset gate."""
    size, weight = h.shape[-1], weight_hh.t()
    saved = projected.new_empty(*projected.shape[:-1], 4 * size)
    saved[..., : 3 * size] = projected
    ys = projected.new_empty(*projected.shape[:-1], size)
    bias = weight_hh.new_zeros(3 * size) if bias_hh is None else bias_hh
    recurrent = torch.empty_like(projected[0])
    of_gates, of_new = torch.split(recurrent, [2 * size, size], -1)
    parts = zip(
        saved[..., : 2 * size].unbind(),
        *(part.unbind() for part in torch.split(saved, size, -1)),
        ys.unbind(),
        strict=True,
    )
    for gates, r, z, n, candidate, y in parts:
        torch.addmm(bias, h, weight, out=recurrent)
        gates.add_(of_gates).sigmoid_()
        candidate.copy_(of_new)
        n.addcmul_(r, of_new).tanh_()
        torch.lerp(n, h, z, out=y)
        h = y
    return ys, saved


def gru_backward(
    gy: Tensor, gh: Tensor, h: Tensor, weight_hh: Tensor, ys: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of both projections, that of the input and that of the hidden state, and of the first."""
    size = h.shape[-1]
    r, z, n, candidate = torch.split(saved, size, -1)
    before = torch.cat((h[None], ys[:-1]))
    factors = saved.new_empty(*saved.shape[:-1], 3, size)
    of_new = (1 - z) * (1 - n * n)
    torch.mul(of_new, r, out=factors[..., 2, :])
    torch.mul(factors[..., 2, :] * (1 - r), candidate, out=factors[..., 0, :])
    torch.mul((before - n) * z, 1 - z, out=factors[..., 1, :])
    sums, kept = factors.flatten(-2), torch.empty_like(ys)
    gys, keeps, steps, flat, all_kept = gy.unbind(), z.unbind(), factors.unbind(), sums.unbind(), kept.unbind()
    torch.add(gh, gys[-1], out=all_kept[-1])
    for t in reversed(range(len(gys))):
        gh = all_kept[t]
        steps[t].mul_(gh.unsqueeze(1))
        gh = torch.addcmul(gys[t - 1], gh, keeps[t], out=all_kept[t - 1]) if t else gh * keeps[t]
        gh.addmm_(flat[t], weight_hh)
    return torch.cat((sums[..., : 2 * size], kept * of_new), -1), sums, gh


def rnn_forward(projected: Tensor, h: Tensor, weight_hh: Tensor, unit: str) -> Tensor:
    """Return hidden states, in the memory of the projections."""
    weight = weight_hh.t()
    activate = torch.tanh_ if unit == "tanh" else torch.relu_
    for y in projected.unbind():
        h = activate(y.addmm_(h, weight))
    return projected


def rnn_backward(gy: Tensor, gh: Tensor, weight_hh: Tensor, ys: Tensor, unit: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of the preactivations, and of the first hidden state."""
    sums = 1 - ys * ys if unit == "tanh" else (ys > 0).to(ys.dtype)
    gys, steps = gy.unbind(), sums.unbind()
    gh = gh + gys[-1]
    for t in reversed(range(len(gys))):
        steps[t].mul_(gh)
        gh = torch.addmm(gys[t - 1], steps[t], weight_hh) if t else steps[t] @ weight_hh
    return sums, gh


def loop_forward(unit: str, train: bool, xs: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]) -> Saved:
    """Run a loop: return hidden states of all steps, the last memory, and saved tensors for the derivative."""
    weight_ih, weight_hh, *biases = weights
    bias = None if not biases else biases[0] if unit == "gru" else biases[0] + biases[1]
    projected, last, saved = F.linear(xs, weight_ih, bias), xs.new_empty(0), xs.new_empty(0)
    if c is not None:
        ys, last, saved = lstm_forward(projected, h, c, weight_hh)
    elif unit == "gru":
        ys, saved = gru_forward(projected, h, weight_hh, biases[1] if biases else None)
    else:
        ys = rnn_forward(projected, h, weight_hh, unit)
    return ys, last, saved if train else xs.new_empty(0)


def loop_backward(
    unit: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    xs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: list[Tensor],
    kept: Saved,
) -> tuple[Tensor, ...]:
    """Return the gradients of xs, h, c (empty if there is none), and of the weights."""
    weight_ih, weight_hh, *biases = weights
    ys, _, saved = kept
    gy, gh, gc = with_zeros(grads, ys, h)
    of_memory = xs.new_empty(0)
    if c is not None:
        of_input, gh, of_memory = lstm_backward(gy, gh, gc, h, c, weight_hh, saved)
        of_hidden = of_input
    elif unit == "gru":
        of_input, of_hidden, gh = gru_backward(gy, gh, h, weight_hh, ys, saved)
    else:
        of_input, gh = rnn_backward(gy, gh, weight_hh, ys, unit)
        of_hidden = of_input
    rows, hidden_rows = of_input.flatten(0, 1), of_hidden.flatten(0, 1)
    before = torch.cat((h[None], ys[:-1])).flatten(0, 1)
    products = (rows.t() @ xs.flatten(0, 1), hidden_rows.t() @ before)
    sums = (rows.sum(0), hidden_rows.sum(0)) if biases else ()
    return of_input @ weight_ih, gh, of_memory, *products, *sums


_aten = torch.ops.aten
_MODES = {"relu": 0, "tanh": 1, "lstm": 2, "gru": 3}  # the numbers of torch and cuDNN
_CUDNN_DTYPES = frozenset((torch.float16, torch.float32, torch.float64))


def fused(unit: str, xs: Tensor) -> str:
    """Return the name of the fused kernel for a unit, or the unit where there is none."""
    # The size of what the kernels save is known for static sizes only.
    if not all(isinstance(size, int) for size in xs.shape) or not xs.numel():
        return unit
    if xs.is_cuda and torch.version.hip is None and xs.dtype in _CUDNN_DTYPES:
        return f"cudnn/{unit}" if torch._C._has_cudnn and torch._C._get_cudnn_enabled() else unit
    if unit == "lstm" and xs.device.type == "cpu" and xs.dtype == torch.float32:
        return f"mkldnn/{unit}" if torch._C._has_mkldnn and torch._C._get_mkldnn_enabled() else unit
    return unit


def kernel_forward(unit: str, train: bool, xs: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]) -> Saved:
    """Run a fused kernel: return hidden states of all steps, the last memory, and saved tensors for the derivative."""
    xs, h = xs.contiguous(), h.contiguous()
    # The kernels save tensors only in grad mode.
    with torch.set_grad_enabled(train):
        if unit.startswith("mkldnn"):
            assert c is not None, "it is an LSTM"
            states: tuple[Any, ...] = (h, c.contiguous())
            options: tuple[Any, ...] = (False, [], _MODES["lstm"], h.shape[-1], 1, True, False, False, train)
            ys, _, last, saved = _aten.mkldnn_rnn_layer(xs, *_with_biases(weights), *states, *options)
        else:
            pieces, flat = _flattened(_with_biases(weights))
            states = (h[None], None if c is None else c[None].contiguous())
            options = (_MODES[unit.removeprefix("cudnn/")], h.shape[-1], 0, 1, False, 0.0, train, False, [], None)
            ys, _, last, saved, _ = _aten._cudnn_rnn(xs, pieces, len(pieces), flat, *states, *options)
            last = None if c is None else last[0]
    empty = xs.new_empty(0)
    return ys, empty if last is None else last, saved if train else empty.to(torch.uint8)


def kernel_backward(
    unit: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    xs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: list[Tensor],
    kept: Saved,
) -> tuple[Tensor, ...]:
    """Return the gradients of xs, h, c (empty if there is none), and of the weights."""
    ys, last, saved = kept
    gy, gh, gc = (g.contiguous() for g in with_zeros(grads, ys, h))
    xs, h = xs.contiguous(), h.contiguous()
    if c is not None and unit.startswith("mkldnn"):
        states: tuple[Any, ...] = (h, c.contiguous(), ys, ys[-1], last, gy, gh, gc)
        options: tuple[Any, ...] = (False, _MODES["lstm"], h.shape[-1], 1, True, True, False, [], False, saved)
        dxs, *dweights, dh, dc = _aten.mkldnn_rnn_layer_backward(xs, *_with_biases(weights), *states, *options)
        return dxs, dh, dc, *dweights[: len(weights)]
    pieces, flat = _flattened(_with_biases(weights))
    memory, grad = (None, None) if c is None else (c[None].contiguous(), gc[None])
    states = (h[None], memory, ys, gy, gh[None], grad)
    options = (_MODES[unit.removeprefix("cudnn/")], h.shape[-1], 0, 1, False, 0.0, True, False, [], None)
    mask = [True, True, c is not None, True]
    used = saved.clone()  # cuDNN overwrites it, and there may be another backward pass
    dxs, dh, dc, dweights = _aten._cudnn_rnn_backward(xs, pieces, len(pieces), flat, *states, *options, used, mask)
    # These are views of one tensor, which an operator must not return.
    return dxs, dh[0], xs.new_empty(0) if c is None else dc[0], *(part.clone() for part in dweights[: len(weights)])


def saved_size(unit: str, xs: Tensor, h: Tensor, weights: list[Tensor]) -> int:
    """Return the size of what the kernel saves for inputs of these shapes."""
    return _saved_size(unit, *xs.shape, h.shape[-1], len(weights[0]), len(weights) > 2, xs.dtype, xs.device)


@functools.cache
def _saved_size(
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
    # Only the kernel knows: it is run once.
    with _disable_current_modes(), torch.no_grad():
        shapes = [(rows, features), (rows, size), *([(rows,), (rows,)] if biased else [])]
        weights = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        h = torch.zeros(batch, size, dtype=dtype, device=device)
        xs = torch.zeros(time, batch, features, dtype=dtype, device=device)
        return kernel_forward(unit, True, xs, h, h if unit.endswith("lstm") else None, weights)[-1].numel()


def _with_biases(weights: list[Tensor]) -> list[Tensor]:
    if len(weights) == 4:
        return weights
    return [*weights, *(weights[0].new_zeros(len(weights[0])) for _ in range(2))]


def _flattened(weights: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the weights as views of one flat tensor, as cuDNN needs them, and that tensor."""
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    pieces = torch.split(flat, [weight.numel() for weight in weights])
    return [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)], flat
