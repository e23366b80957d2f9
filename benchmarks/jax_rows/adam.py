"""The update of Adam alone, with gradients that equal the initial parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..problems import Data, Problem
from . import Build, Step


def updates(flat: bool, donate: bool) -> Build:
    """Update by optax, parameters in a dict or in one vector."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps: Any = {name: jnp.array(value) for name, value in data.ps.items()}
        ps = jnp.concatenate(list(ps.values())) if flat else ps
        grads = jax.tree.map(jnp.copy, ps)
        rule = optax.adam(problem.lr)
        opt_state = rule.init(ps)

        def update(ps: Any, opt_state: Any, grads: Any) -> Any:
            changes, opt_state = rule.update(grads, opt_state, ps)
            return optax.apply_updates(ps, changes), opt_state

        call = jax.jit(update, donate_argnums=(0, 1) if donate else ())

        def step() -> Any:
            nonlocal ps, opt_state
            ps, opt_state = call(ps, opt_state, grads)
            return ps

        return step

    return build


CANDIDATES: dict[str, Build] = {
    "optax.adam, jax.jit": updates(flat=False, donate=False),
    "optax.adam, jax.jit, donated": updates(flat=False, donate=True),
    "optax.adam, jax.jit, flat": updates(flat=True, donate=False),
    "optax.adam, jax.jit, flat, donated": updates(flat=True, donate=True),
}
