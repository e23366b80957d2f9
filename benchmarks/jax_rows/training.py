"""Training steps under jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..problems import Data, Problem
from . import Build, Step, equinox_models, flax_models

Loss = Callable[..., tuple[Array, Any]]


def optimizer(problem: Problem) -> optax.GradientTransformation:
    """Return the problem's optimizer."""
    return optax.adam(problem.lr) if problem.optimizer == "Adam" else optax.sgd(problem.lr)


def whole_step(loss: Loss, rule: optax.GradientTransformation) -> Callable[..., Any]:
    """Return a function of parameters, state, optimizer state and a batch that gives the loss and all of them anew."""

    def step(ps: Any, state: Any, opt_state: Any, x: Array, y: Array) -> Any:
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(ps, state, x, y)
        updates, opt_state = rule.update(grads, opt_state, ps)
        return value, optax.apply_updates(ps, updates), state, opt_state

    return step


def stepping(step: Callable[..., Any], ps: Any, state: Any, opt_state: Any, x: Array, y: Array) -> Step:
    """Return a function that goes from step to step."""

    def call() -> Array:
        nonlocal ps, state, opt_state
        value, ps, state, opt_state = step(ps, state, opt_state, x, y)
        return value

    return call


def dict_step(loss: Callable[[Any, Array, Array], Array], problem: Problem, data: Data, donate: bool) -> Step:
    """Put a step of a model without state under jit, its parameters in a dict."""
    rule, ps = optimizer(problem), jax.tree.map(jnp.array, data.ps)
    step = jitted(whole_step(lambda ps, state, x, y: (loss(ps, x, y), state), rule), donate)
    return stepping(step, ps, (), rule.init(ps), jnp.array(data.x), jnp.array(data.y))


def jitted(step: Callable[..., Any], donate: bool) -> Callable[..., Any]:
    """Return a step under jit."""
    return jax.jit(step, donate_argnums=(0, 1, 2) if donate else ())


def equinox_filter_jit(problem: Problem, data: Data, device: str) -> Step:
    """Write the step as equinox's documentation does."""
    model, state = equinox_models.model(problem, data)
    loss, rule = equinox_models.objective(problem), optimizer(problem)

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any, x: Array, y: Array) -> Any:
        (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, state, x, y)
        updates, opt_state = rule.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return value, eqx.apply_updates(model, updates), state, opt_state

    opt_state = rule.init(eqx.filter(model, eqx.is_inexact_array))
    return stepping(step, model, state, opt_state, jnp.array(data.x), jnp.array(data.y))


def equinox_jit(donate: bool) -> Build:
    """Keep the arrays of the model apart, and put the step under plain jit."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        model, state = equinox_models.model(problem, data)
        ps, static = eqx.partition(model, eqx.is_inexact_array)
        loss, rule = equinox_models.objective(problem), optimizer(problem)
        step = whole_step(lambda ps, *rest: loss(eqx.combine(ps, static), *rest), rule)
        return stepping(jitted(step, donate), ps, state, rule.init(ps), jnp.array(data.x), jnp.array(data.y))

    return build


def flax_jit(donate: bool) -> Build:
    """Put a step of flax's linen under jit."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        made, ps, state = flax_models.model(problem, data)
        rule = optimizer(problem)
        step = whole_step(flax_models.objective(problem, made), rule)
        x, y = flax_models.images_last(data.x), jnp.array(data.y)
        return stepping(jitted(step, donate), ps, state, rule.init(ps), x, y)

    return build


CANDIDATES: dict[str, Build] = {
    "equinox, filter_jit": equinox_filter_jit,
    "equinox, jax.jit": equinox_jit(donate=False),
    "equinox, jax.jit, donated": equinox_jit(donate=True),
    "flax, jax.jit": flax_jit(donate=False),
    "flax, jax.jit, donated": flax_jit(donate=True),
}
