"""Formulas in place of operators of torch whose derivatives are wrong or end early: linear algebra and the CTC loss.

torch computes the forward-mode derivative of `solve`, `det` and similar functions from a factorization that it treats
as a constant, so that higher derivatives through it are wrong. Its CTC kernel has a first reverse-mode derivative only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def by_rule(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch that is in `RULES`, by its replacement where that applies."""
    if not args:
        args = (kwargs.pop("A" if "A" in kwargs else "input"),)
    if kwargs.get("out") is not None or args[0].is_complex():
        return func(*args, **kwargs)
    return RULES[func](*args, **kwargs)


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    if not left:
        return _solve(A.mT, B.mT).mT
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    b = B.unsqueeze(-1) if vector else B
    # The value is that of torch; the added term is zero and carries the derivatives.
    x: Tensor = torch.linalg.solve(A.detach(), b.detach())
    x = x + torch.linalg.inv(A) @ (b - A @ x)
    return x.squeeze(-1) if vector else x


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    _, info = torch.linalg.solve_ex(A.detach(), B.detach(), left=left, check_errors=check_errors)
    return torch.return_types.linalg_solve_ex((_solve(A, B, left=left), info))  # type: ignore[attr-defined]


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return _solve(A.reshape(B.numel(), B.numel()), B.flatten()).reshape(A.shape[B.ndim :])


def _log_of_det(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sign of a determinant, and the logarithm of its absolute value."""
    sign = torch.linalg.slogdet(A.detach())[0]
    return sign, torch.linalg.lu_factor(A)[0].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def _slogdet(A: Tensor) -> Any:
    return torch.return_types.linalg_slogdet(_log_of_det(A))  # type: ignore[attr-defined]


def _logdet(A: Tensor) -> Tensor:
    sign, log = _log_of_det(A)
    return log.masked_fill(sign < 0, torch.nan)


def _det(A: Tensor) -> Tensor:
    # The sign of the determinant is that of the product times that of the permutation.
    product: Tensor = torch.linalg.lu_factor(A)[0].diagonal(dim1=-2, dim2=-1).prod(-1)
    return product * (torch.linalg.slogdet(A.detach())[0] * product.detach().sign())  # type: ignore[no-any-return]


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys((torch.linalg.det, torch.det, Tensor.det), _det),
}
"""Functions of torch, and replacements with right derivatives under every nesting of transforms."""


# For log(0): minus infinity would give NaN gradients, and no real loss is as large as this.
_NEVER = -1e30


def ctc_losses(
    log_p: Tensor, labels: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    """Return the negative log-likelihoods of sequences; NaN where a length is out of range.

    Args:
        log_p: The log-probabilities, (time, batch, classes).
        labels: (batch, longest); what stands beyond a sequence's length plays no part.
        input_lengths: (batch,)
        target_lengths: (batch,)
        blank: The class that stands for no label.
        zero_infinity: Whether a sequence too long to be aligned costs nothing, instead of infinity.
    """
    time, longest = log_p.shape[0], labels.shape[1]
    # More labels than steps cannot be aligned.
    found = _log_likelihoods(log_p, labels[:, :time], input_lengths, target_lengths, blank)
    losses = torch.where(found > _NEVER / 2, -found, 0.0 if zero_infinity else torch.inf)
    known = (input_lengths >= 0) & (input_lengths <= time) & (target_lengths >= 0) & (target_lengths <= longest)
    return torch.where(known, losses, torch.nan)


def _log_likelihoods(
    log_p: Tensor, labels: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """Return the log-likelihoods of sequences, by the forward recursion over the labels with blanks between them.

    State 2k is the blank before label k, state 2k + 1 is that label. At each step one stays, goes on by one state,
    or leaves out a blank between two different labels.
    """
    batch, longest = labels.shape
    states = 2 * longest + 1
    place = torch.arange(states, device=labels.device)
    is_label = (place % 2 == 1) & (place // 2 < target_lengths[:, None])
    padded = F.pad(labels, (0, 1), value=blank).gather(1, (place // 2).expand(batch, states))
    classes = torch.where(is_label, padded, blank)
    may_skip = is_label & (place >= 2) & (classes != _shifted(classes, 2, blank))
    log_p = log_p.clamp_min(_NEVER).gather(2, classes.expand(log_p.shape[0], batch, states))

    # Before the first step one is in the first blank, so that the first step leads there or to the first label.
    alpha = torch.where(place == 0, 0.0, _NEVER).to(log_p.dtype).expand(batch, states)
    for time in range(log_p.shape[0]):
        skip = torch.where(may_skip, _shifted(alpha, 2, _NEVER), _NEVER)
        moved = torch.stack((alpha, _shifted(alpha, 1, _NEVER), skip)).logsumexp(0) + log_p[time]
        alpha = torch.where((time < input_lengths)[:, None], moved, alpha)
    # An alignment ends in the last label or in the blank after it.
    last = 2 * target_lengths[:, None]
    return torch.where((place == last) | (place == last - 1), alpha, _NEVER).logsumexp(1)


def _shifted(row: Tensor, by: int, first: float) -> Tensor:
    """Return rows shifted to the right, filled with a value."""
    return F.pad(row, (by, 0), value=first)[:, : row.shape[1]]
