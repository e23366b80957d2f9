"""What a user writes who wants a functional step that torch.compile takes: torchopt's Adam does not trace there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Moments = tuple[Tensor, ...]


def adam(p: Tensor, g: Tensor, moments: Moments, count: Tensor, lr: float) -> tuple[Tensor, Moments]:
    """Return a parameter and its moments after a step of Adam, with torch's numbers."""
    m = moments[0] + 0.1 * (g - moments[0])
    v = 0.999 * moments[1] + 0.001 * g * g
    return p - lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8), (m, v)


def sgd(p: Tensor, g: Tensor, moments: Moments, count: Tensor, lr: float) -> tuple[Tensor, Moments]:
    """Return a parameter after a step of gradient descent, which has no moments."""
    return p - lr * g, moments


def update(
    rule: Callable[..., tuple[Tensor, Moments]],
    ps: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Moments],
    count: Tensor,
    lr: float,
) -> tuple[dict[str, Tensor], dict[str, Moments]]:
    """Return all parameters and moments after a step of a rule."""
    new = {name: rule(p, grads[name], state[name], count, lr) for name, p in ps.items()}
    return {name: p for name, (p, _) in new.items()}, {name: moments for name, (_, moments) in new.items()}


def views(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the parameters in one vector, by name: the last dimension is taken apart, others are kept."""
    parts = flat.split_with_sizes([math.prod(shape) for shape in shapes.values()], -1)
    return {
        name: part.view(*flat.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
