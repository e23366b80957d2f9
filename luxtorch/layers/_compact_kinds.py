"""Telling of what kind the parts of a compact model are, from the values that declare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError, Layer, StatefulLayer, Static
from luxtorch.core._container import refuse_modules

from ._compact_parts import Constant, Content, Group, Leaf, Part


def as_part(value: Any, what: str, *, trainable: bool = True) -> Part:
    """Return the part that a value stands for.

    Args:
        value: The value.
        what: What the value is, for errors.
        trainable: Whether tensors become parameters; otherwise, states.
    """
    kind = _kind(value, what)
    if isinstance(value, Layer):
        return value
    if isinstance(value, Leaf):
        return Leaf(value.start, trainable and value.trainable)
    if isinstance(value, Tensor):
        if trainable and not (value.is_floating_point() or value.is_complex()):
            raise DTypeError(
                f"{what} would be a parameter, which is trained and so made of real or complex numbers.",
                expected="a floating dtype",
                got=f"{value.dtype}",
                fix="Make it a state, lt.non_trainable(...), or convert it, .float().",
            )
        return Leaf(Content.of(value), trainable)
    if kind is None:
        return Constant(_static(value, what))
    stem, first = ("layer_", 1) if kind == "a layer" else ("", 0)
    named = value if isinstance(value, dict) else {f"{stem}{i}": item for i, item in enumerate(value, first)}
    for name in named:
        check_name(name, what)
    parts = tuple(as_part(item, f"{what}, '{name}',", trainable=trainable) for name, item in named.items())
    return Group(tuple(named), parts, isinstance(value, dict))


def as_state(value: Any, what: str) -> Part:
    """Return the part that a value stands for, as a state."""
    if isinstance(value, Static):
        return Leaf(value, trainable=False)
    if _kind(value, what) not in ("a tensor", "a state"):
        raise InputError(
            f"{what} is no tensor.",
            expected="a tensor, lt.init_fn(...), a list or dict of these, or an lt.Static",
            got=f"{value!r:.80} of type {type(value).__name__}",
            fix="Write torch.tensor(...). What never changes needs no wrapper.",
        )
    return as_part(value, what, trainable=False)


def check_name(name: Any, what: str) -> None:
    """Raise unless a name can be read as an attribute, or stand in a path."""
    if not isinstance(name, str) or not name or "." in name or name.startswith("_"):
        raise InputError(
            f"{what} has a name that cannot be used.",
            expected="a string without dots that does not begin with an underscore",
            got=repr(name),
        )


def _kind(value: Any, what: str) -> str | None:
    """Tell what a value is, or what all items of a list or dict are; None is for anything but layers and tensors."""
    if isinstance(value, Group) or (isinstance(value, Leaf) and not value.trainable):
        return "a state"
    if isinstance(value, Tensor | Leaf):
        return "a tensor"
    if isinstance(value, Layer):
        return "a layer"
    if not isinstance(value, list | tuple | dict):
        return None
    kinds = {_kind(item, what): item for item in (value.values() if isinstance(value, dict) else value)}
    if len(kinds) > 1:
        raise InputError(
            f"{what} mixes kinds.",
            expected="layers only, tensors only, or neither",
            got=" and ".join(kind or f"{item!r:.40}" for kind, item in kinds.items()),
            fix="Make separate parts of them; a function among layers becomes one by lt.WrappedFunction(function).",
        )
    return next(iter(kinds), None)


def _static(value: Any, what: str) -> Any:
    """Return a value that is part of the model's description, made hashable."""
    if isinstance(value, list | tuple):
        return tuple(_static(item, what) for item in value)
    if isinstance(value, type) and issubclass(value, Layer):
        raise InputError(f"{what} is a class.", expected="a layer", got=value.__name__, fix=f"{value.__name__}(...)")
    problem = "holds tensors of its own" if isinstance(value, torch.nn.Module | StatefulLayer) else ""
    try:
        hash(value)
    except TypeError:
        problem = "cannot be hashed"
    if problem:
        raise InputError(
            f"{what} {problem}, and is neither a layer nor a tensor.",
            expected="a layer, a tensor, a list or dict of these, or a plain hashable value",
            got=f"{value!r:.80} of type {type(value).__name__}",
            fix="Arrays become tensors by torch.as_tensor; the layer of a StatefulLayer is its attribute layer."
            + " A module becomes a layer by lt.from_torch." * isinstance(value, torch.nn.Module),
        )
    refuse_modules(value, what)
    return value
