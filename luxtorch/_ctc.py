"""The CTC loss in elementary operators, for all transforms: torch's kernel has a first reverse-mode derivative only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
