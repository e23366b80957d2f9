"""Learning rate schedules, for any hyperparameter: linear, polynomial, exponential, cosine, warm-up, one-cycle."""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import InputError, out_of_range, wrong_type

Value: TypeAlias = "float | Tensor"
"""A number, or many in a tensor."""


@dataclass(frozen=True)
class Schedule:
    """A schedule: a frozen, hashable function from the number of steps taken to a value.

    A rule takes one in place of a number: `Adam(lr=cosine(0.1, 0.0, 1000))`. It becomes part of the structure of the
    state, which counts the steps in a tensor: one compiled graph serves them all. A number or a tensor that a
    schedule is multiplied by goes into the state instead, where it can be batched and differentiated:
    `Adam(lr=peak * cosine(1.0, 0.0, 1000))`. Schedules are added, subtracted, multiplied, divided and raised to a
    power, with each other and with numbers. Each of a few numbers may follow its own:
    `Adam(betas=(0.9, linear(0.95, 0.999, 1000)))`.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.linear(1.0, 0.0, 4)
        >>> [schedule(step).item() for step in (0, 1, 4, 100)]
        [1.0, 0.75, 0.0, 0.0]
        >>> (0.1 * schedule)(2)
        tensor(0.0500, dtype=torch.float64)
        >>> warmup, decay = optim.linear(0.0, 1.0, 2), optim.exponential(1.0, 0.5)
        >>> [(warmup * decay + 1.0)(step).item() for step in (0, 1, 2)]
        [1.0, 1.25, 1.25]
    """

    def __call__(self, step: int | Tensor) -> Tensor:
        """Return the value for the step after so many: a float64 tensor, of the shape of `step`."""
        value = self.at(torch.as_tensor(step).to(torch.float64).clamp(min=0))
        assert isinstance(value, Tensor)
        return value

    @abstractmethod
    def at(self, step: Value) -> Value:
        """Return the value at a step, not below zero: a float64 tensor, or a number, which is faster."""

    def __mul__(self, other: Any) -> Schedule:
        if isinstance(other, Scaled):
            return Scaled(_combined("*", self, other.schedule), other.factor)
        return _combined("*", self, other) if callable(other) else Scaled(self, other)

    __rmul__ = __mul__

    def __neg__(self) -> Schedule:
        return self * -1.0

    def __add__(self, other: Any) -> Schedule:
        return _combined("+", self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Schedule:
        return _combined("-", self, other)

    def __rsub__(self, other: Any) -> Schedule:
        return _combined("-", other, self)

    def __truediv__(self, other: Any) -> Schedule:
        return _combined("/", self, other)

    def __rtruediv__(self, other: Any) -> Schedule:
        return _combined("/", other, self)

    def __pow__(self, other: Any) -> Schedule:
        return _combined("**", self, other)

    def __rpow__(self, other: Any) -> Schedule:
        return _combined("**", other, self)


@dataclass(frozen=True)
class Scaled(Schedule):
    """Multiply a schedule by a number or a 0-d tensor."""

    schedule: Schedule
    factor: float | Tensor

    def at(self, step: Value) -> Value:
        return self.factor * self.schedule.at(step)

    def __mul__(self, other: Any) -> Schedule:
        if isinstance(other, Scaled):
            return Scaled(_combined("*", self.schedule, other.schedule), self.factor * other.factor)
        if callable(other):
            return Scaled(_combined("*", self.schedule, other), self.factor)
        return Scaled(self.schedule, other * self.factor)

    __rmul__ = __mul__


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}


@dataclass(frozen=True)
class Combined(Schedule):
    """Combine two schedules, or one and a number, by an arithmetic operator."""

    left: Callable[[Tensor], Any] | float
    operator: str
    right: Callable[[Tensor], Any] | float

    def at(self, step: Value) -> Value:
        left, right = (evaluate(side, step) if callable(side) else side for side in (self.left, self.right))
        if self.operator == "**" and isinstance(right, Tensor) and not isinstance(left, Tensor):
            left = torch.full_like(right, left)  # torch.compile does not trace the power of a number to a tensor
        value: Value = _OPERATORS[self.operator](left, right)
        return value

    def __repr__(self) -> str:
        return f"({self.left!r} {self.operator} {self.right!r})"


def _combined(symbol: str, left: Any, right: Any) -> Combined:
    for side in (left, right):
        tensor = side.factor if isinstance(side, Scaled) else side
        if isinstance(tensor, Tensor) or not (callable(tensor) or isinstance(tensor, (int, float))):
            raise wrong_type(
                f"what a schedule is combined with by '{symbol}'",
                tensor,
                "a schedule or a number",
                fix="A tensor is a factor on the whole: tensor * (schedule + schedule).",
            )
    return Combined(left, symbol, right)


def schedule_of(value: Any) -> Any:
    """Return the schedule that a hyperparameter follows, without the factor that the state holds, or None.

    Of several numbers, it is a tuple of the schedule of each, if one follows any.
    """
    if isinstance(value, (tuple, list)):
        schedules = tuple(map(schedule_of, value))
        return None if all(schedule is None for schedule in schedules) else schedules
    if isinstance(value, Scaled):
        return value.schedule
    return value if callable(value) and not isinstance(value, (type, Tensor)) else None


