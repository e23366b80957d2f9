"""An update of proximal policy optimization, all of it under jit; see `torch_rows/ppo.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..problems import Data, Problem
from . import Build, Step
from .loops import dense
from .training import optimizer

LIMIT, DISCOUNT, TRACE, CLIP, ENTROPY = 30, 0.97, 0.95, 0.2, 0.01


def judge(ps: Any, position: Array, goal: Array) -> tuple[Array, Array]:
    """Return the logarithms of the moves' probabilities, and the expected rewards."""
    x = jnp.tanh(ps["layer_1.layer_1.weight"][position] + ps["layer_1.layer_2.weight"][goal])
    x = jnp.tanh(dense(ps, "layer_3", x))
    return jax.nn.log_softmax(dense(ps, "layer_4.layer_1", x)), dense(ps, "layer_4.layer_2", x)[:, 0]


def advance(moves: Array, world: Array, action: Array, restart: Array) -> tuple[Array, Array, Array]:
    """Return one world (position, goal, time) after a move, the reward, and whether an episode has ended."""
    position, goal, time = world
    position = moves[4 * position + action]
    found = position == goal
    done = found | (time == LIMIT - 1)
    new = jnp.where(done, jnp.append(restart, 0), jnp.stack([position, goal, time + 1]))
    return new, found.astype(jnp.float32), done


def chosen_logs(logs: Array, action: Array) -> Array:
    """Return the logarithms of the probabilities of the moves that were made."""
    return jnp.take_along_axis(logs, action[:, None], -1)[:, 0]


def play(ps: Any, worlds: Array, given: Any) -> tuple[Array, Any]:
    """Return the worlds after some steps, and what happened, (steps, worlds)."""

    def act(worlds: Array, drawn: tuple[Array, Array]) -> tuple[Array, Any]:
        noise, restarts = drawn
        logs, value = judge(ps, worlds[:, 0], worlds[:, 1])
        action = (logs + noise).argmax(-1)
        new, reward, done = jax.vmap(advance, (None, 0, 0, 0))(given["moves"], worlds, action, restarts)
        seen = {"position": worlds[:, 0], "goal": worlds[:, 1], "action": action, "log": chosen_logs(logs, action)}
        return new, {**seen, "value": value, "reward": reward, "done": done}

    return jax.lax.scan(act, worlds, (given["noise"], given["restarts"]))


def look_back(carry: tuple[Array, Array], now: Any) -> tuple[tuple[Array, Array], Array]:
    """Return the advantage of a step from that of the next one: generalized advantage estimation."""
    advantage, after = carry
    goes_on = DISCOUNT * (~now["done"]).astype(jnp.float32)
    advantage = now["reward"] + goes_on * after - now["value"] + goes_on * TRACE * advantage
    return (advantage, now["value"]), advantage


def objective(ps: Any, batch: Any) -> Array:
    """Return the clipped objective of Schulman et al. (2017), with the errors of the values and an entropy."""
    logs, value = judge(ps, batch["position"], batch["goal"])
    ratio = jnp.exp(chosen_logs(logs, batch["action"]) - batch["log"])
    gain = batch["advantage"]
    gain = (gain - gain.mean()) / (gain.std() + 1e-6)
    policy = jnp.minimum(ratio * gain, ratio.clip(1 - CLIP, 1 + CLIP) * gain).mean()
    entropy = -(jnp.exp(logs) * logs).sum(-1).mean()
    return jnp.square(value - batch["advantage"] - batch["value"]).mean() / 2 - policy - ENTROPY * entropy


def scanned(donate: bool) -> Build:
    """Write all loops by lax.scan."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        rule, ps = optimizer(problem), jax.tree.map(jnp.array, data.ps)
        given = jax.tree.map(jnp.array, dict(data.others))

        def update(opt_state: Any, ps: Any, worlds: Array, given: Any) -> Any:
            worlds, happened = play(ps, worlds, given)
            last = judge(ps, worlds[:, 0], worlds[:, 1])[1]
            _, advantage = jax.lax.scan(look_back, (jnp.zeros_like(last), last), happened, reverse=True)
            flat = {name: value.reshape(-1) for name, value in (happened | {"advantage": advantage}).items()}

            def learn(carry: Any, chosen: Array) -> Any:
                opt_state, ps = carry
                batch = {name: value[chosen] for name, value in flat.items()}
                loss, grads = jax.value_and_grad(objective)(ps, batch)
                updates, opt_state = rule.update(grads, opt_state, ps)
                return (opt_state, optax.apply_updates(ps, updates)), loss

            (opt_state, ps), losses = jax.lax.scan(learn, (opt_state, ps), given["orders"])
            return opt_state, ps, worlds, losses.mean()

        call = jax.jit(update, donate_argnums=(0, 1) if donate else ())
        opt_state = rule.init(ps)
        worlds = jnp.append(given["places"], 0 * given["places"][:, :1], 1)

        def step() -> Array:
            nonlocal opt_state, ps, worlds
            opt_state, ps, worlds, loss = call(opt_state, ps, worlds, given)
            return loss

        return step

    return build


CANDIDATES: dict[str, Build] = {
    "jax.lax.scan + optax, jax.jit": scanned(donate=False),
    "jax.lax.scan + optax, jax.jit, donated": scanned(donate=True),
}
