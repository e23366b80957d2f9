"""Checks of what a draw is given: its shape, numbers, and tensors of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import InputError, out_of_range, wrong_shape, wrong_type
from luxtorch._transforms import readable

from ._key import checked, is_whole


def drawn(key: Tensor, shape: Sequence[int], dtype: torch.dtype | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and the dtype of a draw, or raise if they do not fit the key."""
    try:
        sizes: tuple[int, ...] = (shape,) if is_whole(shape) else tuple(shape)  # type: ignore[assignment]
    except TypeError:
        raise wrong_type("shape", shape, "a sequence of ints") from None
    batch = checked(key).shape[:-1]
    for size in sizes:
        if not is_whole(size):
            raise wrong_type("Each size in shape", size, "an int")
        if size < 0:
            raise out_of_range("Each size in shape", sizes, "at least 0")
    if len(batch) > len(sizes) or any(b not in (1, s) for b, s in zip(batch, sizes, strict=False)):
        raise InputError(
            "The shape must start with the batch of keys, of which each draws one slice.",
            expected=f"{(*batch, '...')}",
            got=f"{sizes}",
            fix="Add the batch to the shape, or use torch.vmap over the keys.",
        )
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise wrong_type("dtype", dtype, "a real floating point dtype")
    return sizes, dtype


def single(key: Tensor) -> Tensor:
    """Return a key, or raise if it is a batch of them."""
    if checked(key).ndim > 1:
        raise wrong_shape("key", key, "(2,)", fix="For a batch of keys, use torch.vmap.")
    return key


def number(name: str, value: float, expected: str = "a number") -> float:
    """Return a number that is not NaN, or raise if it is not one."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real | torch.SymInt | torch.SymFloat):
            raise wrong_type(name, value, expected)
        value = float(value)
    if math.isnan(value):
        raise out_of_range(name, value, "a number")
    return value


def finite(name: str, value: float) -> float:
    """Return a finite number, or raise if it is not one."""
    if math.isinf(number(name, value)):
        raise out_of_range(name, value, "finite")
    return float(value)


def parameters(
    key: Tensor,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    allowed: Callable[[Any], Any],
    expected: str,
    **given: float | Tensor,
) -> tuple[tuple[int, ...], torch.dtype, list[Tensor]]:
    """Return the shape and the dtype of a draw, and its parameters as tensors of that shape.

    Those that are not allowed are NaN, where they cannot be seen without waiting for a device.

    Args:
        key: A key, or a batch of keys.
        shape: The shape; that to which the parameters broadcast if None.
        dtype: The dtype; that of the tensors among the parameters if None. They are computed with in float32 at least.
        allowed: Tells which values are allowed, of a number or a tensor.
        expected: The same in words.
        given: Numbers and tensors by name.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            if not allowed(number(name, value, "a number or a real tensor")):
                raise out_of_range(name, value, expected)
        elif value.is_complex() or value.dtype == torch.bool:
            raise wrong_type(name, value, "a number or a real tensor")
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    dtype = dtype or (reduce(torch.promote_types, floats) if floats else None)
    if shape is None:
        shape = common_shape(**{name: value.shape for name, value in tensors.items()})
    shape, dtype = drawn(key, shape, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = []
    for name, value in given.items():
        if isinstance(value, Tensor):
            value = spread(name, value.to(wide), shape)
            ok = allowed(value)
            require(name, value, ok, expected)
            found.append(torch.where(ok, value, torch.nan))
        else:
            found.append(torch.full((), value, dtype=wide, device=key.device).expand(shape))
    return shape, dtype, found


def common_shape(**shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape to which the shapes of some parameters broadcast."""
    try:
        return tuple(torch.broadcast_shapes(*shapes.values()))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        listed = ", ".join(f"{tuple(shape)} of {name}" for name, shape in shapes.items())
        raise InputError("The shapes of the parameters must broadcast.", got=listed) from error


def spread(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor, broadcast to a shape."""
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in pairs):
        fix = f"Ask for the shape of the whole output, to which that of {name} broadcasts."
        raise wrong_shape(name, value, f"one that broadcasts to {shape}", fix=fix)
    return value.expand(shape)


def require(name: str, value: Tensor, ok: Tensor, expected: str) -> None:
    """Raise if a tensor has values that are not allowed, where these can be seen without waiting for a device."""
    if readable(ok) and not bool(ok.all()):
        raise out_of_range(name, value.detach()[~ok][0].item(), expected)
