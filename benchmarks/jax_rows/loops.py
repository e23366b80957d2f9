"""Training steps through `lax.scan`, of functions of a dict of parameters; the optimizer is optax's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..problems import ODE_STEPS, Data, Problem
from . import Build, Step
from .losses import LOSSES
from .training import dict_step


def dense(ps: Any, name: str, x: Array) -> Array:
    """Return a layer's output."""
    return x @ ps[f"{name}.weight"].T + ps[f"{name}.bias"]


def gru(ps: Any, x: Array) -> Array:
    """Return the scores from the mean of all hidden states of sequences (time, batch, features)."""

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        reset, update, new = jnp.split(dense(ps, "layer_1.input", x), 3, -1)
        reset_h, update_h, new_h = jnp.split(dense(ps, "layer_1.hidden", h), 3, -1)
        new = jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)
        h = new + jax.nn.sigmoid(update + update_h) * (h - new)
        return h, h

    _, hs = jax.lax.scan(step, jnp.zeros((x.shape[1], 64)), x)
    return dense(ps, "layer_2", hs.mean(0))


def ode(ps: Any, x: Array) -> Array:
    """Return where points are after a unit of time, by rk4."""
    dt = 1 / ODE_STEPS

    def slope(y: Array) -> Array:
        return dense(ps, "layer_3", jnp.tanh(dense(ps, "layer_2", jnp.tanh(dense(ps, "layer_1", y)))))

    def step(y: Array, _: None) -> tuple[Array, None]:
        k1 = slope(y)
        k2 = slope(y + dt / 2 * k1)
        k3 = slope(y + dt / 2 * k2)
        k4 = slope(y + dt * k3)
        return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return jax.lax.scan(step, x, length=ODE_STEPS)[0]


def equal(ps: Any, x: Array) -> Array:
    """Return the output of layers whose parameters are stacked."""

    def step(x: Array, layer: Any) -> tuple[Array, None]:
        return x + jnp.tanh(x @ layer["weight"].T + layer["bias"]), None

    return jax.lax.scan(step, x, ps)[0]


MODELS: dict[str, Callable[..., Array]] = {"gru": gru, "ode": ode, "equal": equal}


def scanned(donate: bool) -> Build:
    """Put the whole step under jit."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        model, loss_of = MODELS[problem.model], LOSSES[problem.loss]
        return dict_step(lambda ps, x, y: loss_of(model(ps, x), y), problem, data, donate)

    return build


CANDIDATES: dict[str, Build] = {
    "jax.lax.scan + optax, jax.jit": scanned(donate=False),
    "jax.lax.scan + optax, jax.jit, donated": scanned(donate=True),
}
