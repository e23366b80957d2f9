"""Models for generation: `with_cache` gives a model's attention a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States, tensors
from luxtorch.core._tree import META_KEY
from luxtorch.layers import Positions, RepeatedLayer, RotaryPositionalEmbedding
from luxtorch.layers._shared import require_size

from ._partition import join
from ._rewired import Triple, everywhere, opened, placed


def with_cache(
    layer: Layer, ps: Parameters, st: States, *, max_length: int, batch_size: int | None = None
) -> tuple[Layer, Any, dict[str, Any]]:
    """Return a model that keeps the keys and values of its causal attention in its states, for generation.

    Each call then goes on where the last one ended: on the tokens of a prompt, then on one new token after another, in
    an `lt.scan`, or on chunks of any lengths. Together they give what the model gives on the whole sequence, gradients
    included, if no other layer looks along the sequence, and each attention is called once in a call of the model.
    Positions come from `lt.Positions`, or from the attention's own `rotary`.

    A layer of one's own takes part with a method `cached(shape)`, which returns the layer with more states, zeros at
    first; the shape is (batch_size, max_length), or (max_length,). Attention that is not causal, such as that to the
    memory of a decoder, stays as it is.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states. If there is dropout in the attention, in test mode: `lt.test_mode(st)`.
        max_length: The most elements of a sequence, in all calls. One more is an error; inside of `lt.jit`, and on a
            GPU, the output is NaN.
        batch_size: The size of the batch; None for a single sequence.

    Returns:
        `(layer, ps, st)`: the model with the same parameters, and with empty caches in its states, of the dtype and on
        the device of the parameters. What was passed in stays as it is: a new sequence begins with the same states.

    Raises:
        InputError: If no layer takes a cache, one is where it cannot be changed, the model has caches already, or a
            size is out of range.
        KeyNameError: If the trees' names are not those of the model.

    Example:
        >>> import torch, luxtorch as lt
        >>> block = lt.TransformerEncoderLayer(8, 2, 16, is_causal=True, rotary=lt.RotaryPositionalEmbedding(4))
        >>> model = lt.Chain(lt.Embedding(65, 8), lt.TransformerEncoder(block, 2), lt.Dense(8, 65))
        >>> ps, st = lt.setup(0, model)
        >>> writer, ps, st = lt.with_cache(model, ps, lt.test_mode(st), batch_size=1, max_length=32)
        >>> scores, st = writer(torch.tensor([[3, 1, 4]]), ps, st)
        >>> def write(carry, _):
        ...     token, st = carry
        ...     scores, st = writer(token, ps, st)
        ...     token = scores.argmax(-1)
        ...     return (token, st), token
        >>> _, tokens = lt.scan(write, (scores[:, -1:].argmax(-1), st), length=20)
        >>> tokens.shape
        torch.Size([20, 1, 1])

    Source: `decode=True` of Flax's attention, whose cache is a collection of states.
    """
    require_size("max_length", max_length)
    if batch_size is not None and batch_size != 0:
        require_size("batch_size", batch_size)
    own_ps, own_st = opened("with_cache(layer, ps, st, max_length=...)", layer, ps, st)
    shape = (max_length,) if batch_size is None else (batch_size, max_length)
    takers: list[Layer] = []
    likes: dict[str, Tensor] = {}

    def change(layer: Layer, ps: Any, st: Any, path: str) -> Triple | None:
        with placed(path):
            _require_sequence(layer, shape)
            new = _changed(layer, shape)
        if new is not None:
            takers.append(layer)
            if weights := tensors(ps):
                likes[path] = weights[0]
            return new, ps, st
        # What is inside of a layer that could take a cache is its own affair.
        return (layer, ps, st) if hasattr(type(layer), "cached") else None

    new, *_ = everywhere(change, layer, own_ps, own_st)
    hidden = [type(inner).__name__ for inner in _inside(new) if _changed(inner, shape) is not None]
    if hidden:
        fix = "Put the parameters together first, by lt.remove_weight_norm and the like."
        raise InputError("A layer whose parameters are made by a wrapper cannot get a cache.", got=hidden[0], fix=fix)
    if all(isinstance(taker, Positions) for taker in takers):
        raise InputError(
            "Some layer of the model must take a cache.",
            expected="MultiHeadAttention, or what holds it, with is_causal=True",
            fix="For another size of a model that has caches, begin with the model that it was made of.",
        )
    numbers = (leaf for leaf in tensors((own_ps, own_st)) if leaf.is_floating_point())
    return new, ps, _filled(new.initial_states(META_KEY), own_st, likes, next(numbers, None))


def _changed(layer: Layer, shape: tuple[int, ...]) -> Layer | None:
    """Return a layer with its cache; None if it takes none, or has one already."""
    if not hasattr(type(layer), "cached"):  # not of the layer, as some wrappers have the attributes of what they hold
        return None
    new: Layer = layer.cached(shape)  # type: ignore[attr-defined]
    return None if new._names == layer._names else new


def _require_sequence(layer: Layer, shape: tuple[int, ...]) -> None:
    """Raise for layers with which the calls on parts of a sequence would not be the one on all of it."""
    if isinstance(layer, RotaryPositionalEmbedding):
        raise InputError(
            "In a model with caches, a rotary embedding must belong to the attention, which knows where it is.",
            expected="MultiHeadAttention(..., rotary=lt.RotaryPositionalEmbedding(...))",
            fix="Or give the layer that holds it a method cached(shape).",
        )
    once = not isinstance(layer, RepeatedLayer) or layer.repeats == 1
    if not once and any(_changed(inner, shape) is not None for inner in _inside(layer)):
        raise InputError(
            "Attention with a cache must be called once in a call of the model.",
            got=f"a RepeatedLayer, {layer.extra_repr()}",
            fix="Write the calls one after another, each a layer, and share their parameters: lt.share_parameters.",
        )


def _inside(value: Any) -> Iterator[Layer]:
    """Yield a layer and all layers inside, also those whose parameters a wrapper makes, which are no children."""
    if isinstance(value, Layer):
        yield value
        for held in vars(value).values():
            yield from _inside(held)
    elif isinstance(value, tuple | list):
        for held in value:
            yield from _inside(held)


def _filled(
    wanted: Mapping[str, Any], st: Mapping[str, Any], likes: Mapping[str, Tensor], like: Tensor | None, path: str = ""
) -> dict[str, Any]:
    """Return states with zeros where wanted ones are missing.

    Args:
        wanted: All states, on the meta device.
        st: Those that there are.
        likes: A parameter for each place, whose dtype and device the new ones have.
        like: One for places without; None if there is none at all.
        path: Where the states are.
    """
    like = likes.get(path, like)
    new = dict(st)
    for name, leaf in wanted.items():
        if isinstance(leaf, Mapping):
            new[name] = _filled(leaf, st.get(name, {}), likes, like, join(path, name))
        elif name not in st:
            dtype = like.dtype if like is not None and leaf.is_floating_point() else leaf.dtype
            new[name] = torch.zeros(leaf.shape, dtype=dtype, device=None if like is None else like.device)
    return new
