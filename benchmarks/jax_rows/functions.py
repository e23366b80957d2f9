"""What several problems differentiate: a model's loss or output as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from ..problems import Data, Problem
from . import Build, Step, equinox_models, flax_models

Work = Callable[[Callable[..., Any], Any, Array, Array], Any]
"""What is computed of a function `f(ps, x, y)` at `ps` and a batch."""


def of_losses(work: Work, jit: Callable[..., Any]) -> dict[str, Build]:
    """Return candidates that compute something of a model's loss."""

    def equinox(problem: Problem, data: Data, device: str) -> Step:
        model, state = equinox_models.model(problem, data)
        ps, static = eqx.partition(model, eqx.is_inexact_array)
        loss = equinox_models.objective(problem)
        call = jit(lambda ps, x, y: work(lambda ps, x, y: loss(eqx.combine(ps, static), state, x, y)[0], ps, x, y))
        x, y = jnp.array(data.x), jnp.array(data.y)
        return lambda: call(ps, x, y)

    def flax(problem: Problem, data: Data, device: str) -> Step:
        made, ps, state = flax_models.model(problem, data)
        loss = flax_models.objective(problem, made)
        call = jit(lambda ps, x, y: work(lambda ps, x, y: loss(ps, state, x, y)[0], ps, x, y))
        x, y = flax_models.images_last(data.x), jnp.array(data.y)
        return lambda: call(ps, x, y)

    return {"equinox, jax.jit": equinox, "flax, jax.jit": flax}


def of_outputs(work: Callable[[Callable[..., Any], Any, Array], Any], jit: Callable[..., Any]) -> dict[str, Build]:
    """Return candidates that compute something of a model's output."""

    def equinox(problem: Problem, data: Data, device: str) -> Step:
        model, state = equinox_models.model(problem, data)
        ps, static = eqx.partition(model, eqx.is_inexact_array)

        def output(ps: Any, x: Array) -> Array:
            return jax.vmap(lambda one: eqx.combine(ps, static)(one, state)[0])(x)

        call, x = jit(lambda ps, x: work(output, ps, x)), jnp.array(data.x)
        return lambda: call(ps, x)

    def flax(problem: Problem, data: Data, device: str) -> Step:
        made, ps, _ = flax_models.model(problem, data)
        x = flax_models.images_last(data.x)
        call = jit(lambda ps, x: work(lambda ps, x: made.apply({"params": ps}, x), ps, x))
        return lambda: call(ps, x)

    return {"equinox, jax.jit": equinox, "flax, jax.jit": flax}
