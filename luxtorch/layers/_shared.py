"""Helpers for layers of several families: checks, initial parameters, printed arguments, half precision, loops."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import traced
from luxtorch.core import (
    InputError,
    Layer,
    Parameters,
    described,
    out_of_range,
    show_value,
    tree_flatten,
    tree_map,
    tree_unflatten,
    wrong_type,
)
from luxtorch.core._sharded import settled, sharded_part
from luxtorch.loops import scan
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


def parameter(ps: Parameters, name: str) -> Tensor:
    """Return a parameter; torch's functions would take None for a layer without it."""
    found: Tensor | None = ps[name]
    if found is None:
        raise wrong_type(f"The parameter '{name}'", None, "a tensor", fix="A layer without it is made with an option.")
    return found


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


UNROLLED = 16
"""How many steps a graph may have one by one, which is faster; more are one operator, compiled in the time of one."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`."""
    if sharded_part(weight) is None:
        return F.linear(x, weight, bias)
    # With sharded tensors torch's linear takes no vector, and returns a dimension too many under vmap. The bias comes
    # after the sum over ranks.
    y = settled(F.linear(x, weight) if x.ndim > 1 else weight @ x)
    return y if bias is None else y + bias


def over_steps(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, unrolled: int = UNROLLED
) -> tuple[Any, Any]:
    """Return the last carry and all outputs, stacked, of `carry, y = step(carry, x)` for each step of the inputs.

    Inside of `lt.jit` more than `unrolled` steps are one operator, also under transforms.
    """
    leaves, structure = tree_flatten(xs)
    outputs = []
    if traced() and not torch.compiler.is_compiling() and leaves[0].shape[0] > unrolled:
        if not torch.is_autocast_enabled(leaves[0].device.type):
            return scan(step, carry, xs)
        # After the first step the carry has the dtype that all others return.
        carry, y = step(carry, tree_map(lambda leaf: leaf[0], xs))
        carry, ys = scan(step, carry, tree_map(lambda leaf: leaf[1:], xs))
        return carry, tree_map(lambda first, others: torch.cat((first[None], others)), y, ys)
    # Indexing step by step would take time quadratic in the length when differentiated.
    for x in zip(*(leaf.unbind() for leaf in leaves), strict=True):
        carry, y = step(carry, tree_unflatten(x, structure))
        outputs.append(y)
    return carry, tree_map(lambda *leaves: torch.stack(leaves), *outputs)
