"""Line search along a direction for a point that satisfies the strong Wolfe conditions, in numbers or in tensors.

It is written once, as what follows from one more point. A condition is a bool, and Python chooses; or it is a tensor,
inside of vmap and of compiled loops, and both are computed and one is selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from luxtorch.core import tree_map

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
