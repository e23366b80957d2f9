"""A training step of 32 models at once, by vmap over everything."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from ..problems import Data, Problem
from . import Build, Step, equinox_models, flax_models
from .training import Loss, jitted, optimizer, stepping, whole_step


def summed(loss: Loss) -> Loss:
    """Return a loss of stacked parameters that is the sum of the members' losses."""

    def total(ps: object, state: object, x: Array, y: Array) -> tuple[Array, object]:
        return jax.vmap(lambda ps: loss(ps, state, x, y)[0])(ps).sum(), state

    return total


def equinox(donate: bool) -> Build:
    """Train stacked modules of equinox."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        first = Data({name: p[0] for name, p in data.ps.items()}, data.x, data.y)
        model, state = equinox_models.model(problem, first)
        part, static = eqx.partition(model, eqx.is_inexact_array)
        structure = jax.tree.structure(part)
        ps = jax.tree.unflatten(structure, [jnp.array(p) for p in data.ps.values()])
        loss, rule = equinox_models.objective(problem), optimizer(problem)
        step = whole_step(summed(lambda ps, *rest: loss(eqx.combine(ps, static), *rest)), rule)
        return stepping(jitted(step, donate), ps, state, rule.init(ps), jnp.array(data.x), jnp.array(data.y))

    return build


def flax(donate: bool) -> Build:
    """Train stacked parameters of flax."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        made, ps, state = flax_models.model(problem, data)
        rule = optimizer(problem)
        step = whole_step(summed(flax_models.objective(problem, made)), rule)
        return stepping(jitted(step, donate), ps, state, rule.init(ps), jnp.array(data.x), jnp.array(data.y))

    return build


CANDIDATES: dict[str, Build] = {
    "equinox, jax.jit": equinox(donate=False),
    "equinox, jax.jit, donated": equinox(donate=True),
    "flax, jax.jit": flax(donate=False),
    "flax, jax.jit, donated": flax(donate=True),
}
