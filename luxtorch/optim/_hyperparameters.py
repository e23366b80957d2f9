"""Hyperparameters: from the numbers a user writes to the one small tensor that a state carries."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import innermost_transform
from luxtorch.core import DTypeError, InputError

Number: TypeAlias = "float | Tensor"
"""What a rule takes for one hyperparameter: a number, or a 0-d tensor."""

Numbers: TypeAlias = "tuple[float, ...] | Tensor"
"""What a rule takes for a few of a kind, such as `betas`: as many numbers, or a 1-d tensor."""

Shapes: TypeAlias = Mapping[str, "tuple[int, ...]"]
"""The hyperparameters of a rule: their names, and the shapes of their values."""


def check(name: str, value: object, shape: tuple[int, ...]) -> None:
    """Raise unless a hyperparameter has this shape and is made of numbers in range, or is a floating point tensor.

    The values of tensors are not looked at: they may be traced, batched, or on a GPU.
    """
    wanted = f"{prod(shape)} number{'s' if shape else ''}, or a floating point tensor of shape {shape}"
    if isinstance(value, Tensor):
        got, right_type = tuple(value.shape), value.is_floating_point()
    else:
        numbers: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value]
        got = (len(numbers),) if isinstance(value, (tuple, list)) else ()
        right_type = all(type(number) in (float, int) for number in numbers)
    if not right_type:
        raise DTypeError(
            f"The hyperparameter '{name}' is not a number.",
            expected=wanted,
            got=str(value.dtype) if isinstance(value, Tensor) else repr(value),
        )
    if got != shape:
        raise InputError(
            f"The hyperparameter '{name}' has the wrong shape.",
            expected=wanted,
            got=f"shape {got}",
            fix=f"For many values of {name} at once, use torch.vmap.",
        )
    below = 1.0 if name == "betas" else float("inf")
    if not isinstance(value, Tensor) and not all(0.0 <= number < below for number in numbers):  # NaN is not
        raise InputError(
            f"The hyperparameter '{name}' is out of range.", expected=f"0 <= {name} < {below:g}", got=repr(value)
        )


def pack(values: Mapping[str, Number | Numbers], *, beside: torch.device) -> Tensor:
    """Return all hyperparameters of a rule in one float64 vector, on the CPU.

    Why float64: a rule then computes with the precision of Python numbers, and a 0-d tensor, as which each of
    them meets the parameters, does not promote their dtype. Why on the CPU: a 0-d CPU tensor may meet tensors
    of any device, and reading it, as the fused kernels must, never waits for a GPU. Only a batch of them, which
    `vmap` makes, has to be beside the parameters; a state that is set up inside a transform puts them there, and
    where a value is a tensor they follow it. Why one vector: it is read at once, and torch.compile, to which a
    0-d float64 CPU tensor is a Python number, would trace everything twice.
    """
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    inside = innermost_transform() is not None
    device = tensors[0].device if tensors else beside if inside else torch.device("cpu")
    if not values:
        return torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat(
        [torch.as_tensor(value, dtype=torch.float64, device=device).reshape(-1) for value in values.values()]
    )


def unpack(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Return the hyperparameters by name; those of many models keep their leading dimensions."""
    parts = torch.split(vector, [prod(shape) for shape in shapes.values()], -1)
    return {
        name: part if shape else part.squeeze(-1) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def replace(vector: Tensor, shapes: Shapes, values: Mapping[str, Number | Numbers]) -> Tensor:
    """Return the vector with other values of some hyperparameters; derivatives flow into values that are tensors.

    The vector of many models, from `vmap`, has leading dimensions: a new value serves them all, or has them too.
    """
    parts = unpack(vector, shapes)
    for name, value in values.items():
        many = isinstance(value, Tensor) and value.shape == parts[name].shape
        check(name, value, tuple(parts[name].shape) if many else shapes[name])
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
