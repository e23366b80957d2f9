"""L-BFGS to a minimum: in a loop of Python or a `while_loop`, by a line search for the strong Wolfe conditions.

The line search is written once, as what follows from one more point. A condition is a bool, and Python chooses; or it
is a tensor, inside of vmap and of compiled loops, and both are computed and one is selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from luxtorch._transforms import vmap_levels
from luxtorch.core import InputError, out_of_range, tree_map
from luxtorch.core._tree import register_names
from luxtorch.loops import while_loop

from .._rule_state import ALL, RuleState, Slots
from ._lbfgs import LBFGS, can_read, direction, remember
from ._objective import FlatObjective

T = TypeVar("T")
Number: TypeAlias = Any
"""A number of Python, or a float64 tensor without dimensions; a condition is a bool, or a tensor of one."""

# How much of the descent that the slope promises is enough, and how much of the slope may be left.
_DECREASE, _CURVATURE = 1e-4, 0.9


class Point(NamedTuple):
    """Hold what is known of a point along the direction.

    Attributes:
        t: How far along it is.
        loss: The loss there; infinite where it, or its slope, is not a number.
        slope: The derivative of the loss by `t`.
        grad: The gradient.
    """

    t: Number
    loss: Number
    slope: Number
    grad: Tensor


class LineSearch(NamedTuple):
    """Hold how far a search has come.

    First the step grows until an interval is known to hold a point that satisfies the conditions, then the interval
    shrinks. Each trial is the minimum of the cubic through two points. A point that is not finite is one too far.

    Attributes:
        start: The point at zero, whose slope is negative.
        ends: While the step grows, the last two points; then those of the interval.
        low: Which of the two is the lower one, as a condition: whether it is the second.
        t: Where to look next.
        used: How many points were looked at.
        grows: Whether the step grows still.
        stuck: Whether the last trial was near an end of the interval.
        over: Whether the search is over; `point` is what it has found.

    The numbers are those of torch.optim.LBFGS. Nocedal and Wright, "Numerical optimization", 2006, algorithms 3.5, 3.6.
    """

    start: Point
    ends: tuple[Point, Point]
    low: Number
    t: Number
    used: Number
    grows: Number
    stuck: Number
    over: Number

    @property
    def point(self) -> Point:
        """The lower end."""
        return pick(self.low, self.ends[1], self.ends[0])

    def after(self, point: Point, *, speed: Number, least: float, limit: Number) -> LineSearch:
        """Return the search after one more point, the one at `t`.

        Args:
            point: The point.
            speed: How far the parameters move per `t`.
            least: How far they have to move over an interval for the search to go on in it.
            limit: After how many points but one to stop. Then the lowest of those that matter is found: the start, if
                no other is lower.
        """
        start = self.start
        too_high = point.loss > start.loss + _DECREASE * point.t * start.slope
        level = abs(point.slope) <= -_CURVATURE * start.slope
        search = self._replace(used=self.used + 1)
        last = search.used > limit
        search = choose(
            self.grows,
            lambda: search._grown(point, too_high, level, last),
            lambda: search._shrunk(point, too_high, level, last),
        )

        def going_on() -> LineSearch:
            before, point = search.ends
            return choose(
                search.grows,
                lambda: search._replace(
                    t=_lowest_of_cubic(before, point, point.t + 0.01 * (point.t - before.t), 10 * point.t)
                ),
                lambda: search._inside(speed, least),
            )

        return choose(search.over, lambda: search, going_on)

    def _grown(self, point: Point, too_high: Number, level: Number, last: Number) -> LineSearch:
        _, before = self.ends
        enclosed = too_high | ((self.used > 2) & (point.loss >= before.loss))
        found = no(enclosed) & level & no(last)
        ends = pick(last, self.start, before), point
        grows = no(enclosed | (point.slope >= 0))
        return self._replace(ends=ends, low=found | _falls(ends), grows=grows, over=found | last)

    def _shrunk(self, point: Point, too_high: Number, level: Number, last: Number) -> LineSearch:
        first, second = self.ends
        lower, other = pick(self.low, (second, first), (first, second))
        worse = too_high | (point.loss >= lower.loss)
        crossed = point.slope * (other.t - lower.t) >= 0
        lower, other = pick(worse, (lower, point), (point, pick(crossed, lower, other)))
        ends = pick(self.low, (other, lower), (lower, other))
        low = pick(worse, _falls(ends), self.low)
        return self._replace(ends=ends, low=low, over=last | (no(worse) & level))

    def _inside(self, speed: Number, least: float) -> LineSearch:
        """Choose where to look within the interval, or end where it is narrow."""
        first, second = self.ends
        left, right = pick(first.t <= second.t, (first.t, second.t), (second.t, first.t))
        t = _lowest_of_cubic(first, second, left, right)
        # At an end for the second time, or on it, a tenth of the interval is cut off instead.
        tenth = 0.1 * (right - left)
        near = (right - t < tenth) | (t - left < tenth)
        cut = near & (self.stuck | (t >= right) | (t <= left))
        t = pick(cut, pick(abs(t - right) < abs(t - left), right - tenth, left + tenth), t)
        return self._replace(t=t, stuck=near & no(cut), over=(right - left) * speed <= least)


def begin(start: Point, t: Number, *, like: Any = float) -> LineSearch:
    """Return a search that has not looked at any point but the start.

    Args:
        start: The point at zero.
        t: Where to look first.
        like: What makes a number or condition of this search of one of Python.
    """
    yes, none = (True, 0) if like is float else (like(True), like(0))
    return LineSearch(start, (start, start), no(yes), t, none, yes, no(yes), no(yes))


def strong_wolfe(
    along: Callable[[float], Point], start: Point, t: float, *, speed: float, least: float, limit: int
) -> tuple[Point, int]:
    """Return a point that satisfies the strong Wolfe conditions, and how many points were looked at, by numbers.

    Args:
        along: Takes `t` to its point.
        start: The point at zero, whose slope is negative.
        t: The first to try.
        speed: How far the parameters move per `t`.
        least: As for `LineSearch.after`.
        limit: As there.
    """
    search = begin(start, t)
    while not search.over:
        search = search.after(along(search.t), speed=speed, least=least, limit=limit)
    return search.point, search.used


def _lowest_of_cubic(p: Point, q: Point, left: Number, right: Number) -> Number:
    """Return where the cubic through two points is lowest, within bounds; their middle where there is no such place."""
    a, b = pick(p.t <= q.t, (p[:3], q[:3]), (q[:3], p[:3]))
    (a_t, a_loss, a_slope), (b_t, b_loss, b_slope) = a, b
    d1 = a_slope + b_slope - _ratio(3 * (a_loss - b_loss), a_t - b_t)
    d2 = _root(d1 * d1 - a_slope * b_slope)
    lowest = b_t - (b_t - a_t) * _ratio(b_slope + d2 - d1, b_slope - a_slope + 2 * d2)
    within = pick(lowest < left, left, pick(lowest > right, right, lowest))
    return pick(lowest == lowest, within, (left + right) / 2)  # NaN is not itself


def _falls(ends: tuple[Point, Point]) -> Number:
    return ends[1].loss < ends[0].loss


def pick(condition: Number, one: T, other: T) -> T:
    """Return one of two trees, by a condition."""
    if isinstance(condition, bool):
        return one if condition else other
    return tree_map(lambda x, y: x if x is y else torch.where(condition, x, y), one, other)  # type: ignore[no-any-return]


def choose(condition: Number, one: Callable[[], T], other: Callable[[], T]) -> T:
    """Return what one of two functions returns, by a condition; only the one is called where it is a bool."""
    if isinstance(condition, bool):
        return one() if condition else other()
    return pick(condition, one(), other())


def no(condition: Number) -> Number:
    """Return the opposite of a condition."""
    return not condition if isinstance(condition, bool) else ~condition


def _ratio(x: Number, y: Number) -> Number:
    """Return x / y, NaN where y is zero."""
    if isinstance(y, Tensor):
        return x / torch.where(y == 0, math.nan, y)
    return x / y if y else math.nan


def _root(x: Number) -> Number:
    """Return the square root, NaN where there is none."""
    if isinstance(x, Tensor):
        return x.sqrt()
    return math.sqrt(x) if x >= 0 else math.nan


_REASONS = ("", "gradient", "step", "loss", "slope", "line search", "iterations", "evaluations", "not finite")


class MinimizeResult(NamedTuple):
    """Say how `minimize` has ended.

    Inside of transforms and of `lt.jit` all that is said is said by tensors, of many models by vectors.

    Attributes:
        loss: The loss at the parameters that were found.
        grad_norm: The largest absolute element of the gradient there.
        iterations: How many directions were searched along.
        evaluations: How often the function was called.
        reason: Why it ended. "gradient": `grad_norm` is small enough. "step", "loss", "slope": the parameters, or the
            loss, hardly moved, or would hardly move. "line search": nothing lower was found along the direction.
            "iterations", "evaluations": there may be no more. "not finite": the loss or its gradient was not, where the
            search began, and nothing was done. Of a tensor, `why` tells the words.
    """

    loss: float | Tensor
    grad_norm: float | Tensor
    iterations: int | Tensor
    evaluations: int | Tensor
    reason: str | Tensor

    @property
    def converged(self) -> bool | Tensor:
        """Whether a tolerance was reached."""
        if isinstance(self.reason, Tensor):
            return (self.reason >= 1) & (self.reason <= 4)
        return self.reason in _REASONS[1:5]

    def why(self) -> Any:
        """Return the reason as a word, of many models as a list of words.

        Raises:
            InputError: Inside of vmap, where there are no numbers.
        """
        if not isinstance(self.reason, Tensor):
            return self.reason
        if vmap_levels(self.reason):
            raise InputError(
                "Inside of vmap a reason has no words.",
                fix="Return the result, and ask it outside; inside, converged is a tensor.",
            )

        def words(codes: Any) -> Any:
            return list(map(words, codes)) if isinstance(codes, list) else _REASONS[codes]

        return words(self.reason.tolist())

    def in_tensors(self, like: Tensor) -> MinimizeResult:
        """Return the same in tensors."""
        if isinstance(self.reason, Tensor):
            return self
        values: tuple[Any, ...] = (*self[:4], _REASONS.index(self.reason))
        numbers = (like.new_full((), value) for value in values[:2])
        return MinimizeResult(*numbers, *(torch.full((), value, device=like.device) for value in values[2:]))


register_names(MinimizeResult)


class Limits(NamedTuple):
    """Hold when to end: see `minimize`."""

    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float

    def check(self) -> None:
        """Raise if one is too small."""
        for name, value in self._asdict().items():
            least = 1 if name.startswith("max") else 0
            if not value >= least:
                raise out_of_range(name, value, f"at least {least}")

    def reasons(
        self, grad_norm: Number, moved: Number, change: Number, iterations: Number, evaluations: Number
    ) -> list[tuple[Number, str]]:
        """Return reasons to end after an iteration, and whether they hold; the first of those that do is the reason."""
        return [
            (grad_norm <= self.tolerance_grad, "gradient"),
            ((moved == 0.0) & (evaluations < self.max_eval), "line search"),
            (moved == 0.0, "evaluations"),
            (moved <= self.tolerance_change, "step"),
            (change < self.tolerance_change, "loss"),
            (iterations == self.max_iter, "iterations"),
            (evaluations >= self.max_eval, "evaluations"),
        ]


def by_numbers(
    evaluate: FlatObjective, rule: LBFGS, state: RuleState, limits: Limits
) -> tuple[Tensor, RuleState, MinimizeResult]:
    """Return the flat parameters that were found, the new state, and how it ended."""
    x, memory = evaluate.start, state.leaves[ALL]
    as_numbers = can_read(x, memory)
    loss, g = evaluate(x)
    if not (math.isfinite(loss) and math.isfinite(_size(g))):
        raise InputError(
            "The loss or its gradient is not finite where the search begins.",
            expected="finite numbers",
            got=f"a loss of {loss}, and {_size(g)} in the gradient",
            fix="Begin elsewhere.",
        )
    iterations, evaluations = 0, 1
    reason = "gradient" if _size(g) <= limits.tolerance_grad else ""
    while not reason:
        known = evaluate.without_frozen(g, math.nan)
        memory = remember(memory, known, as_numbers)
        d = evaluate.without_frozen(direction(memory, g, as_numbers))
        start = Point(0.0, loss, g.dot(d).item(), g)
        if not start.slope <= -limits.tolerance_change:
            memory = {**memory, "grad": known, "step": torch.zeros_like(g)}
            reason = "slope"
            break

        def along(t: float, x: Tensor = x, d: Tensor = d) -> Point:
            loss, g = evaluate(torch.add(x, d, alpha=t))
            slope = g.dot(d).item()
            finite = math.isfinite(loss) and math.isfinite(slope)
            return Point(t, loss if finite else math.inf, slope, g)

        point, calls = strong_wolfe(
            along,
            start,
            rule.length(g, state, as_numbers).item(),
            speed=_size(d),
            least=limits.tolerance_change,
            limit=limits.max_eval - evaluations,
        )
        iterations, evaluations = iterations + 1, evaluations + calls
        x = torch.add(x, d, alpha=point.t)
        memory = {**memory, "grad": known, "step": d * point.t}
        state = state.after(state.leaves)
        change, loss, g = abs(point.loss - loss), point.loss, point.grad
        moved = _size(memory["step"])
        holding = limits.reasons(_size(g), moved, change, iterations, evaluations)
        reason = next((name for holds, name in holding if holds), "")
    state = state._replace(leaves={**state.leaves, ALL: memory})
    return x, state, MinimizeResult(loss, _size(g), iterations, evaluations, reason)


class _Place(NamedTuple):
    """Hold where a search by tensors is.

    Attributes:
        x: The point from which the line search goes; its loss and gradient are those of `search.start`.
        d: The direction.
        memory: What the rule remembers.
        steps: How many steps the rule has taken.
        search: The line search.
        iterations: How many are done.
        evaluations: How many there were up to `x`.
        reason: Why it has ended, a place in the list of all reasons; zero while it goes on.
    """

    x: Tensor
    d: Tensor
    memory: Slots
    steps: Any
    search: LineSearch
    iterations: Tensor
    evaluations: Tensor
    reason: Tensor


def by_tensors(
    evaluate: FlatObjective, rule: LBFGS, state: RuleState, limits: Limits
) -> tuple[Tensor, RuleState, MinimizeResult]:
    """Return what `by_numbers` returns, where no tensor can be read: of a start that is not finite, the start.

    Each step of the loop is one evaluation, and all that follows from it. So of many models in a batch, none waits for
    the line search of another.
    """
    device = evaluate.start.device

    def number(x: Tensor) -> Tensor:
        """Return a number as Python has it."""
        return x.to(device, torch.float64)

    def size(x: Tensor) -> Tensor:
        return number(_largest(x))

    def constant(x: Any) -> Tensor:
        return torch.full((), x, dtype=torch.float64 if isinstance(x, float) else None, device=device)

    def because(holding: list[tuple[Tensor, str]]) -> Tensor:
        reason = constant(0)
        for holds, name in reversed(holding):
            reason = torch.where(holds, _REASONS.index(name), reason)
        return reason

    def turned(here: _Place) -> _Place:
        """Begin an iteration."""
        _, loss, _, g = here.search.start
        known = evaluate.without_frozen(g, math.nan)
        memory = remember(here.memory, known, False)
        d = evaluate.without_frozen(direction(memory, g, False))
        start = Point(constant(0.0), loss, number(g.dot(d)), g)
        reason = because([(~(start.slope <= -limits.tolerance_change), "slope")])
        t = number(rule.length(g, state._replace(steps=here.steps), False))
        memory = {**memory, "grad": known, "step": torch.zeros_like(g)}
        return here._replace(d=d, memory=memory, search=begin(start, t, like=constant), reason=reason)

    def looked(here: _Place) -> _Place:
        """Evaluate once more, and end an iteration and begin another if that ends the line search."""
        x, d, t = here.x, here.d, here.search.t
        loss, g = evaluate.in_tensors(x + t.to(d.dtype) * d)
        loss, slope = number(loss), number(g.dot(d))
        point = Point(t, torch.where(loss.isfinite() & slope.isfinite(), loss, math.inf), slope, g)
        search = here.search.after(
            point,
            speed=size(d),
            least=limits.tolerance_change,
            limit=limits.max_eval - here.evaluations,
        )
        found, step = search.point, search.point.t.to(d.dtype) * d
        iterations, evaluations = here.iterations + 1, here.evaluations + search.used
        change = abs(found.loss - search.start.loss)
        holding = limits.reasons(size(found.grad), size(step), change, iterations, evaluations)
        there = _Place(
            x + step,
            d,
            {**here.memory, "step": step},
            state._replace(steps=here.steps).after({}).steps,
            search._replace(start=found),
            iterations,
            evaluations,
            because(holding),
        )
        there = pick(there.reason == 0, turned(there), there)
        return pick(search.over, there, here._replace(search=search))

    x, memory = evaluate.start, state.leaves[ALL]
    value, g = evaluate.in_tensors(x)
    loss, grad_norm = number(value), size(g)
    holding = [
        (~(loss.isfinite() & grad_norm.isfinite()), "not finite"),
        (grad_norm <= limits.tolerance_grad, "gradient"),
    ]
    search = begin(Point(constant(0.0), loss, constant(0.0), g), constant(0.0), like=constant)
    here = _Place(x, torch.zeros_like(g), memory, state.steps, search, constant(0), constant(1), because(holding))
    here = while_loop(lambda here: here.reason == 0, looked, pick(here.reason == 0, turned(here), here))
    _, loss, _, g = here.search.start
    result = MinimizeResult(loss.to(value.dtype), _largest(g), here.iterations, here.evaluations, here.reason)
    return here.x, state._replace(leaves={**state.leaves, ALL: here.memory}, steps=here.steps), result


def _size(x: Tensor) -> float:
    return _largest(x).item()


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())
