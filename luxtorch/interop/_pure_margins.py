"""Losses with margins, whose torch functions lack a batching rule or a derivative in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._pure_losses import reduced, under_transforms
from ._pure_norms import pairwise_distance


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


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.margin_ranking_loss: _margin_ranking_loss,
    F.multi_margin_loss: _multi_margin_loss,
    F.multilabel_margin_loss: _multilabel_margin_loss,
    F.soft_margin_loss: _soft_margin_loss,
    F.triplet_margin_loss: _triplet_margin_loss,
}
