"""Recurrent layers as operators of torch, one node in a graph, and the passes of LSTM, GRU and RNN that these run.

A pass is one of torch's fused kernels, or a loop over in-place operators, the CPU fallback. A forward loop keeps what
its derivative needs. The derivative of each unit is linear in the gradient that comes from the next step: its factors
are computed for all steps at once, so that the backward loop has one matrix product and two to four small operations a
step. On a CPU this takes a third to half of the time of `torch.gru` and `torch.rnn_tanh` with gradients. (oneDNN's
LSTM is faster still.)

A unit of a fused kernel is called "mkldnn/lstm", or "cudnn/" and "lstm", "gru", "tanh" or "relu". What a kernel keeps
for its derivative has a size that only the kernel knows. (oneDNN also works in that memory in the backward pass, but
only over what it does not read: it can be used many times.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from luxtorch._torch import autocast_disabled, compile_constant, unwrap_if_dead
from luxtorch._transforms import reverse_alone

from ._fused import run

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
