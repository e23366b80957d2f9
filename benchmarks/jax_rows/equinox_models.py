"""The models for equinox: modules of one sample each, batched by vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import nn
from jax import Array

from ..problems import HEADS, RESNET, Data, Problem
from .losses import ACTIVATIONS, LOSSES

KEY = jax.random.key(0)  # what is drawn from it is replaced by the problem's initial values


class LSTM(eqx.Module):
    """Run torch's LSTM, which has two biases where equinox has one, and return the last output."""

    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array

    def __init__(self, inputs: int, hidden: int) -> None:
        self.weight_ih, self.weight_hh = jnp.zeros((4 * hidden, inputs)), jnp.zeros((4 * hidden, hidden))
        self.bias_ih, self.bias_hh = jnp.zeros(4 * hidden), jnp.zeros(4 * hidden)

    def __call__(self, xs: Array, *, key: Any = None) -> Array:
        """Return the output of the last step of a sequence (time, features)."""

        def advance(carry: tuple[Array, Array], projected: Array) -> tuple[tuple[Array, Array], None]:
            h, c = carry
            i, f, g, o = jnp.split(projected + self.weight_hh @ h + self.bias_hh, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zero = jnp.zeros(self.weight_hh.shape[1])
        (h, _), _ = jax.lax.scan(advance, (zero, zero), xs @ self.weight_ih.T + self.bias_ih)
        return h


class Each(eqx.Module):
    """Call a layer on each token."""

    layer: nn.Linear

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """Return what the layer makes of the tokens."""
        return jax.vmap(self.layer)(x)


class Encoder(eqx.Module):
    """Be torch's TransformerEncoderLayer without dropout, for a sequence (tokens, features)."""

    attention: nn.MultiheadAttention
    linear1: nn.Linear
    linear2: nn.Linear
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    act: nn.Lambda

    def __init__(self, width: int, act: nn.Lambda) -> None:
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = nn.MultiheadAttention(HEADS, width, **biases, key=KEY)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width, key=KEY), nn.Linear(4 * width, width, key=KEY)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.act = act

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """Return the sequence after attention and two dense layers."""
        x = jax.vmap(self.norm1)(x + self.attention(x, x, x))
        hidden = self.act(jax.vmap(self.linear1)(x))
        return jax.vmap(self.norm2)(x + jax.vmap(self.linear2)(hidden))


class Block(nn.StatefulLayer):
    """Be a block of a ResNet."""

    inner: nn.Sequential
    around: nn.Sequential

    def __init__(self, before: int, after: int) -> None:
        stride = after // before
        first, second = _conv(before, after, 3, stride), _conv(after, after, 3)
        self.inner = nn.Sequential([first, _norm(after), nn.Lambda(jax.nn.relu), second, _norm(after)])
        self.around = nn.Sequential([_conv(before, after, 1, stride), _norm(after)] if stride > 1 else [])

    def __call__(self, x: Array, state: nn.State, *, key: Any = None) -> tuple[Array, nn.State]:
        """Return the image after two convolutions, with a connection around them, and the state."""
        y, state = self.inner(x, state)
        x, state = self.around(x, state)
        return jax.nn.relu(x + y), state


def model(problem: Problem, data: Data) -> tuple[eqx.Module, nn.State]:
    """Return the model with the problem's initial values, and its state."""
    made, state = eqx.nn.make_with_state(lambda: nn.Sequential(list(_layers(problem, data))))()
    leaves, structure = jax.tree.flatten(eqx.filter(made, eqx.is_inexact_array))
    values = [jnp.array(value).reshape(leaf.shape) for leaf, value in zip(leaves, data.ps.values(), strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, values), made), state


def objective(problem: Problem) -> Callable[..., tuple[Array, Any]]:
    """Return a function of a model, its state and a batch that gives the loss and the new state."""
    loss_of = LOSSES[problem.loss]

    def loss(model: Any, state: Any, x: Array, y: Array) -> tuple[Array, Any]:
        y_hat, state = jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)
        return loss_of(y_hat, y), state

    return loss


def _layers(problem: Problem, data: Data) -> Iterator[Any]:
    act, width = nn.Lambda(ACTIVATIONS[problem.activation]), data.x.shape[1]
    match problem.model:
        case "tiny":
            yield nn.Linear(10, 5, key=KEY)
        case "mlp":
            yield from _dense(act, 784, 512, 512, 10)
        case "member":
            yield from _dense(act, 20, 64, 64, 1)
        case "small":
            yield from _dense(act, 784, 256, 10)
        case "smooth":
            yield from _dense(nn.Lambda(jnp.tanh), 784, 256, 10)
        case "deep":
            for _ in range(50):
                yield from (nn.Linear(32, 32, key=KEY), nn.Lambda(jnp.tanh))
        case "cnn" | "group_cnn":
            norm = _norm if problem.model == "cnn" else partial(nn.GroupNorm, 8)
            for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
                yield from (nn.Conv2d(inputs, outputs, 3, padding=1, key=KEY), norm(outputs), act)
                yield nn.MaxPool2d(2, 2) if inputs < 64 else nn.Lambda(lambda x: x.mean((1, 2)))
            yield nn.Linear(64, 10, key=KEY)
        case "resnet":
            yield from (_conv(3, 64, 3), _norm(64), act, *(Block(*channels) for channels in RESNET))
            yield from (nn.Lambda(lambda x: x.mean((1, 2))), nn.Linear(512, 10, key=KEY))
        case "lstm":
            hidden = data.ps["layer_1.weight_hh"].shape[1]
            yield from (LSTM(32, hidden), nn.Linear(hidden, 10, key=KEY))
        case "transformer":
            width = len(data.ps["layer_1.weight"])
            yield Each(nn.Linear(32, width, key=KEY))
            yield from (Encoder(width, act) for _ in range(problem.steps))
            yield from (nn.Lambda(lambda x: x.mean(0)), nn.Linear(width, 10, key=KEY))
        case "normed_mlp":
            for inputs in (32, *[256] * 5):
                yield from (nn.Linear(inputs, 256, key=KEY), act, _norm(256))
            yield nn.Linear(256, 10, key=KEY)
        case "lenet":
            yield from (nn.Conv2d(1, 6, 5, key=KEY), act, nn.MaxPool2d(2, 2))
            yield from (nn.Conv2d(6, 16, 5, key=KEY), act, nn.MaxPool2d(2, 2))
            yield from (nn.Lambda(jnp.ravel), *_dense(act, 256, 120, 84, 10))
        case "dense":
            yield from (nn.Linear(width, width, key=KEY), act)
        case "conv":
            yield from (nn.Conv2d(width, width, 3, padding=1, key=KEY), act)


def _dense(act: nn.Lambda, *widths: int) -> Iterator[Any]:
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        yield from ([act] if i else [])
        yield nn.Linear(inputs, outputs, key=KEY)


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, padding=size // 2, use_bias=False, key=KEY)


def _norm(size: int) -> nn.BatchNorm:
    return nn.BatchNorm(size, axis_name="batch", mode="batch", momentum=0.9)
