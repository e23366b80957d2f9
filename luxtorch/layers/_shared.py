"""Helpers for layers of several families: checks, initial parameters, printed arguments, half precision."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, Layer, described, out_of_range, show_value
from luxtorch.random import fold_in

HALVES = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """Return a half precision input on the CPU in single precision, for kernels without half precision there."""
    return x.float() if x.dtype in HALVES and x.device.type == "cpu" else x


def require_size(name: str, size: Any, *, fix: str = "") -> None:
    """Raise unless an argument is an integer of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise out_of_range(name, size, "an integer", fix=fix)
    if size < 1:
        raise out_of_range(name, size, "at least 1", fix=fix)


def unfit(layer: Layer, x: Any, problem: str, *, fix: str = "") -> InputError:
    """Return the error for an input that a layer does not take; the problem states the rule that it breaks."""
    got = f"({', '.join(map(described, x))})" if isinstance(x, tuple) else described(x)
    return InputError(problem, expected=layer.expected_input(), got=got, fix=fix)


def initial_weight_and_bias(
    layer: Any, key: Tensor, weight_shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Return the initial `weight` and, if the layer has one, `bias`."""
    ps = {"weight": layer.init_weight(fold_in(key, "weight"), weight_shape)}
    if layer.bias:
        ps["bias"] = layer.init_bias(fold_in(key, "bias"), bias_shape)
    return ps


def arguments_text(layer: Layer, *sizes: Any, **defaults: Any) -> str:
    """Return for instance `32, relu, affine=False`: sizes, activation, and options that are not the default.

    Args:
        layer: The layer, whose keyword-only arguments are the options; initializers are left out.
        *sizes: What comes first, as it is shown.
        **defaults: Defaults of options that depend on others.
    """
    activation = getattr(layer, "activation", None)
    texts = [*map(str, sizes), *([show_value(activation)] if activation else [])]
    for option in inspect.signature(type(layer)).parameters.values():
        name = option.name
        if option.kind is option.KEYWORD_ONLY and name != "activation" and not name.startswith("init_"):
            value = getattr(layer, name)
            short, default = _short(value), defaults.get(name, option.default)
            if default not in (value, short):
                texts.append(f"{name}={show_value(short)}")
    return ", ".join(texts)


def _short(value: Any) -> Any:
    """Return a tuple of equal numbers, or of equal pairs of them, as one number."""
    if not isinstance(value, tuple):
        return value
    inner = [entry[0] if isinstance(entry, tuple) and len(set(entry)) == 1 else entry for entry in value]
    return inner[0] if len(set(inner)) == 1 and isinstance(inner[0], int) else tuple(inner)