def scale_of(value: Any) -> Any:
    """Return what the state holds of a hyperparameter: the factor of its schedule, or its value."""
    if isinstance(value, (tuple, list)):
        return tuple(map(scale_of, value))
    if isinstance(value, Scaled):
        return value.factor
    return value if schedule_of(value) is None else 1.0


def rescaled(schedule: Any, value: Any) -> Any:
    """Return a hyperparameter of which the state holds a value: the value, or its schedule with that as a factor."""
    if schedule is None or value is None:
        return value
    if isinstance(schedule, tuple):
        return tuple(map(rescaled, schedule, value))
    return schedule if isinstance(value, float) and value == 1.0 else Scaled(schedule, value)


def evaluate(schedule: Callable[[Tensor], Any], step: Value) -> Value:
    """Return the value of a schedule, which may be a function that knows tensors only, at a step."""
    if isinstance(step, Tensor):
        return torch.as_tensor(schedule(step), dtype=step.dtype, device=step.device)
    if isinstance(schedule, Schedule):
        return schedule.at(step)
    return float(schedule(torch.tensor(step, dtype=torch.float64)))


def constant(value: float) -> Schedule:
    """Return a schedule that stays at one value.

    Example:
        >>> from luxtorch import optim
        >>> optim.constant(0.1)(7)
        tensor(0.1000, dtype=torch.float64)
    """
    return linear(value, value, 1)


def linear(start: float, end: float, steps: float) -> Schedule:
    """Return a schedule that goes from one value to another in a straight line, and stays there.

    Args:
        start: The value before the first step.
        end: The value after so many steps.
        steps: How many.

    Example:
        >>> from luxtorch import optim
        >>> optim.linear(0.0, 1.0, 10)(3)
        tensor(0.3000, dtype=torch.float64)

    The numbers are those of `torch.optim.lr_scheduler.LinearLR`.
    """
    return polynomial(start, end, steps)


def polynomial(start: float, end: float, steps: float, power: float = 1.0) -> Schedule:
    """Return a schedule along `(1 - step / steps) ** power` from one value to another, which stays there.

    Args:
        start: The value before the first step.
        end: The value after so many steps.
        steps: How many.
        power: The exponent.

    Example:
        >>> from luxtorch import optim
        >>> optim.polynomial(1.0, 0.0, 10, power=2.0)(5)
        tensor(0.2500, dtype=torch.float64)

    The numbers are those of `torch.optim.lr_scheduler.PolynomialLR`.
    """
    _check(start=start, end=end)
    _check_positive(steps=steps, power=power)
    return Polynomial(float(start), float(end), steps, float(power))


def exponential(start: float, gamma: float, steps: float = 1, *, staircase: bool = False) -> Schedule:
    """Return a schedule that is multiplied by `gamma` every so many steps.

    Args:
        start: The value before the first step.
        gamma: The factor.
        steps: In how many steps the factor is reached.
        staircase: Whether the value stays in between, instead of changing at each step.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.exponential(1.0, 0.25, 10, staircase=True)
        >>> [schedule(step).item() for step in (0, 9, 10, 20)]
        [1.0, 1.0, 0.25, 0.0625]

    The numbers are those of `torch.optim.lr_scheduler.ExponentialLR`, and of `StepLR` where it is a staircase.
    """
    _check(start=start)
    _check_positive(steps=steps, gamma=gamma)
    return Exponential(float(start), float(gamma), steps, staircase)


def cosine(start: float, end: float, steps: float) -> Schedule:
    """Return a schedule along half a wave of the cosine from one value to another, which stays there.

    Args:
        start: The value before the first step.
        end: The value after so many steps.
        steps: How many.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.cosine(1.0, 0.0, 10)
        >>> [round(schedule(step).item(), 4) for step in (0, 5, 10, 15)]
        [1.0, 0.5, 0.0, 0.0]

    The numbers are those of `torch.optim.lr_scheduler.CosineAnnealingLR` up to its last step, from where on that
    would rise again. Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017.
    """
    _check(start=start, end=end)
    _check_positive(steps=steps)
    return Cosine(float(start), float(end), steps)


