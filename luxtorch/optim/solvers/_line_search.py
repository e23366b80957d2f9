"""Line search along a direction for a point that satisfies the strong Wolfe conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

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

    t: float
    loss: float
    slope: float
    grad: Tensor


def strong_wolfe(
    along: Callable[[float], Point], start: Point, t: float, *, speed: float, least: float, limit: int
) -> tuple[Point, int]:
    """Return a point that satisfies the strong Wolfe conditions, and how many points were looked at.

    First the step grows until an interval is known to hold such a point, then the interval shrinks. Each trial is the
    minimum of the cubic through two points. A point that is not finite is one that is too far.

    Args:
        along: Takes `t` to its point.
        start: The point at zero, whose slope is negative.
        t: The first to try.
        speed: How far the parameters move per `t`.
        least: How far they have to move over an interval for the search to go on in it.
        limit: After how many more points to stop. Then the lowest of those that matter is returned: the start, if no
            other is lower.

    The numbers are those of torch.optim.LBFGS. Nocedal and Wright, "Numerical optimization", 2006, algorithms 3.5, 3.6.
    """

    def too_high(point: Point) -> bool:
        return point.loss > start.loss + _DECREASE * point.t * start.slope

    def level(point: Point) -> bool:
        return abs(point.slope) <= -_CURVATURE * start.slope

    before, point = start, along(t)
    for count in range(limit):
        if too_high(point) or (count > 1 and point.loss >= before.loss):
            break
        if level(point):
            return point, count + 1
        if point.slope >= 0:
            break
        t = _lowest_of_cubic(before, point, point.t + 0.01 * (point.t - before.t), 10 * point.t)
        before, point = point, along(t)
    else:
        return (start, point)[_lower((start, point))], limit + 1

    ends = [before, point]
    low = _lower(ends)
    stuck = False
    for used in range(count + 1, limit + 1):
        left, right = sorted(end.t for end in ends)
        if (right - left) * speed <= least:
            return ends[low], used
        t = _lowest_of_cubic(ends[0], ends[1], left, right)
        # At an end for the second time, or on it, a tenth of the interval is cut off instead.
        tenth = 0.1 * (right - left)
        near = min(right - t, t - left) < tenth
        if near and (stuck or t >= right or t <= left):
            t = right - tenth if abs(t - right) < abs(t - left) else left + tenth
            near = False
        stuck = near
        point = along(t)
        if too_high(point) or point.loss >= ends[low].loss:
            ends[1 - low] = point
            low = _lower(ends)
            continue
        if level(point):
            return point, used + 1
        if point.slope * (ends[1 - low].t - ends[low].t) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = point
    return ends[low], limit + 1


def _lowest_of_cubic(p: Point, q: Point, left: float, right: float) -> float:
    """Return where the cubic through two points is lowest, within bounds; their middle where there is no such place."""
    a, b = (p, q) if p.t <= q.t else (q, p)
    if a.t < b.t:
        d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
        square = d1 * d1 - a.slope * b.slope
        if square >= 0:
            d2 = math.sqrt(square)
            across = b.slope - a.slope + 2 * d2
            lowest = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / across) if across else math.nan
            if not math.isnan(lowest):
                return min(max(lowest, left), right)
    return (left + right) / 2


def _lower(ends: Sequence[Point]) -> int:
    return int(ends[1].loss < ends[0].loss)
