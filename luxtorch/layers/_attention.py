"""Scaled dot-product attention as a function, by torch's kernel where that is safe and by the formula elsewhere."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import functional, kernel_with_formula
from luxtorch.core import DTypeError, InputError

from ._dropout import dropped
from ._normalise import HALVES


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """Return the average of the values, weighted by how well their keys match each query.

    A query that may attend to no key gets zeros, and so do its derivatives. With fewer key heads than query heads,
    each of the former serves a group of the latter.

    Args:
        q: The queries, (..., heads, q_len, qk_features).
        k: The keys, (..., kv_heads, kv_len, qk_features); kv_heads divides heads.
        v: The values, (..., kv_heads, kv_len, v_features).
        mask: Either booleans, True where a query may attend to a key, or numbers to add to the scores. It broadcasts
            to (..., heads, q_len, kv_len).
        is_causal: Whether query i may attend to the keys 0 to i only; a mask applies as well.
        scale: Multiplies the scores; 1 / sqrt(qk_features) if None.
        dropout_p: The probability with which each weight is dropped.
        key: The key that decides which weights are dropped.

    Returns:
        (..., heads, q_len, v_features)

    Raises:
        InputError: If shapes do not fit, or dropout has no key.
        DTypeError: If the mask holds integers.

    Example:
        >>> import torch, luxtorch as lt
        >>> v = torch.tensor([[1.0], [3.0]])
        >>> lt.scaled_dot_product_attention(torch.zeros(2, 1), torch.zeros(2, 1), v, is_causal=True)
        tensor([[1.],
                [2.]])

    Source: `torch.nn.functional.scaled_dot_product_attention`; LuxLib's, whose `scale` divides; Vaswani et al.,
    "Attention is all you need", 2017.
    """
    check_shapes(q, k, v, mask)
    if not 0 <= dropout_p <= 1 or (dropout_p > 0 and key is None):
        raise InputError(
            "Dropout takes a probability and a key.",
            expected="0 <= dropout_p <= 1, and a key if it is not 0",
            got=f"dropout_p={dropout_p}, key={key}",
            fix="Pass key=lt.random.key(0), a new one at each call.",
        )
    # The kernel knows an autograd tape, and the compiler knows the kernel.
    if dropout_p == 0 and not functional() and not (mask is not None and mask.requires_grad):
        return _by_kernel(q, k, v, mask, is_causal, scale)
    weights = attention_weights(q, k, mask=mask, is_causal=is_causal, scale=scale)
    if key is not None and dropout_p > 0:
        weights = dropped(weights, key, dropout_p, tuple(weights.shape))
    return attended(weights, v)


def attention_weights(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return the weight of each key for each query, (..., heads, q_len, kv_len); arguments as above, unchecked."""
    opened, attends = _opened(mask, is_causal, q, k)
    weights = _softmax_of_scores(q, k, opened, scale)
    return weights if attends is None else weights.masked_fill(~attends, 0.0)


def attended(weights: Tensor, v: Tensor) -> Tensor:
    """Return the weighted averages of the values."""
    return weights @ _for_each_head(v, weights)


def _softmax_of_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    wide_q, wide_k = (x.float() if x.dtype in HALVES else x for x in (q, k))
    factor = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    scores = (wide_q * factor) @ _for_each_head(wide_k, q).mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return scores.softmax(-1).to(q.dtype)


def _for_each_head(x: Tensor, heads_of: Tensor) -> Tensor:
    """Repeat each head of keys or values for the group of query heads that it serves."""
    if x.ndim < 3 or x.shape[-3] == heads_of.shape[-3]:
        return x
    return x.repeat_interleave(heads_of.shape[-3] // x.shape[-3], -3)


def _opened(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return one mask for all that applies, and which queries attend to anything at all (None: all of them).

    In the mask a query that attends to nothing attends to everything: its softmax is finite, and so is all that
    is computed from it before the result is set to zero.
    """
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril() if is_causal else None
    if mask is None:
        return causal, None
    keep = mask if mask.dtype == torch.bool else mask != -math.inf
    keep = keep if causal is None else keep & causal
    attends = keep.any(-1, keepdim=True)
    if mask.dtype == torch.bool:
        return keep | ~attends, attends
    return torch.where(keep, mask, torch.where(attends, -math.inf, 0.0)), attends


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    attends = None
    if mask is not None:
        mask, attends = _opened(mask, is_causal, q, k)
        is_causal = False
    kernel = partial(_kernel, mask=mask, is_causal=is_causal, scale=scale)
    if torch.compiler.is_compiling():
        y = kernel(q, k, v)
    else:
        y = kernel_with_formula(kernel, partial(_formula, mask=mask, is_causal=is_causal, scale=scale), q, k, v)
    return y if attends is None else y.masked_fill(~attends, 0.0)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    grouped = q.ndim > 2 and q.shape[-3] != k.shape[-3]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def _formula(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attended(attention_weights(q, k, **options), v)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise unless queries, keys, values and mask fit each other."""
    fits = q.ndim == k.ndim == v.ndim >= 2 and q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1]
    if fits and q.ndim > 2:
        heads, kv_heads = q.shape[-3], k.shape[-3]
        fits = q.shape[:-3] == k.shape[:-3] and (heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0))
    if not fits:
        raise InputError(
            "Queries, keys and values do not fit each other.",
            expected="q (..., heads, q_len, qk_features), k (..., kv_heads, kv_len, qk_features) and "
            "v (..., kv_heads, kv_len, v_features), with heads a multiple of kv_heads",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], k.shape[-2]))


def _check_mask(mask: Tensor, wanted: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise DTypeError(
            "A mask is a tensor of booleans or real numbers.",
            expected="torch.bool, True where a query may attend to a key, or numbers to add to the scores",
            got=f"{mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}",
            fix="Pass mask.bool() if 1 means attend, mask == 0 if 1 means ignore.",
        )
    pairs = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.ndim > len(wanted) or any(size not in (1, full) for size, full in pairs):
        raise InputError(
            "The mask does not fit the queries and keys.",
            expected=f"a shape that broadcasts to {wanted}, the last two being queries and keys",
            got=f"{tuple(mask.shape)}",
            fix="Give a mask of keys, (batch, kv_len), as mask[:, None, None, :].",
        )
