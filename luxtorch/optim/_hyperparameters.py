"""Hyperparameters, such as learning rates: their ranges and checks, and the one small tensor that a state carries."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from luxtorch._torch import innermost_transform
from luxtorch.core import InputError, out_of_range, tree_leaves, wrong_type


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval in which a hyperparameter lies, declared in the annotation of a rule's field.

    Values of tensors are not looked at: they may be traced, batched, or on a GPU.

    Args:
        interval: The interval in the usual notation: a bracket stands beside an end that belongs to it, a parenthesis
            beside one that does not.

    Example:
        >>> from typing import Annotated
        >>> import torch
        >>> from luxtorch import optim
        >>> class Damped(optim.LeafwiseRule):
        ...     lr: float | torch.Tensor = 0.1
        ...     damping: Annotated[float | torch.Tensor, optim.Range("[0, 1)")] = 0.5
        ...
        ...     def delta(self, g, p, slots, h):
        ...         return -h["lr"] * (1 - h["damping"]) * g, slots
        >>> Damped(damping=1.0)
        Traceback (most recent call last):
        luxtorch._errors.InputError: damping must be in [0, 1).
          got:      1.0
    """

    interval: str

    def __contains__(self, number: float) -> bool:
        least, most = map(float, self.interval[1:-1].split(","))
        above = least <= number if self.interval[0] == "[" else least < number
        return above and (number <= most if self.interval[-1] == "]" else number < most)

    def __str__(self) -> str:
        return self.interval


NOT_NEGATIVE = Range("[0, inf)")

Number: TypeAlias = float | Tensor
"""What a rule takes for one hyperparameter: a number that is not negative, a 0-d tensor, or a schedule."""

Share: TypeAlias = Annotated[Number, Range("[0, 1]")]
"""How much of something is kept, such as a momentum."""

Positive: TypeAlias = Annotated[Number, Range("(0, inf)")]
"""A number above zero."""

Numbers: TypeAlias = tuple[float, ...] | Tensor
"""What a rule takes for a few of a kind: as many numbers or schedules, or a 1-d tensor."""

Betas: TypeAlias = Annotated[Numbers, Range("[0, 1)")]
"""How much of running averages is kept."""

_T = TypeVar("_T")
_FIXED = "no hyperparameter"
Fixed: TypeAlias = Annotated[_T, _FIXED]
"""A number that is part of a rule's structure, and so neither adjusted nor batched."""

Shapes: TypeAlias = Mapping[str, "tuple[int, ...]"]
"""The hyperparameters of a rule: their names, and the shapes of their values."""

Ranges: TypeAlias = Mapping[str, "tuple[Range, ...]"]
"""Where they lie: one range for all numbers of a hyperparameter, or one for each."""


def declared(cls: type, fields: Sequence[Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Range, ...]]]:
    """Return the shapes and the ranges of a rule's hyperparameters: its fields whose defaults are numbers.

    A field declares its range in its annotation, as by `Betas`; otherwise it is `[0, inf)`.
    """
    notes = {name: note for base in reversed(cls.__mro__) for name, note in _annotations(base).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    ranges: dict[str, tuple[Range, ...]] = {}
    for field in fields:
        metadata = getattr(notes.get(field.name), "__metadata__", ())
        if isinstance(field.default, (float, tuple)) and _FIXED not in metadata:
            shapes[field.name] = (len(field.default),) if isinstance(field.default, tuple) else ()
            ranges[field.name] = tuple(m for m in metadata if isinstance(m, Range)) or (NOT_NEGATIVE,)
    return shapes, ranges


def _annotations(cls: type) -> dict[str, Any]:
    """Return the annotations of a class, evaluated where they are strings and their names can be found."""
    found = {}
    methods = [value.__globals__ for value in vars(cls).values() if inspect.isfunction(value)]
    scope = dict(methods[0] if methods else vars(sys.modules.get(cls.__module__, sys)))
    for name, note in inspect.get_annotations(cls).items():
        if isinstance(note, str):
            try:
                note = eval(note, scope)  # as `typing.get_type_hints` does
            except Exception:  # such as a name that only type checkers import: it declares no range
                continue
        found[name] = note
    return found


def check(name: str, value: object, shape: tuple[int, ...], ranges: tuple[Range, ...]) -> None:
    """Raise unless a hyperparameter has this shape and is made of numbers in range, or is a floating point tensor."""
    wanted = f"{prod(shape)} number{'s' if shape else ''}, or a floating point tensor of shape {shape}"
    several = isinstance(value, (tuple, list))
    if isinstance(value, Tensor):
        got, right_type = tuple(value.shape), value.is_floating_point()
    else:
        numbers: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value]
        got = (len(numbers),) if several else ()
        right_type = all(_is_number(number) or (several and isinstance(number, Tensor)) for number in numbers)
    if not right_type:
        raise wrong_type(name, value, wanted)
    if got != shape:
        raise InputError(
            f"{name} has the wrong shape.",
            expected=wanted,
            got=f"shape {got}",
            fix=f"For many values of {name} at once, use torch.vmap.",
        )
    if isinstance(value, Tensor):
        return
    for i, number in enumerate(numbers):
        if not isinstance(number, Tensor) and number not in ranges[i % len(ranges)]:  # NaN is in none
            raise out_of_range(f"{name}[{i}]" if len(set(ranges)) > 1 else name, value, f"in {ranges[i % len(ranges)]}")


