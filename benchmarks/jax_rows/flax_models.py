"""The models for flax (linen), channels last as flax has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..problems import HEADS, RESNET, Data, Problem
from .losses import ACTIVATIONS, LOSSES


class LSTM(nn.Module):
    """Run torch's LSTM, which has two biases where flax has one, and return the last output."""

    hidden: int

    @nn.compact
    def __call__(self, xs: Array) -> Array:
        """Return the output of the last step of sequences (batch, time, features)."""
        zeros, rows = nn.initializers.zeros, 4 * self.hidden
        weight_ih = self.param("weight_ih", zeros, (rows, xs.shape[-1]))
        weight_hh = self.param("weight_hh", zeros, (rows, self.hidden))
        bias_ih, bias_hh = self.param("bias_ih", zeros, (rows,)), self.param("bias_hh", zeros, (rows,))

        def advance(carry: tuple[Array, Array], projected: Array) -> tuple[tuple[Array, Array], None]:
            h, c = carry
            i, f, g, o = jnp.split(projected + h @ weight_hh.T + bias_hh, 4, -1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            return (nn.sigmoid(o) * jnp.tanh(c), c), None

        zero = jnp.zeros((len(xs), self.hidden))
        (h, _), _ = jax.lax.scan(advance, (zero, zero), jnp.swapaxes(xs @ weight_ih.T + bias_ih, 0, 1))
        return h


class Encoder(nn.Module):
    """Be torch's TransformerEncoderLayer without dropout."""

    width: int
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the sequences after attention and two dense layers."""
        attended = nn.MultiHeadDotProductAttention(HEADS, name="self_attn")(x)
        x = nn.LayerNorm(epsilon=1e-5, name="norm1")(x + attended)
        hidden = self.act(nn.Dense(4 * self.width, name="linear1")(x))
        return nn.LayerNorm(epsilon=1e-5, name="norm2")(x + nn.Dense(self.width, name="linear2")(hidden))


class Model(nn.Module):
    """Be the model of a problem, in training mode; its size is that of the first parameter."""

    model: str
    activation: str
    size: int
    steps: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return the outputs for a batch."""
        act = ACTIVATIONS[self.activation]
        widths = {
            "tiny": (5,),
            "mlp": (512, 512, 10),
            "member": (64, 64, 1),
            "small": (256, 10),
            "smooth": (256, 10),
        }
        match self.model:
            case "tiny" | "mlp" | "member" | "small" | "smooth":
                return _dense(jnp.tanh if self.model == "smooth" else act, x, 1, *widths[self.model])
            case "deep":
                for number in range(50):
                    x = jnp.tanh(nn.Dense(32, name=f"layer_{number + 1}")(x))
                return x
            case "cnn" | "group_cnn":
                norm = _norm if self.model == "cnn" else partial(nn.GroupNorm, 8, epsilon=1e-5)
                for number, outputs in ((1, 32), (4, 64), (7, 64)):
                    x = nn.Conv(outputs, (3, 3), name=f"layer_{number}")(x)
                    x = act(norm(name=f"layer_{number + 1}")(x))
                    x = nn.max_pool(x, (2, 2), (2, 2)) if number < 7 else x.mean((1, 2))
                return nn.Dense(10, name="layer_10")(x)
            case "resnet":
                x = nn.relu(_normed_conv(x, "", 1, 64, 3))
                for number, (before, after) in enumerate(RESNET, 3):
                    inner, around, stride = f"layer_{number}.layer_1.", f"layer_{number}.layer_2.", after // before
                    y = nn.relu(_normed_conv(x, inner, 1, after, 3, stride))
                    x = _normed_conv(x, around, 1, after, 1, stride) if stride > 1 else x
                    x = nn.relu(x + _normed_conv(y, inner, 3, after, 3))
                return nn.Dense(10, name="layer_12")(x.mean((1, 2)))
            case "lstm":
                return nn.Dense(10, name="layer_2")(LSTM(self.size // 4, name="layer_1")(x))
            case "transformer":
                x = nn.Dense(self.size, name="layer_1")(x)
                for number in range(self.steps):
                    x = Encoder(self.size, act, name=f"layer_{number + 2}")(x)
                return nn.Dense(10, name=f"layer_{self.steps + 3}")(x.mean(1))
            case "normed_mlp":
                for number in range(1, 13, 2):
                    x = _norm(name=f"layer_{number + 1}")(act(nn.Dense(256, name=f"layer_{number}")(x)))
                return nn.Dense(10, name="layer_13")(x)
            case "lenet":
                for number, outputs in ((1, 6), (3, 16)):
                    x = act(nn.Conv(outputs, (5, 5), padding="VALID", name=f"layer_{number}")(x))
                    x = nn.max_pool(x, (2, 2), (2, 2))
                x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # in the order of torch's channels
                return _dense(act, x, 6, 120, 84, 10)
            case "dense":
                return act(nn.Dense(self.size, name="layer_1")(x))
            case "conv":
                return act(nn.Conv(self.size, (3, 3), name="layer_1")(x))
        raise KeyError(self.model)


def model(problem: Problem, data: Data) -> tuple[Model, Any, dict[str, Any]]:
    """Return the model, the problem's initial parameters, and the other variables."""
    made = Model(problem.model, problem.activation, len(next(iter(data.ps.values()))), problem.steps)
    variables = jax.eval_shape(made.init, jax.random.key(0), images_last(data.x))
    state = {name: jax.tree.map_with_path(_statistic, tree) for name, tree in variables.items() if name != "params"}
    # An ensemble's initial values have one more dimension in front, for the members.
    bias = next(array for name, array in data.ps.items() if "bias" in name)
    members = len(bias) if bias.ndim == 2 else None

    def value(path: Any, leaf: Any) -> Array:
        array = _of_torch(data.ps, ".".join(part.key for part in path))
        return jnp.array(array).reshape(leaf.shape if members is None else (members, *leaf.shape))

    return made, jax.tree.map_with_path(value, variables["params"]), state


def objective(problem: Problem, made: Model) -> Callable[..., tuple[Array, Any]]:
    """Return a function of parameters, other variables and a batch that gives the loss and the new variables."""
    loss_of = LOSSES[problem.loss]

    def loss(ps: Any, state: Any, x: Array, y: Array) -> tuple[Array, Any]:
        if not state:
            return loss_of(made.apply({"params": ps}, x), y), state
        y_hat, state = made.apply({"params": ps, **state}, x, mutable=list(state))
        return loss_of(y_hat, y), state

    return loss


def images_last(x: np.ndarray) -> Array:
    """Return inputs with the channels of images last."""
    return jnp.array(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)


def _statistic(path: Any, leaf: Any) -> Array:
    return (jnp.ones if path[-1].key == "var" else jnp.zeros)(leaf.shape)


def _of_torch(ps: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return the initial value of flax's parameter of a name, in flax's order of dimensions."""
    for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        name = name.replace(f"self_attn.{theirs}.", f"self_attn.{ours}.")
    if not name.endswith("kernel"):
        return ps[name.replace(".scale", ".weight")]
    weight = ps[name.replace("kernel", "weight")]
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.swapaxes(-1, -2)


def _dense(act: Callable[[Array], Array], x: Array, first: int, *widths: int) -> Array:
    for i, outputs in enumerate(widths):
        x = nn.Dense(outputs, name=f"layer_{first + i}")(act(x) if i else x)
    return x


_norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9)


def _normed_conv(x: Array, name: str, number: int, outputs: int, size: int, stride: int = 1) -> Array:
    conv = nn.Conv(outputs, (size, size), stride, size // 2, use_bias=False, name=f"{name}layer_{number}")
    return _norm(name=f"{name}layer_{number + 1}")(conv(x))
