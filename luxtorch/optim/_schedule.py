"""What a schedule is: a frozen function from the number of steps taken to a value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = "float | Tensor"
"""A number, or many in a tensor."""


@dataclass(frozen=True)
class Schedule:
    """Be a schedule: a frozen, hashable function from the number of steps taken to a value.

    A rule takes one in place of a number: `Adam(lr=cosine(0.1, 0.0, 1000))`. It becomes part of the structure of the
    state, which counts the steps in a tensor: one compiled graph serves them all. A number or a tensor that a
    schedule is multiplied by goes into the state instead, where it can be batched and differentiated:
    `Adam(lr=peak * cosine(1.0, 0.0, 1000))`.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.linear(1.0, 0.0, 4)
        >>> [schedule(step).item() for step in (0, 1, 4, 100)]
        [1.0, 0.75, 0.0, 0.0]
        >>> (0.1 * schedule)(2)
        tensor(0.0500, dtype=torch.float64)
    """

    def __call__(self, step: int | Tensor) -> Tensor:
        """Return the value for the step after so many: a float64 tensor, of the shape of `step`."""
        value = self.at(torch.as_tensor(step).to(torch.float64).clamp(min=0))
        assert isinstance(value, Tensor)
        return value

    @abstractmethod
    def at(self, step: Value) -> Value:
        """Return the value at a step, not below zero: a float64 tensor, or a number, which is faster."""

    def __mul__(self, factor: float | Tensor) -> Scaled:
        return Scaled(self, factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Scaled(Schedule):
    """Multiply a schedule by a number or a 0-d tensor."""

    schedule: Schedule
    factor: float | Tensor

    def at(self, step: Value) -> Value:
        return self.factor * self.schedule.at(step)

    def __mul__(self, factor: float | Tensor) -> Scaled:
        return Scaled(self.schedule, factor * self.factor)

    __rmul__ = __mul__


def schedule_of(value: Any) -> Callable[[Tensor], Any] | None:
    """Return the schedule that a hyperparameter follows, without the factor that the state holds, if it does."""
    if isinstance(value, Scaled):
        return value.schedule
    return value if callable(value) and not isinstance(value, (type, Tensor)) else None


def scale_of(value: Any) -> Any:
    """Return what the state holds of a hyperparameter: the factor of its schedule, or its value."""
    if isinstance(value, Scaled):
        return value.factor
    return value if schedule_of(value) is None else 1.0


def evaluate(schedule: Callable[[Tensor], Any], step: Value) -> Value:
    """Return the value of a schedule, which may be a function that knows tensors only, at a step."""
    if isinstance(step, Tensor):
        return torch.as_tensor(schedule(step), dtype=step.dtype, device=step.device)
    if isinstance(schedule, Schedule):
        return schedule.at(step)
    return float(schedule(torch.tensor(step, dtype=torch.float64)))


torch.serialization.add_safe_globals([Scaled])
