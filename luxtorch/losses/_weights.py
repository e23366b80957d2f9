"""Weights of losses that broadcast to the predictions: numbers in nested tuples, so that a loss stays a value."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import out_of_range
from luxtorch.core._sharded import beside

from ._loss import Loss

Weights: TypeAlias = "float | tuple[Any, ...] | None"
"""A number, or numbers in tuples, or tuples of those: one for each row, and so on."""


def as_weights(loss: Loss, name: str) -> Weights:
    """Return an option of a loss as weights; a tensor's values are read once, here."""
    value = getattr(loss, name)
    try:
        return None if value is None else _frozen(value.tolist() if isinstance(value, Tensor) else value)
    except TypeError as error:
        expected = "a number, or a tuple, a list or a tensor of numbers that broadcasts to the predictions"
        raise out_of_range(name, value, expected, where=type(loss).__name__) from error


def _frozen(value: object) -> float | tuple[Any, ...]:
    """Return a number, or nested tuples whose parts have one shape; raise a TypeError for all else."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, tuple | list) or not value:
        raise TypeError(value)
    parts = tuple(map(_frozen, value))
    if len(set(map(shape_of, parts))) > 1:
        raise TypeError(value)
    return parts


def shape_of(weights: object) -> tuple[int, ...]:
    """Return the shape of the tensor of these weights."""
    return (len(weights), *shape_of(weights[0])) if isinstance(weights, tuple) else ()


def require_weights(loss: Loss, name: str, y_hat: Tensor) -> None:
    """Raise an InputError unless the weights of a loss broadcast to the predictions."""
    shape = shape_of(getattr(loss, name))
    sizes = y_hat.shape[y_hat.ndim - len(shape) :] if len(shape) <= y_hat.ndim else None
    if sizes is None or any(own not in (1, size) for own, size in zip(shape, sizes, strict=True)):
        raise loss.error(
            f"The {name} does not fit the predictions.",
            expected="a number, or numbers that broadcast to the predictions, such as one for each place in the last "
            "dimension",
            got=f"numbers of shape {shape} for predictions of shape {tuple(y_hat.shape)}",
        )


def weights_beside(weights: Weights, y_hat: Tensor) -> Tensor | None:
    """Return weights as a tensor beside the predictions."""
    if weights is None:
        return None
    return beside(torch.tensor(weights, dtype=y_hat.dtype, device=y_hat.device), y_hat)
