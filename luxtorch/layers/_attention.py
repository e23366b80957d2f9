"""Attention: `scaled_dot_product_attention` and `MultiHeadAttention`, with a cache for generation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import functional, kernel_with_formula, traced, unwrapped, watched
from luxtorch.core import (
    TRAINING,
    ContainerLayer,
    DTypeError,
    InputError,
    Parameters,
    States,
    out_of_range,
    wrong_shape,
    wrong_type,
)
from luxtorch.core._call_errors import wrong_names
from luxtorch.core._paths import replace_children
from luxtorch.core._sharded import beside, is_sharded
from luxtorch.init import Initializer, glorot_uniform, zeros

from ._dropout import Dropout, dropped
from ._embedding import RotaryPositionalEmbedding
from ._linear import Dense
from ._shared import HALVES, require_size, unfit


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
    """Scaled dot-product attention: `softmax(q @ k.T * scale + mask) @ v`.

    A fully masked query gets zeros, and zero gradients. With fewer key heads than query heads, each key head serves a
    group of query heads (grouped-query attention).

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
    if not 0 <= dropout_p <= 1:
        raise out_of_range("dropout_p", dropout_p, "between 0 and 1")
    if dropout_p > 0 and key is None:
        raise InputError("Dropout needs a key.", fix="Pass key=lt.random.key(0), a new one at each call.")
    # The fused kernel is differentiable by plain autograd, and known to the compiler; sharded tensors lack it on a CPU.
    unknown = functional() or (is_sharded(q) and q.device.type == "cpu")
    if dropout_p == 0 and not unknown and not (mask is not None and mask.requires_grad):
        return _by_kernel(q, k, v, mask, is_causal, scale)
    weights = attention_weights(q, k, mask=mask, is_causal=is_causal, scale=scale)
    if key is not None and dropout_p > 0:
        weights = dropped(weights, key, dropout_p, tuple(weights.shape))
    return attended(weights, v)


def attention_weights(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return the weight of each key for each query, (..., heads, q_len, kv_len); arguments as above, unchecked."""
    combined, attends = _combined_mask(mask, is_causal, q, k)
    weights = _softmax_of_scores(q, k, combined, scale)
    return weights if attends is None else weights.masked_fill(~attends, 0.0)


def attended(weights: Tensor, v: Tensor) -> Tensor:
    """Return the averages of the values by attention weights."""
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


def _combined_mask(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask combined with the causal one, and which queries are not fully masked (None: all of them).

    In the combined mask a fully masked query attends to everything: so its softmax and the derivatives are finite,
    before the result is set to zero.
    """
    causal = None
    if is_causal:
        causal = beside(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), q)
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
        mask, attends = _combined_mask(mask, is_causal, q, k)
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
            "The shapes of queries, keys and values must match.",
            expected="q (..., heads, q_len, qk_features), k (..., kv_heads, kv_len, qk_features) and "
            "v (..., kv_heads, kv_len, v_features), with heads a multiple of kv_heads",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], k.shape[-2]))


