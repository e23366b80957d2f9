"""A recurrent layer over a whole sequence: by a fused kernel or operator where possible, else step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import functional, reverse_alone, saved_aside, traced, transformed
from luxtorch.core._sharded import is_sharded
from luxtorch.layers._shared import linear, over_steps

Carry: TypeAlias = tuple[Tensor, ...]


def add_recurrent(projected: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """Add the projection of the hidden state."""
    # One fused operation where possible: a step spends its time here.
    return torch.addmm(projected, h, weight.t()) if h.ndim == 2 else projected + linear(h, weight)


def project(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the projection of the input, for one step or for many at once."""
    return linear(x, weights[0], weights[2] + weights[3] if len(weights) >= 4 else None)


def project_gru(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the projection of the input, without `bias_hh`, part of which the reset gate multiplies."""
    return linear(x, weights[0], weights[2] if len(weights) >= 4 else None)


def lstm_step(projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
    """Return the next hidden state and memory."""
    i, f, g, o = add_recurrent(projected, carry[0], weights[1]).chunk(4, -1)
    c = f.sigmoid() * carry[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
    """Return the next hidden state."""
    size = carry[0].shape[-1]
    recurrent = linear(carry[0], weights[1], weights[3] if len(weights) >= 4 else None)
    r, z = (projected[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid().chunk(2, -1)
    n = (projected[..., 2 * size :] + r * recurrent[..., 2 * size :]).tanh()
    return (n + z * (carry[0] - n),)


def run(unit: str, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states of all steps and the last carry, of "lstm", "gru", "tanh" or "relu"."""
    ys = []
    # Indexing step by step would take time quadratic in the length when differentiated.
    for step in (project_gru if unit == "gru" else project)(xs, weights).unbind():
        if unit == "lstm":
            carry = lstm_step(step, carry, weights)
        elif unit == "gru":
            carry = gru_step(step, carry, weights)
        else:
            h = add_recurrent(step, carry[0], weights[1])
            carry = (h.tanh() if unit == "tanh" else h.relu(),)
        ys.append(carry[0])
    return [torch.stack(ys), *carry]


Kernel: TypeAlias = Callable[..., Any]


class Steps(Protocol):
    """The methods of `WeightedCell` that are used here."""

    gates: ClassVar[int]

    @property
    def kernel(self) -> Kernel | None: ...
    def project(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor: ...
    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry: ...


def scanned(cell: Steps, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> tuple[Tensor, Carry]:
    """Return the hidden states of all steps, and the last carry.

    Args:
        cell: The cell.
        xs: The inputs, (time, ..., features).
        carry: The carry before the first step.
        weights: weight_ih, weight_hh and, if there are any, bias_ih and bias_hh.
    """
    kernel, tensors = cell.kernel, (xs, *carry, *weights)
    if kernel is None or is_sharded(xs) or not _fits(cell.gates, xs, carry, weights):
        return stepwise(cell, xs, carry, weights)
    # An exported program must run without luxtorch and its operators.
    if (traced() or functional()) and reverse_alone() and not torch.compiler.is_exporting():
        return _operator(kernel, xs, carry, weights)
    if transformed():
        return stepwise(cell, xs, carry, weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        ys, *last = _Fused.apply(cell, kernel, len(carry), *tensors)
        return ys, tuple(last)
    return _fused(kernel, xs, carry, weights)


def _fits(gates: int, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> bool:
    """Return whether the fused kernel accepts these tensors; it does not check them itself."""
    hidden = carry[0].shape[-1]
    rows = gates * hidden
    shapes = [(rows, xs.shape[-1]), (rows, hidden), (rows,), (rows,)]
    return (
        xs.ndim in (2, 3)
        and xs.shape[0] > 0
        and all(weight.shape == shape for weight, shape in zip(weights, shapes, strict=False))
        and all(tensor.device == xs.device for tensor in weights)
        and (
            all(tensor.dtype == xs.dtype for tensor in (*carry, *weights))
            or torch.is_autocast_enabled(xs.device.type)  # which casts them to one dtype
        )
    )


def stepwise(cell: Steps, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> tuple[Tensor, Carry]:
    """Return the same step by step, after one matrix product for the inputs of all steps."""
    projected = cell.project(xs, weights)
    if not xs.shape[0]:
        return projected[..., : carry[0].shape[-1]], carry

    def step(carry: Carry, x: Tensor) -> tuple[Carry, Tensor]:
        carry = cell.advance(x, carry, weights)
        return carry, carry[0]

    carry, ys = over_steps(step, carry, projected)
    return ys, carry


def _operator(kernel: Kernel, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> tuple[Tensor, Carry]:
    """Return the same by the custom operator, which is one node of a graph and has only reverse-mode derivatives."""
    # Imported late: registering operators takes a tenth of the time of importing luxtorch.
    from ._kernels import keep_opaque, recurrent_layer

    if torch.is_autocast_enabled(xs.device.type):
        dtype = torch.get_autocast_dtype(xs.device.type)
        xs, carry, weights = xs.to(dtype), tuple(h.to(dtype) for h in carry), [weight.to(dtype) for weight in weights]
    if xs.ndim == 2:
        ys, last = _operator(kernel, xs[:, None], tuple(part[None] for part in carry), weights)
        return ys[:, 0], tuple(part[0] for part in last)
    if torch.compiler.is_compiling():
        keep_opaque()
    train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (xs, *carry, *weights))
    h, c = carry if len(carry) > 1 else (*carry, None)
    biases = weights[2:] if len(weights) > 2 else (None, None)
    ys, h, c, _ = recurrent_layer(_unit(kernel), train, xs, h, c, *weights[:2], *biases)
    return ys, (h, c)[: len(carry)]


def _unit(kernel: Kernel) -> str:
    """Return the operator's name of a unit."""
    if kernel is torch.lstm:
        return "lstm"
    if kernel is torch.gru:
        return "gru"
    return "tanh" if kernel is torch.rnn_tanh else "relu"


def _fused(kernel: Kernel, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> tuple[Tensor, Carry]:
    batched = xs.ndim == 3
    start = [(part if batched else part[None])[None].contiguous() for part in carry]
    if xs.is_cuda:
        # cuDNN needs its weights in one chunk of memory, and warns otherwise.
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        pieces = torch.split(flat, [weight.numel() for weight in weights])
        weights = [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)]
    # cuDNN has derivatives only in training mode.
    training = torch.is_grad_enabled()
    has_biases, layers, dropout, bidirectional, batch_first = len(weights) == 4, 1, 0.0, False, False
    options = (has_biases, layers, dropout, training, bidirectional, batch_first)
    ys, *last = kernel(xs if batched else xs[:, None], start if len(start) > 1 else start[0], list(weights), *options)
    last = [part[0] if batched else part[0, 0] for part in last]
    return (ys if batched else ys[:, 0]), tuple(last)


class _Fused(torch.autograd.Function):
    """The fused kernel with a derivative that can be differentiated again.

    torch's derivatives of these kernels cannot be differentiated. The backward pass uses them unless it is to be
    differentiated itself; then it runs step by step.
    """

    @staticmethod
    def forward(ctx: Any, cell: Steps, kernel: Kernel, carried: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.carried, ctx.cell, ctx.kernel = carried, cell, kernel
        with torch.enable_grad():
            aside = saved_aside()
        if aside:  # a graph kept here would hold the tensors that the hooks are to offload
            ctx.graph = None
            ys, last = _fused(kernel, tensors[0], tensors[1 : 1 + carried], tensors[1 + carried :])
            return ys, *last
        ctx.graph = _graph(ctx, tensors)
        return tuple(output.detach() for output in ctx.graph[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        graph, ctx.graph = ctx.graph, None  # used once, as torch frees it in the backward pass
        if torch.is_grad_enabled() or transformed():
            with torch.enable_grad():
                # Inputs may depend on the weights or be the same tensor: views give each its own gradient.
                xs, *rest = tensors = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
                ys, last = stepwise(ctx.cell, xs, tuple(rest[: ctx.carried]), rest[ctx.carried :])
            graph = tensors, (ys, *last)
        elif graph is None:
            graph = _graph(ctx, ctx.saved_tensors)
        inputs, outputs = graph
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        needed = [tensor for tensor, need in zip(inputs, ctx.needs_input_grad[3:], strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                needed,
                [grad for _, grad in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return None, None, None, *(next(found) if need else None for need in ctx.needs_input_grad[3:])


def _graph(ctx: Any, tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return inputs and outputs of the kernel in an autograd graph of their own."""
    with torch.enable_grad():
        own = [x.detach().requires_grad_(need) for x, need in zip(tensors, ctx.needs_input_grad[3:], strict=True)]
        ys, last = _fused(ctx.kernel, own[0], tuple(own[1 : 1 + ctx.carried]), own[1 + ctx.carried :])
    return own, (ys, *last)