def _is_number(value: object) -> bool:
    return type(value) in (float, int)


def pack(values: Mapping[str, Number | Numbers], *, beside: torch.device) -> Tensor:
    """Return all hyperparameters of a rule in one float64 vector, on the CPU.

    Why float64: a rule then computes with the precision of Python numbers, and a 0-d tensor, as which each of
    them meets the parameters, does not promote their dtype. Why on the CPU: a 0-d CPU tensor may meet tensors
    of any device, and reading it, as the fused kernels must, never waits for a GPU. Only a batch of them, which
    `vmap` makes, has to be beside the parameters; a state that is set up inside a transform puts them there, and
    where a value is a tensor they follow it. Why one vector: it is read at once, and torch.compile, to which a
    0-d float64 CPU tensor is a Python number, would trace everything twice.
    """
    tensors = [value for value in tree_leaves(tuple(values.values())) if isinstance(value, Tensor)]
    inside = innermost_transform() is not None
    device = tensors[0].device if tensors else beside if inside else torch.device("cpu")
    if not values:
        return torch.empty(0, dtype=torch.float64, device=device)
    numbers = [number for value in values.values() for number in (value if isinstance(value, tuple) else (value,))]
    return torch.cat([torch.as_tensor(number, dtype=torch.float64, device=device).reshape(-1) for number in numbers])


def unpack(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Return the hyperparameters by name; those of many models keep their leading dimensions."""
    parts = torch.split(vector, [prod(shape) for shape in shapes.values()], -1)
    return {
        name: part if shape else part.squeeze(-1) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def replace(vector: Tensor, shapes: Shapes, ranges: Ranges, values: Mapping[str, Number | Numbers]) -> Tensor:
    """Return the vector with other values of some hyperparameters; derivatives flow into values that are tensors.

    The vector of many models, from `vmap`, has leading dimensions: a new value serves them all, or has them too.
    """
    parts = unpack(vector, shapes)
    for name, value in values.items():
        many = isinstance(value, Tensor) and value.shape == parts[name].shape
        check(name, value, tuple(parts[name].shape) if many else shapes[name], ranges[name])
        new = torch.as_tensor(value, dtype=vector.dtype, device=vector.device)
        parts[name] = new.expand(parts[name].shape)
    return torch.cat([parts[name] if shape else parts[name].unsqueeze(-1) for name, shape in shapes.items()], -1)


def show(vector: Tensor, shapes: Shapes) -> str:
    """Return the hyperparameters as a user would write them, or their shapes where there are many."""
    return ", ".join(f"{name}={_show(value, shapes[name])}" for name, value in unpack(vector, shapes).items())


def readable(value: Tensor, shape: tuple[int, ...]) -> Any:
    """Return a hyperparameter as a user would write it; as the tensor if it is traced, batched or on a tape."""
    if value.shape != shape or (value.requires_grad and torch.is_grad_enabled()):
        return value
    try:
        numbers = value.tolist()
    except RuntimeError:
        return value
    return tuple(numbers) if shape else numbers


def _show(value: Tensor, shape: tuple[int, ...]) -> str:
    if value.shape != shape:
        return f"<{'x'.join(map(str, value.shape))}>"
    try:
        numbers = value.tolist()
    except RuntimeError:  # it is traced, or batched by vmap
        return "<traced>"
    return f"({', '.join(map(repr, numbers))})" if shape else repr(numbers)
