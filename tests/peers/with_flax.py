"""What Flax's Linen has of the features of the comparison, with Optax for the optimizers."""

from __future__ import annotations

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import with_equinox as shared
from probing import close, main

X, KEY, W = shared.X, shared.KEY, shared.W


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(nn.Dense(5)(x)))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x))


def names():
    model = nn.Dense(2)
    ps = model.init(KEY, X)["params"]
    for wrong in ({}, {"wieght": ps["kernel"], "bias": ps["bias"]}):
        try:
            model.apply({"params": wrong}, X)
        except flax.errors.FlaxError:
            continue
        raise AssertionError("nobody noticed")


def apply_normed(variables, ps):
    return Normed().apply({**variables, "params": ps}, X, mutable=["batch_stats"])


def batchnorm_grad():
    variables = Normed().init(KEY, X)

    def loss(ps):
        y, new = apply_normed(variables, ps)
        return (y**2).sum(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    before, after = variables["batch_stats"]["BatchNorm_0"]["mean"], new["batch_stats"]["BatchNorm_0"]["mean"]
    assert not jnp.array_equal(before, after) and jnp.abs(grads["Dense_0"]["kernel"]).sum() > 0


def batchnorm_models():
    keys = jax.random.split(KEY, 3)
    many = jax.vmap(lambda key: Normed().init(key, X))(keys)
    y = jax.vmap(lambda variables: apply_normed(variables, variables["params"])[0])(many)
    one = Normed().init(keys[1], X)
    close(y[1], apply_normed(one, one["params"])[0])


def dropout(ps, x, key):
    return Dropping().apply(ps, x, rngs={"dropout": key})


def dropout_keys():
    keys = jax.random.split(KEY, 3)
    ps = Dropping().init({"params": KEY, "dropout": KEY}, X)
    close(jax.vmap(lambda key: dropout(ps, X, key))(keys)[2], dropout(ps, X, keys[2]))


def per_sample():
    keys = jax.random.split(KEY, 4)
    ps = Dropping().init({"params": KEY, "dropout": KEY}, X)
    one = jax.grad(lambda ps, x, key: dropout(ps, x, key).sum())
    grads = jax.vmap(one, (None, 0, 0))(ps, X, keys)
    close(grads["params"]["Dense_0"]["kernel"][2], one(ps, X[2], keys[2])["params"]["Dense_0"]["kernel"])


def lstm_jvp():
    model = nn.RNN(nn.LSTMCell(4))
    x = X[None]
    ps = model.init(KEY, x)

    def f(x):
        return model.apply(ps, x)

    _, slope = jax.jvp(f, (x,), (jnp.ones_like(x),))
    close(slope, (f(x + 1e-2) - f(x - 1e-2)) / 2e-2, 1e-3)


def attention_hessian():
    model, x = nn.MultiHeadDotProductAttention(2), jnp.linspace(-1, 1, 8).reshape(1, 2, 4)
    ps = model.init(KEY, x)
    hessian = jax.hessian(lambda x: (model.apply(ps, x) ** 2).sum())(x).reshape(8, 8)
    close(hessian, hessian.T)


def setup_vmap():
    keys = jax.random.split(KEY, 3)
    many = jax.vmap(lambda key: nn.Dense(2).init(key, X))(keys)
    close(many["params"]["kernel"][1], nn.Dense(2).init(keys[1], X)["params"]["kernel"])


def error_path():
    model = nn.Sequential([nn.Dense(5), nn.Sequential([nn.Dense(1)])])
    ps = model.init(KEY, X)
    try:
        model.apply(ps, X[:, :2])
    except flax.errors.FlaxError as error:
        assert "layers_0" in str(error), f"no name in: {error}"


def checkpoint():
    state = optax.adam(0.1).init(W)
    back, _ = flax.serialization.from_bytes((W, state), flax.serialization.to_bytes((W, state)))
    close(back["w"], W["w"])


def ragged():
    model = nn.RNN(nn.LSTMCell(2))
    ps = model.init(KEY, X[None])

    def f(ps, x, lengths):
        return (model.apply(ps, x, seq_lengths=lengths, return_carry=True)[0][1] ** 2).sum()

    x, lengths = jnp.stack([X, 2 * X])[:, None], jnp.array([[4], [2]])
    many = jax.jit(jax.vmap(jax.grad(f), (None, 0, 0)))(ps, x, lengths)
    one = jax.grad(f)(ps, x[1, :, :2], jnp.array([2]))
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        close(a[1], b)


MISSING = {name: why for name, why in shared.MISSING.items() if name != "ragged"}

if __name__ == "__main__":
    main(vars(shared) | globals())
