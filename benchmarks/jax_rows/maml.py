"""A step of model-agnostic meta-learning: the loss is that of parameters after gradient descent on each task."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from ..problems import INNER_LR, INNER_STEPS, Data, Problem
from . import Build, Step
from .loops import dense
from .losses import LOSSES
from .training import dict_step


def by_hand(donate: bool) -> Build:
    """Write it by jax.grad and jax.vmap, of a dict of parameters, with optax."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        loss_of = LOSSES[problem.loss]

        def loss(ps: Any, x: Array, y: Array) -> Array:
            for name in ("layer_1", "layer_2"):
                x = jax.nn.relu(dense(ps, name, x))
            return loss_of(dense(ps, "layer_3", x), y)

        def of_task(ps: Any, x: Array, y: Array) -> Array:
            for _ in range(INNER_STEPS):
                ps = jax.tree.map(lambda p, g: p - INNER_LR * g, ps, jax.grad(loss)(ps, x[0], y[0]))
            return loss(ps, x[1], y[1])

        return dict_step(lambda ps, x, y: jax.vmap(of_task, (None, 0, 0))(ps, x, y).mean(), problem, data, donate)

    return build


CANDIDATES: dict[str, Build] = {
    "jax.grad + optax, jax.jit": by_hand(donate=False),
    "jax.grad + optax, jax.jit, donated": by_hand(donate=True),
}
