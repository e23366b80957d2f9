"""Losses and activations, with torch's numbers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array


def _cross_entropy(y_hat: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(y_hat, y).mean()


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "cross entropy": _cross_entropy,
    "mean square": lambda y_hat, y: jnp.square(y_hat - y).mean(),
    "sum of squares": lambda y_hat, y: jnp.square(y_hat - y).sum(),
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
