"""Scaled dot product attention with forward-mode and second derivatives, and with dropout from a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._torch import native_multi_head_attention
from luxtorch.layers._attention import attended, attention_weights, scaled_dot_product_attention

from ._keys import Keys


def _scaled_dot_product_attention(
    keys: Keys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.is_nested or (is_causal and attn_mask is not None):
        # Nested tensors have kernels of their own; and for two masks torch raises an error.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = _same_batch(query, key, value, 3 if enable_gqa else 2)
    drawn = keys.next() if dropout_p > 0 else None
    return scaled_dot_product_attention(
        query, key, value, mask=attn_mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p, key=drawn
    )


def _same_batch(query: Tensor, key: Tensor, value: Tensor, own: int) -> tuple[Tensor, ...]:
    """Expand the batch dimensions, which torch broadcasts and the layers of luxtorch do not."""
    inputs = (query, key, value)
    batch = query.shape[:-own]
    if key.shape[:-own] == batch and value.shape[:-own] == batch:
        return inputs
    batch = torch.Size(torch.broadcast_shapes(*(x.shape[:-own] for x in inputs)))  # type: ignore[no-untyped-call]
    return tuple(x.expand(*batch, *x.shape[-own:]) for x in inputs)


def _native_multi_head_attention(
    keys: Keys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same as the kernel, which has no derivatives; True in its masks leaves a key out."""
    inputs = zip((query, key, value), in_weight.chunk(3), in_bias.chunk(3), strict=True)
    width = embed_dim // num_heads
    q, k, v = (F.linear(*each).reshape(len(query), -1, num_heads, width).transpose(1, 2) for each in inputs)
    if mask is not None:
        mask = mask[:, None, None, :] if mask_type == 1 else mask
        mask = ~mask if mask.dtype == torch.bool else mask
    weights = attention_weights(q, k, mask=mask)
    y = F.linear(attended(weights, v).transpose(1, 2).flatten(2), out_weight, out_bias)
    return y, (weights.mean(1) if average_attn_weights else weights) if need_weights else None


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    native_multi_head_attention: _native_multi_head_attention,
}
