"""Loss functions of torch that read values of tensors, or lack a batching rule or a derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._formulas import ctc_losses
from luxtorch._torch import legacy_reduction
from luxtorch._transforms import reverse_alone, traced, transformed, unwrapped, watched
from luxtorch.core import out_of_range
from luxtorch.layers._activations import gated, logsigmoid

from ._keys import Keys
from ._norms import pairwise_distance

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum}


def under_transforms(function: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate a replacement of a torch function, so that it is used under transforms and while tracing alone."""

    def decorate(replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(replacement)
        def chosen(keys: Keys, *args: Any, **kwargs: Any) -> Tensor:
            return (replacement if transformed() or watched() else function)(*args, **kwargs)

        return chosen

    return decorate


@under_transforms(F.gaussian_nll_loss)
def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    var = var if isinstance(var, Tensor) else torch.full_like(input, var)
    # torch checks that no variance is negative, which cannot be read under vmap.
    if var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = torch.where(var < eps, eps + (var - var.detach()), var)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


@under_transforms(F.huber_loss)
def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    error = (input - target).abs()
    loss = torch.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))
    return reduced(loss if weight is None else loss * weight, reduction)


def _mse_loss(
    keys: Keys,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if reverse_alone():
        # The weight is not in every version of torch.
        weighted = {} if weight is None else {"weight": weight}
        return F.mse_loss(input, target, size_average, reduce, reduction, **weighted)
    squares = (input - target).square()
    if weight is None:
        return reduced(squares, reduction, size_average, reduce)
    loss = squares * weight
    return loss.sum() / weight.sum() if reduction == "mean" else reduced(loss, reduction)


def _smooth_l1_loss(
    keys: Keys,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    if reverse_alone():
        return F.smooth_l1_loss(input, target, size_average, reduce, reduction, beta)
    error = (input - target).abs()
    loss = error if beta == 0 else torch.where(error < beta, error.square() / (2 * beta), error - beta / 2)
    return reduced(loss, reduction, size_average, reduce)


def _binary_cross_entropy_with_logits(
    keys: Keys,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    if reverse_alone():
        return F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)
    share = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * input + share * F.softplus(-input, 1.0, 40.0)
    return reduced(loss if weight is None else weight * loss, reduction, size_average, reduce)


@under_transforms(F.hinge_embedding_loss)
def _hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    # torch writes into zeros that vmap may not have batched.
    apart = torch.where(target != 1, (margin - input).clamp_min(0), 0.0)
    return reduced(apart + torch.where(target != -1, input, 0.0), reduction, size_average, reduce)


@under_transforms(F.cosine_embedding_loss)
def _cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    tiny = 1e-12  # what torch adds
    lengths = ((input1.square().sum(-1) + tiny) * (input2.square().sum(-1) + tiny)).sqrt()
    cosine = (input1 * input2).sum(-1) / lengths
    apart = torch.where(target == -1, (cosine - margin).clamp_min(0), 0.0)
    return reduced(torch.where(target == 1, 1 - cosine, apart), reduction, size_average, reduce)


def _logsigmoid(keys: Keys, input: Tensor) -> Tensor:
    return logsigmoid(input)


def _glu(keys: Keys, input: Tensor, dim: int = -1) -> Tensor:
    return gated(input, dim)


@under_transforms(F.kl_div)
def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    loss = target.exp() * (target - input) if log_target else torch.xlogy(target, target) - target * input
    if reduction == "batchmean":
        return loss.sum() / (input.shape[0] if input.ndim else 1)
    return reduced(loss, reduction, size_average, reduce)


def _cross_entropy(
    keys: Keys,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if weight is None or label_smoothing == 0 or target.is_floating_point() or not transformed():
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing=label_smoothing
        )
    # torch sums the weights over a selection, whose size depends on the targets.
    dim, kept = min(1, input.ndim - 1), target != ignore_index
    scores = F.log_softmax(input, dim)
    sharp = F.nll_loss(scores, target, weight, ignore_index=ignore_index, reduction="none")
    even = -(scores * weight.view(-1, *(1,) * (input.ndim - dim - 1))).sum(dim).where(kept, 0.0)
    loss = (1 - label_smoothing) * sharp + label_smoothing / weight.shape[0] * even
    if reduction != "mean":
        return reduced(loss, reduction)
    return loss.sum() / weight[target.where(kept, 0)].where(kept, 0.0).sum()


def _bilinear(keys: Keys, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not transformed():
        return F.bilinear(input1, input2, weight, bias)
    y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


def reduced(loss: Tensor, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> Tensor:
    """Return the losses as they are, their mean or their sum."""
    if size_average is not None or reduce is not None:  # deprecated arguments
        reduction = legacy_reduction(size_average, reduce)
    return loss if reduction == "none" else _REDUCTIONS[reduction](loss)


_LOSSES: dict[Any, Callable[..., Any]] = {
    F.bilinear: _bilinear,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    F.cosine_embedding_loss: _cosine_embedding_loss,
    F.cross_entropy: _cross_entropy,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.glu: _glu,
    F.hinge_embedding_loss: _hinge_embedding_loss,
    F.huber_loss: _huber_loss,
    F.kl_div: _kl_div,
    F.logsigmoid: _logsigmoid,
    F.mse_loss: _mse_loss,
    F.smooth_l1_loss: _smooth_l1_loss,
}


@under_transforms(F.soft_margin_loss)
def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return reduced(torch.log1p(torch.exp(-target * input)), reduction, size_average, reduce)


@under_transforms(F.margin_ranking_loss)
def _margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return reduced((margin - target * (input1 - input2)).clamp_min(0), reduction, size_average, reduce)


@under_transforms(F.triplet_margin_loss)
def _triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, pairwise_distance(positive, negative, p, eps))
    return reduced((margin + near - far).clamp_min(0), reduction, size_average, reduce)


@under_transforms(F.multi_margin_loss)
def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    classes = torch.arange(input.shape[-1], device=input.device)
    own = classes == target.unsqueeze(-1)
    excess = (margin - (input * own).sum(-1, keepdim=True) + input).clamp_min(0) ** p
    excess = excess if weight is None else excess * (weight * own).sum(-1, keepdim=True)
    return reduced(excess.where(~own, 0.0).mean(-1), reduction, size_average, reduce)


@under_transforms(F.multilabel_margin_loss)
def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    counts = (target >= 0).long().cumprod(-1).bool()  # the labels end where the first negative number stands
    own = target.unsqueeze(-1) == torch.arange(input.shape[-1], device=input.device)
    others = ~(own & counts.unsqueeze(-1)).any(-2, keepdim=True)
    excess = (1 - (input.unsqueeze(-2) * own).sum(-1, keepdim=True) + input.unsqueeze(-2)).clamp_min(0)
    pairs = excess.where(counts.unsqueeze(-1) & others, 0.0)
    return reduced(pairs.sum((-2, -1)) / input.shape[-1], reduction, size_average, reduce)


_MARGINS: dict[Any, Callable[..., Any]] = {
    F.margin_ranking_loss: _margin_ranking_loss,
    F.multi_margin_loss: _multi_margin_loss,
    F.multilabel_margin_loss: _multilabel_margin_loss,
    F.soft_margin_loss: _soft_margin_loss,
    F.triplet_margin_loss: _triplet_margin_loss,
}


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
        raise out_of_range("blank", blank, f"a class, from 0 to {classes - 1}")
    steps, sizes = (_lengths(given, batch, log_p.device) for given in (input_lengths, target_lengths))
    labels = targets.to(log_p.device).long()
    longest = labels.shape[-1]
    _require_range("Input lengths", steps, 0, time)
    _require_range("Target lengths", sizes, 0, longest)
    if labels.ndim == 1:
        labels, sizes = _side_by_side(labels, sizes, time)
    elif labels.shape[0] != batch:
        raise out_of_range("The batch of targets", labels.shape[0], f"that of log_probs, {batch}")
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
    """Return the lengths as a tensor, one for each sequence."""
    lengths = given if isinstance(given, Tensor) else torch.tensor(given)
    lengths = lengths.to(device).long().reshape(-1)
    if lengths.shape[0] != batch:
        raise out_of_range("The number of lengths", lengths.shape[0], f"that of the sequences, {batch}")
    return lengths


def _side_by_side(labels: Tensor, sizes: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """Return concatenated labels as one row for each sequence, of at most the input's length, and their lengths."""
    total = labels.shape[0]
    _require_range("The sum of the target lengths", sizes.sum(), total, total)
    starts = sizes.cumsum(0) - sizes
    places = starts[:, None] + torch.arange(min(time, total), device=labels.device)
    rows = labels[places.clamp(0, max(total - 1, 0))]
    return rows, torch.where(sizes.sum() == total, sizes, -1)


def _require_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise if values are out of range; where they cannot be read, the losses are NaN instead."""
    if traced() or watched():
        return
    seen = unwrapped(values)
    wrong = seen[(seen < low) | (seen > high)]
    if wrong.numel():
        raise out_of_range(name, int(wrong.flatten()[0]), f"from {low} to {high}" if low < high else str(low))


_CTC: dict[Any, Callable[..., Any]] = {
    F.ctc_loss: under_transforms(F.ctc_loss)(_ctc_loss),
    torch.ctc_loss: under_transforms(torch.ctc_loss)(_by_number),
}


REPLACEMENTS: dict[Any, Callable[..., Any]] = {**_LOSSES, **_MARGINS, **_CTC}
