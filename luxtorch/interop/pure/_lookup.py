"""Embedding lookups that do not change the weight, with dense gradients and forward-mode derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import functional
from luxtorch.core import out_of_range

from ._keys import Keys


def _embedding(
    keys: Keys,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    rows = F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq)
    if padding_idx is not None and functional():
        # torch leaves out the derivative of the padding row in reverse mode only.
        padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
        rows = torch.where(padding, rows.detach(), rows)
    return rows if max_norm is None else _renormed(rows, max_norm, norm_type)


def _embedding_bag(
    keys: Keys,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if max_norm is not None:
        weight = _renormed(weight, max_norm, norm_type)
    if not functional() or scale_grad_by_freq:
        return F.embedding_bag(
            input,
            weight,
            offsets,
            None,
            norm_type,
            scale_grad_by_freq,
            mode,
            False,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if per_sample_weights is not None and mode != "sum":
        raise out_of_range("mode", mode, "'sum' with per_sample_weights")
    if input.ndim == 1 and offsets is not None:
        starts = offsets[:-1] if include_last_offset else offsets
        bags = starts.shape[0]
        # The bag of each index: the number of bags that start at it or before it, minus one.
        bag = (torch.arange(input.shape[0], device=input.device)[:, None] >= starts).sum(-1) - 1
        inside = torch.arange(bags, device=input.device)[:, None] == bag
        rows = F.embedding(input, weight).expand(bags, *input.shape, weight.shape[-1])
    else:
        inside = torch.ones_like(input, dtype=torch.bool)
        rows = F.embedding(input, weight)
    if padding_idx is not None:
        inside = inside & (input != padding_idx % weight.shape[0])
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if mode == "max":
        largest = rows.masked_fill(~inside.unsqueeze(-1), -torch.inf).amax(-2)
        return largest.masked_fill(~inside.any(-1, keepdim=True), 0.0)
    total = (rows * inside.unsqueeze(-1)).sum(-2)
    return total if mode == "sum" else total / inside.sum(-1, keepdim=True).clamp_min(1)


def _renormed(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Return rows renormalized to a maximum norm, with the gradients of the given rows.

    torch writes the renormalized rows into the weight. Here the weight is not changed.
    """
    norms = rows.detach().norm(norm_type, -1, keepdim=True)
    renormed = torch.where(norms > max_norm, rows.detach() * (max_norm / (norms + 1e-7)), rows.detach())
    return renormed + (rows - rows.detach())


def _aten_embedding(
    keys: Keys,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    padding = None if padding_idx < 0 else padding_idx
    return _embedding(keys, indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def _aten_embedding_bag(
    keys: Keys,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return torch.embedding_bag(weight, indices, offsets, scale_grad_by_freq, mode, False, *args, **kwargs)


def _gather(keys: Keys, input: Tensor, *args: Any, sparse_grad: bool = False, **kwargs: Any) -> Tensor:
    return torch.gather(input, *args, **kwargs)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch.embedding: _aten_embedding,
    torch.embedding_bag: _aten_embedding_bag,
    torch.gather: _gather,
    Tensor.gather: _gather,
}
