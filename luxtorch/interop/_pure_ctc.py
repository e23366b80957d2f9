"""The CTC loss, whose kernel has one derivative, in reverse mode, and no batching rule, by its recursion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._ctc import ctc_losses
from luxtorch._transforms import traced, unwrapped, watched
from luxtorch.core import InputError

from ._pure_losses import reduced, under_transforms


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    log_p = log_probs if log_probs.ndim == 3 else log_probs.unsqueeze(1)
    time, batch, classes = log_p.shape
    if not 0 <= blank < classes:
        raise InputError("No class is blank.", expected=f"from 0 to {classes - 1}", got=str(blank))
    steps, sizes = (_lengths(given, batch, log_p.device) for given in (input_lengths, target_lengths))
    labels = targets.to(log_p.device).long()
    longest = labels.shape[-1]
    _require_range("An input length", steps, 0, time)
    _require_range("A target length", sizes, 0, longest)
    if labels.ndim == 1:
        labels, sizes = _side_by_side(labels, sizes, time)
    elif labels.shape[0] != batch:
        raise InputError("The targets are of another batch.", expected=f"{batch} sequences", got=str(labels.shape[0]))
    losses = ctc_losses(log_p, labels, steps, sizes, blank, zero_infinity)
    if reduction == "mean":
        return (losses / sizes.clamp_min(1)).mean()
    return reduced(losses if log_probs.ndim == 3 else losses.squeeze(0), reduction)


def _by_number(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    name = ("none", "mean", "sum")[reduction]
    return _ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, name, zero_infinity)


def _lengths(given: Tensor | Sequence[int], batch: int, device: torch.device) -> Tensor:
    """Return one length a sequence."""
    lengths = given if isinstance(given, Tensor) else torch.tensor(given)
    lengths = lengths.to(device).long().reshape(-1)
    if lengths.shape[0] != batch:
        raise InputError("Each sequence has a length.", expected=f"{batch} lengths", got=str(lengths.shape[0]))
    return lengths


def _side_by_side(labels: Tensor, sizes: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """Return labels that follow one another as one row a sequence, as long as can be aligned, and their lengths."""
    total = labels.shape[0]
    _require_range("The sum of the target lengths", sizes.sum(), total, total)
    starts = sizes.cumsum(0) - sizes
    places = starts[:, None] + torch.arange(min(time, total), device=labels.device)
    rows = labels[places.clamp(0, max(total - 1, 0))]
    return rows, torch.where(sizes.sum() == total, sizes, -1)


def _require_range(what: str, values: Tensor, low: int, high: int) -> None:
    """Raise if numbers are out of range, unless they cannot be seen; the losses are NaN then."""
    if traced() or watched():
        return
    seen = unwrapped(values)
    wrong = seen[(seen < low) | (seen > high)]
    if wrong.numel():
        raise InputError(
            f"{what} is out of range.",
            expected=f"from {low} to {high}" if low < high else str(low),
            got=str(int(wrong.flatten()[0])),
        )


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.ctc_loss: under_transforms(F.ctc_loss)(_ctc_loss),
    torch.ctc_loss: under_transforms(torch.ctc_loss)(_by_number),
}