def warmup_cosine(peak: float, warmup_steps: int, steps: int, *, start: float = 0.0, end: float = 0.0) -> Schedule:
    """Return a schedule that rises in a straight line and then falls along half a wave of the cosine.

    Args:
        peak: The highest value.
        warmup_steps: In how many steps it is reached.
        steps: How many steps it takes altogether.
        start: The value before the first step.
        end: The value after the last.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.warmup_cosine(1.0, 2, 12)
        >>> [round(schedule(step).item(), 4) for step in (0, 1, 2, 7, 12)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return join([linear(start, peak, warmup_steps), cosine(peak, end, steps - warmup_steps)], [warmup_steps])


def one_cycle(
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    *,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Return a schedule that rises from a low value to the highest and falls to a much lower one.

    Args:
        max_lr: The highest value.
        total_steps: How many steps it takes altogether.
        pct_start: The part of them in which it rises.
        anneal_strategy: Whether it goes along a cosine or straight lines.
        div_factor: The first value is the highest divided by this.
        final_div_factor: The last value is the first divided by this.
        three_phase: Whether it falls as it rose, to the first value, before it falls to the last.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.one_cycle(1.0, 12, 0.25, anneal_strategy="linear", div_factor=2.0)
        >>> [round(schedule(step).item(), 3) for step in (0, 1, 2, 11)]
        [0.5, 0.75, 1.0, 0.0]

    The names and numbers are those of `torch.optim.lr_scheduler.OneCycleLR`. Smith and Topin, "Super-convergence:
    very fast training of neural networks using large learning rates", 2018.
    """
    if anneal_strategy not in ("cos", "linear"):
        raise out_of_range("anneal_strategy", anneal_strategy, "'cos' or 'linear'")
    start = max_lr / div_factor
    values = [start, max_lr, start / final_div_factor]
    ends = [pct_start * total_steps - 1, total_steps - 1]
    if three_phase:
        values.insert(2, start)
        ends.insert(1, 2 * pct_start * total_steps - 2)
    make = cosine if anneal_strategy == "cos" else linear
    begins = [0, *ends[:-1]]
    parts = [make(a, b, end - begin) for a, b, begin, end in zip(values[:-1], values[1:], begins, ends, strict=True)]
    return join(parts, ends[:-1])


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """Return a schedule that stays at one value after the other.

    Args:
        values: The values.
        boundaries: The steps at which the second, third, ... value begins.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.piecewise([1.0, 0.5, 0.25], [10, 20])
        >>> [schedule(step).item() for step in (9, 10, 20)]
        [1.0, 0.5, 0.25]

    With values that go down by a factor these are the numbers of `torch.optim.lr_scheduler.MultiStepLR`.
    """
    return join([constant(value) for value in values], boundaries)


def join(schedules: Sequence[Callable[[Tensor], Any]], boundaries: Sequence[float]) -> Schedule:
    """Return one schedule after the other, each of which counts its steps from its own beginning.

    Args:
        schedules: The schedules.
        boundaries: The steps at which the second, third, ... schedule begins.

    Raises:
        InputError: If there is not one boundary between each two schedules, or they do not rise.

    Example:
        >>> from luxtorch import optim
        >>> schedule = optim.join([optim.linear(0.0, 1.0, 5), optim.exponential(1.0, 0.5)], [5])
        >>> [schedule(step).item() for step in (0, 5, 6, 7)]
        [0.0, 1.0, 0.5, 0.25]

    The numbers are those of `torch.optim.lr_scheduler.SequentialLR`.
    """
    if len(schedules) != len(boundaries) + 1:
        raise InputError(
            "The number of boundaries does not fit that of the schedules.",
            expected=f"{max(len(schedules) - 1, 0)} boundaries between {len(schedules)} schedules or values",
            got=str(len(boundaries)),
        )
    if any(a >= b for a, b in zip([0, *boundaries], boundaries, strict=False)):
        raise InputError("The boundaries of a schedule do not rise.", expected="0 < first < ...", got=repr(boundaries))
    return Join(tuple(schedules), tuple(boundaries))


def _check(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise out_of_range(name, value, "a finite number")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise out_of_range(name, value, "above 0")


@dataclass(frozen=True)
class Polynomial(Schedule):
    start: float
    end: float
    steps: float
    power: float

    def at(self, step: Value) -> Value:
        return self.end + (self.start - self.end) * (1 - _part(step, self.steps)) ** self.power


@dataclass(frozen=True)
class Exponential(Schedule):
    start: float
    gamma: float
    steps: float
    staircase: bool

    def at(self, step: Value) -> Value:
        times = step // self.steps if self.staircase else step / self.steps
        # torch.compile does not trace the power of a number to a tensor.
        gamma = torch.full_like(times, self.gamma) if isinstance(times, Tensor) else self.gamma
        return self.start * gamma**times


@dataclass(frozen=True)
class Cosine(Schedule):
    start: float
    end: float
    steps: float

    def at(self, step: Value) -> Value:
        angle = math.pi * _part(step, self.steps)
        wave = torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)
        return self.end + (self.start - self.end) * (1 + wave) / 2


@dataclass(frozen=True)
class Join(Schedule):
    schedules: tuple[Callable[[Tensor], Any], ...]
    boundaries: tuple[float, ...]

    def at(self, step: Value) -> Value:
        first, *others = self.schedules
        value = evaluate(first, step)
        for schedule, boundary in zip(others, self.boundaries, strict=True):
            if isinstance(step, Tensor):
                later = evaluate(schedule, (step - boundary).clamp(min=0))
                value = torch.where(step >= boundary, later, value)
            elif step >= boundary:
                value = evaluate(schedule, step - boundary)
        return value


def _part(step: Value, steps: float) -> Value:
    """Return what part of the steps is done, which does not grow beyond all of them."""
    part = step / steps
    return part.clamp(max=1) if isinstance(part, Tensor) else min(part, 1.0)


torch.serialization.add_safe_globals([Scaled, Combined, Polynomial, Exponential, Cosine, Join])
