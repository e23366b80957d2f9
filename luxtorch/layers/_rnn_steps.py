"""One step of torch's three recurrent units, and many: what the cells, and the derivatives of their operators, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Carry: TypeAlias = tuple[Tensor, ...]


def add_recurrent(projected: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """Add what the weight makes of the hidden state."""
    # In one operation where there is one: it is what a step spends its time in.
    return torch.addmm(projected, h, weight.t()) if h.ndim == 2 else projected + F.linear(h, weight)


def project(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return all that a step adds up before it looks at the carry, for one step or for many at once."""
    return F.linear(x, weights[0], weights[2] + weights[3] if len(weights) >= 4 else None)


def project_gru(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the part of the input; `bias_hh` has to wait, as one gate multiplies a part of it."""
    return F.linear(x, weights[0], weights[2] if len(weights) >= 4 else None)


def lstm_step(projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
    """Return the next hidden state and memory."""
    i, f, g, o = add_recurrent(projected, carry[0], weights[1]).chunk(4, -1)
    c = f.sigmoid() * carry[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
    """Return the next hidden state."""
    size = carry[0].shape[-1]
    recurrent = F.linear(carry[0], weights[1], weights[3] if len(weights) >= 4 else None)
    r, z = (projected[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid().chunk(2, -1)
    n = (projected[..., 2 * size :] + r * recurrent[..., 2 * size :]).tanh()
    return (n + z * (carry[0] - n),)


def run(unit: str, xs: Tensor, carry: Carry, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the hidden states of all steps and the last carry, of "lstm", "gru", "tanh" or "relu"."""
    ys = []
    # To index step by step would cost time quadratic in the length when it is differentiated.
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