def _check_mask(mask: Tensor, wanted: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kinds = "a tensor of booleans, True where a query may attend to a key, or of numbers to add to the scores"
        raise wrong_type("mask", mask, kinds, fix="Pass mask.bool() if 1 means attend, mask == 0 if 1 means ignore.")
    pairs = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.ndim > len(wanted) or any(size not in (1, full) for size, full in pairs):
        fix = "Give a mask of keys, (batch, kv_len), as mask[:, None, None, :]."
        raise wrong_shape("mask", mask, f"a shape that broadcasts to {wanted}, (..., queries, keys)", fix=fix)


class MultiHeadAttention(ContainerLayer):
    """Multi-head attention: project queries, keys and values, attend in each head, and project the result.

    A boolean mask is True where a query may attend to a key, as in Lux and in torch's functional form;
    `torch.nn.MultiheadAttention` has it the other way round. A fully masked query gets zeros from the
    attention, and so the bias of the last projection.

    Args:
        embed_dim: The width of the queries.
        num_heads: The number of heads.
        num_kv_heads: The number of heads of keys and values, each shared by as many heads of queries; `num_heads`
            if None.
        kdim: The width of the keys; `embed_dim` if None.
        vdim: The width of the values; `embed_dim` if None.
        qk_features: The width of all heads' projected queries; `embed_dim` if None.
        v_features: The width of all heads' projected values; `embed_dim` if None.
        out_features: The width of the output; `embed_dim` if None.
        bias: Whether the projections have biases.
        dropout: The probability with which each weight is dropped while training.
        is_causal: Whether query i attends to the keys 0 to i only; a mask applies as well.
        rotary: A layer that rotates the queries and keys of each head by their positions, of size
            `qk_features / num_heads`; or None.
        cache: For generation, (batch_size, max_length), or (max_length,) for a single sequence: keys and values stay in
            the state, and each call goes on where the last one ended. `lt.with_cache` sets it in a whole model. Only
            causal attention of a sequence to itself can have one.
        return_weights: Whether the output is a tuple, the weights its second element.
        init_weight: The initializer of the projections' weights.
        init_bias: The initializer of the projections' biases.

    Parameters:
        q_proj: Those of `Dense(embed_dim, qk_features)`.
        k_proj: Those of `Dense(kdim, qk_features * num_kv_heads / num_heads)`.
        v_proj: Those of `Dense(vdim, v_features * num_kv_heads / num_heads)`.
        attention_dropout: None.
        out_proj: Those of `Dense(v_features, out_features)`.
        rotary: None; it is there only with `rotary`.

    States:
        attention_dropout: Those of `Dropout(dropout)`. The projections have none.
        rotary: Those of `rotary`, if there is one.
        cache: With `cache`, `keys` and `values` (batch_size, num_kv_heads, max_length, features of a head), and
            `position`, the number of elements so far. Alone of all states it is not detached: derivatives of a call
            include what they owe to the calls before.

    Shape:
        A tensor x (..., length, embed_dim), which attends to itself, or a tuple: `(q, kv)`, `(q, k, v)` or
        `(q, k, v, mask)`, so `(x, x, x, mask)` for self-attention with a mask; to (..., q_len, out_features).
        Weights are (..., num_heads, q_len, kv_len), to which a mask broadcasts: (q_len, kv_len) for all samples, or
        (batch, 1, 1, kv_len), written `mask[:, None, None, :]`, for keys that are padding. With a cache, kv_len is
        its max_length.

    Raises:
        InputError: If the heads do not divide the widths, or an input or the mask has another shape. With a cache, if
            dropout is on, if tensors are sharded, or if there are more elements than max_length; inside of `lt.jit`
            and on a GPU, where that cannot be seen, the output is NaN instead.
        DTypeError: If the mask holds integers, or an input's dtype is not that of the parameters, or of the cache.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.MultiHeadAttention(8, num_heads=2, is_causal=True, return_weights=True)
        >>> ps, st = lt.setup(0, model)
        >>> (y, weights), st = model(torch.ones(5, 3, 8), ps, st)
        >>> y.shape, weights.shape
        (torch.Size([5, 3, 8]), torch.Size([5, 2, 3, 3]))
        >>> weights[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])

    Source: Lux's `MultiHeadAttention`, `torch.nn.MultiheadAttention`; Ainslie et al., "GQA", 2023, for shared heads.
    """

    num_heads: int
    num_kv_heads: int
    is_causal: bool
    return_weights: bool
    q_proj: Dense
    k_proj: Dense
    v_proj: Dense
    attention_dropout: Dropout
    out_proj: Dense
    rotary: RotaryPositionalEmbedding | None
    cache: tuple[int, ...] | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        qk_features: int | None = None,
        v_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        is_causal: bool = False,
        rotary: RotaryPositionalEmbedding | None = None,
        cache: tuple[int, ...] | None = None,
        return_weights: bool = False,
        init_weight: Initializer = glorot_uniform,
        init_bias: Initializer = zeros,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        given = {"kdim": kdim, "vdim": vdim, "qk_features": qk_features, "v_features": v_features}
        widths = {name: embed_dim if width is None else width for name, width in given.items()}
        qk, values = widths["qk_features"], widths["v_features"]
        _check(embed_dim, num_heads, kv_heads, widths)
        _check_rotary(rotary, qk // num_heads)

        def dense(width: int, features: int) -> Dense:
            return Dense(width, features, bias=bias, init_weight=init_weight, init_bias=init_bias)

        self._set(
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            is_causal=is_causal,
            return_weights=return_weights,
            q_proj=dense(embed_dim, qk),
            k_proj=dense(widths["kdim"], qk // num_heads * kv_heads),
            v_proj=dense(widths["vdim"], values // num_heads * kv_heads),
            attention_dropout=Dropout(dropout),
            out_proj=dense(values, embed_dim if out_features is None else out_features),
            rotary=rotary,
            cache=None,
        )
        if cache is not None:
            self._set_cache(cache)

    def _set_cache(self, shape: Any) -> None:
        if not self.is_causal:
            raise out_of_range(
                "is_causal", False, "True with a cache", fix="Pass is_causal=True: what comes later must not count."
            )
        sizes = tuple(shape) if isinstance(shape, tuple | list) else ()
        whole = [isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes]
        if not sizes or not all(whole) or sizes[-1] < 1:
            raise out_of_range("cache", shape, "(batch_size, max_length), or (max_length,)")
        if self.rotary is not None and sizes[-1] > self.rotary.max_sequence_length:
            limit = f"at most max_sequence_length={self.rotary.max_sequence_length} of the rotary embedding"
            raise out_of_range("max_length", sizes[-1], limit)
        self._set(cache=sizes)

    def cached(self, shape: tuple[int, ...]) -> MultiHeadAttention:
        """Return the same layer with a cache, if it is causal; see `lt.with_cache`.

        Args:
            shape: (batch_size, max_length), or (max_length,).
        """
        if not self.is_causal:
            return self
        new = replace_children(self, {})
        new._set_cache(shape)
        return new

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layers inside, and an empty cache."""
        states = super().initial_states(key)
        if self.cache is None:
            return states
        *batch, length = self.cache
        widths = {"keys": self.k_proj.out_features, "values": self.v_proj.out_features}
        kv_heads, device = self.num_kv_heads, key.device
        cache = {
            name: torch.zeros(*batch, kv_heads, length, width // kv_heads, device=device)
            for name, width in widths.items()
        }
        return {**states, "cache": {**cache, "position": torch.zeros((), dtype=torch.int64, device=device)}}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output, with the weights if asked for, and the states of the dropout and the cache."""
        q, k, v, mask = self._inputs(x)
        new = dict(st)
        q, new["q_proj"] = self.q_proj(q, ps["q_proj"], st["q_proj"])
        k, new["k_proj"] = self.k_proj(k, ps["k_proj"], st["k_proj"])
        v, new["v_proj"] = self.v_proj(v, ps["v_proj"], st["v_proj"])
        q, k, v = _heads(q, self.num_heads), _heads(k, self.num_kv_heads), _heads(v, self.num_kv_heads)
        dropout_ps, dropout_st = ps["attention_dropout"], st["attention_dropout"]
        drops = self.attention_dropout.p > 0 and dropout_st.get(TRAINING)
        places = None if self.cache is None else self._places(q, k, v, st["cache"], bool(drops))
        if self.rotary is not None:
            q, k = (self._rotated(each, places, ps, st) for each in (q, k))
        is_causal, fits = self.is_causal, None
        if places is not None:
            k, v, mask, fits, new["cache"] = _after_the_past(q, k, v, mask, places, st["cache"])
            is_causal = False
        if self.return_weights or drops:
            check_shapes(q, k, v, mask)
            weights = _unless_full(fits, attention_weights(q, k, mask=mask, is_causal=is_causal))
            weights, new["attention_dropout"] = self.attention_dropout(weights, dropout_ps, dropout_st)
            y = attended(weights, v)
        else:
            y = _unless_full(fits, scaled_dot_product_attention(q, k, v, mask=mask, is_causal=is_causal))
            # It drops nothing here, but checks the names in its trees.
            y, new["attention_dropout"] = self.attention_dropout(y, dropout_ps, dropout_st)
        y, new["out_proj"] = self.out_proj(y.transpose(-3, -2).flatten(-2), ps["out_proj"], st["out_proj"])
        return ((y, weights) if self.return_weights else y), new

    def _rotated(self, x: Tensor, places: Tensor | None, ps: Parameters, st: States) -> Tensor:
        """Rotate queries or keys by their positions."""
        assert self.rotary is not None
        # Beyond the cache the output is NaN, whatever the rotation.
        at = None if places is None else places.clamp(max=self.rotary.max_sequence_length - 1)
        y, _ = self.rotary(x if at is None else (x, at), ps["rotary"], st["rotary"])
        return y

    def _places(self, q: Tensor, k: Tensor, v: Tensor, cache: Mapping[str, Tensor], drops: bool) -> Tensor:
        """Return the places in the cache of the elements that come, (length,), after a look at all that must fit."""
        wrong = wrong_names(cache, _IN_CACHE, "state", _TOGETHER)
        if wrong is not None:
            wrong.inside = ("cache",)
            raise wrong
        assert self.cache is not None
        *batch, limit = self.cache
        length = q.shape[-2]
        shapes = [(*each.shape[:-3], each.shape[-2]) for each in (q, k, v)]
        if any(shape != (*batch, length) for shape in shapes):
            raise InputError(
                "With a cache, the input must be one sequence that attends to itself, or a batch of the cache's size.",
                expected=f"(*batch, length) = {(*batch, length)} of queries, keys and values",
                got=", ".join(map(str, shapes)),
                fix="For another batch_size, make another model by lt.with_cache. Cross-attention must not be causal.",
            )
        for name, new in (("keys", k), ("values", v)):
            wanted = (*batch, new.shape[-3], limit, new.shape[-1])
            if tuple(cache[name].shape) != wanted:
                raise wrong_shape(f"The cache of {name}", cache[name], wanted, fix=_TOGETHER)
            if cache[name].dtype != new.dtype:
                raise DTypeError(
                    "The cache must have the dtype of keys and values.",
                    expected=str(new.dtype),
                    got=str(cache[name].dtype),
                    fix="Convert the states too, lt.f64(st), lt.bf16(st) and the like; in autocast, to its dtype.",
                )
        if any(map(is_sharded, (q, k, v, *cache.values()))):
            raise InputError(
                "Attention with a cache must not meet sharded tensors.", fix="Gather the parameters first."
            )
        if drops:
            raise InputError("Attention with a cache must be in test mode.", got="dropout", fix="st = lt.test_mode(st)")
        _require_room(cache["position"], length, limit)
        return cache["position"] + torch.arange(length, device=q.device)

    def _inputs(self, x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        parts = x if isinstance(x, tuple) else (x, x, x)
        parts = (*parts, parts[1]) if len(parts) == 2 else parts
        if not 3 <= len(parts) <= 4 or any(not isinstance(part, Tensor) or part.ndim < 2 for part in parts[:3]):
            fix = "Self-attention with a mask is (x, x, x, mask)."
            raise unfit(self, parts, "The inputs must be sequences of features.", fix=fix)
        q, k, v, mask = (*parts, None)[:4]
        return q, k, v, mask

    def has_mask(self, x: Any) -> bool:
        """Return whether an input includes a mask."""
        return isinstance(x, tuple) and len(x) == 4 and x[3] is not None

    def expected_input(self) -> str:
        """Name the widths, and the forms of a tuple."""
        widths = (self.q_proj.in_features, self.k_proj.in_features, self.v_proj.in_features)
        q, k, v = (f"{name} (..., length, {width})" for name, width in zip("qkv", widths, strict=True))
        return f"x (..., length, {widths[0]}), or a tuple (q, kv), (q, k, v) or (q, k, v, mask) of {q}, {k}, {v}"

    def extra_repr(self) -> str:
        """Return for instance `num_heads=8, is_causal=True`."""
        shown = [f"num_heads={self.num_heads}"]
        shown += [f"num_kv_heads={self.num_kv_heads}"] if self.num_kv_heads != self.num_heads else []
        shown += [f"cache={self.cache}"] if self.cache is not None else []
        return ", ".join(shown + [f"{name}=True" for name in ("is_causal", "return_weights") if getattr(self, name)])


_IN_CACHE = frozenset(("keys", "values", "position"))
_TOGETHER = "Call the model with the states that lt.with_cache, or lt.setup, made for it."


def _require_room(position: Tensor, length: int, limit: int) -> None:
    """Raise if a cache is too small for what comes, where values can be read without waiting for a GPU."""
    before = 0
    if position.device.type == "cpu" and not (traced() or watched()):
        before = int(unwrapped(position).max())
    if before + length > limit:
        raise InputError(
            "The cache must have room for all elements of the sequence.",
            expected=f"at most {limit}",
            got=f"{length} after {before}",
            fix="Make it with a larger max_length.",
        )


def _after_the_past(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, places: Tensor, cache: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return all keys and values, the mask of those that a query attends to, if they fit, and the next cache."""
    position, length, limit = cache["position"], k.shape[-2], cache["keys"].shape[-2]
    slots = torch.arange(limit, device=k.device)
    rows = slots - position
    keys, values = _written(cache["keys"], k, rows), _written(cache["values"], v, rows)
    keep = slots <= places[:, None]
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], limit))
        keep = mask & keep if mask.dtype == torch.bool else torch.where(keep, mask, -math.inf)
    end = position + length
    return keys, values, keep, end <= limit, {"keys": keys, "values": values, "position": end}


def _written(old: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """Return a cache with new elements, given the number of the one that belongs into each slot.

    A pass over the whole cache is no more than attention does anyway. It is a pointwise operation, known to all
    transforms and fused by the compiler, and writes nothing out of range.
    """
    length = new.shape[-2]
    if length == 0:
        return old
    here = (rows >= 0) & (rows < length)
    if length > 1:
        new = new.index_select(-2, rows.clamp(0, length - 1))
    return torch.where(here[:, None], new, old).contiguous()


def _unless_full(fits: Tensor | None, y: Tensor) -> Tensor:
    """Return NaN where a cache had no room; nobody may take that for an output."""
    return y if fits is None else torch.where(fits, y, math.nan)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Reshape (..., length, features) to (..., heads, length, features of a head)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def _check(embed_dim: int, heads: int, kv_heads: int, widths: dict[str, int]) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": heads, "num_kv_heads": kv_heads, **widths}
    for name, size in sizes.items():
        require_size(name, size)
    if heads % kv_heads:
        raise out_of_range("num_heads", heads, f"a multiple of num_kv_heads={kv_heads}")
    for name in ("qk_features", "v_features"):
        if widths[name] % heads:
            raise out_of_range(f"{name} (by default, embed_dim)", widths[name], f"a multiple of num_heads={heads}")


def _check_rotary(rotary: Any, width: int) -> None:
    if rotary is None:
        return
    if not isinstance(rotary, RotaryPositionalEmbedding):
        raise out_of_range("rotary", rotary, "a RotaryPositionalEmbedding, or None")
    if rotary.dim != width:
        raise out_of_range("The size of the rotary embedding", rotary.dim, f"{width}, that of one head")
