"""What Equinox has of the features of the comparison, with Optax for the optimizers. It runs where JAX is installed."""

from __future__ import annotations

import os
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from probing import close, main

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
KEY = jax.random.key(0)


class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(3, 5, key=one), eqx.nn.Linear(5, 1, key=two)
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        y, state = self.norm(self.first(x), state)
        return self.last(y), state


class Dropping(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.first, self.dropout = eqx.nn.Linear(3, 8, key=key), eqx.nn.Dropout(0.5)

    def __call__(self, x, key):
        return self.dropout(self.first(x), key=key)


def batch(model, state, x):
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def names():
    model = eqx.nn.Linear(3, 2, key=KEY)
    try:
        eqx.tree_at(lambda m: m.wieght, model, jnp.ones((2, 3)))
    except AttributeError:
        return
    raise AssertionError("nobody noticed")


def batchnorm_grad():
    model, state = eqx.nn.make_with_state(Normed)(KEY)

    def loss(model, state):
        y, state = batch(model, state, X)
        return (y**2).sum(), state

    grads, new = eqx.filter_grad(loss, has_aux=True)(model, state)
    assert jnp.abs(grads.first.weight).sum() > 0
    before, after = (jax.tree.leaves(tree) for tree in (state, new))
    assert any(not jnp.array_equal(one, other) for one, other in zip(before, after, strict=True))


def batchnorm_models():
    keys = jax.random.split(KEY, 3)
    models, states = eqx.filter_vmap(eqx.nn.make_with_state(Normed))(keys)
    y, _ = eqx.filter_vmap(lambda model, state: batch(model, state, X))(models, states)
    close(y[1], batch(*eqx.nn.make_with_state(Normed)(keys[1]), X)[0])


def dropout_keys():
    model, keys = Dropping(KEY), jax.random.split(KEY, 3)
    close(jax.vmap(lambda key: model(X[0], key))(keys)[2], model(X[0], keys[2]))


def per_sample():
    model, keys = Dropping(KEY), jax.random.split(KEY, 4)
    one = eqx.filter_grad(lambda model, x, key: model(x, key).sum())
    grads = eqx.filter_vmap(one, in_axes=(None, 0, 0))(model, X, keys)
    close(grads.first.weight[2], one(model, X[2], keys[2]).first.weight)


def lstm_jvp():
    cell = eqx.nn.LSTMCell(3, 4, key=KEY)

    def f(x):
        return jax.lax.scan(lambda carry, x: (cell(x, carry), None), (jnp.zeros(4), jnp.zeros(4)), x)[0][0]

    _, slope = jax.jvp(f, (X,), (jnp.ones_like(X),))
    close(slope, (f(X + 1e-2) - f(X - 1e-2)) / 2e-2, 1e-3)


def attention_hessian():
    model = eqx.nn.MultiheadAttention(2, 4, key=KEY)
    hessian = jax.hessian(lambda x: (model(x, x, x) ** 2).sum())(jnp.linspace(-1, 1, 8).reshape(2, 4)).reshape(8, 8)
    close(hessian, hessian.T)


def setup_vmap():
    keys = jax.random.split(KEY, 3)
    close(eqx.filter_vmap(Dropping)(keys).first.weight[1], Dropping(keys[1]).first.weight)


W = {"w": jnp.array([1.0, -2.0])}


def adam(rate, ps):
    rule = optax.adam(rate)
    state = rule.init(ps)
    for _ in range(2):
        updates, state = rule.update(jax.grad(lambda ps: (ps["w"] ** 2).sum())(ps), state)
        ps = optax.apply_updates(ps, updates)
    return ps


def rate_models():
    close(jax.vmap(lambda rate: adam(rate, W)["w"])(jnp.array([0.1, 0.01]))[1], adam(0.01, W)["w"])


def rate_gradient():
    def after(rate):
        return (adam(rate, W)["w"] ** 2).sum()

    close(jax.grad(after)(0.1), (after(0.101) - after(0.099)) / 0.002, 1e-2)


def whole_step():
    jax.jit(lambda ps: adam(0.1, ps))(W)


def compiled_inside():
    f = jax.jit(lambda x: (jnp.sin(x) * x).sum())
    close(jax.vmap(jax.grad(f))(X), jnp.cos(X) * X + jnp.sin(X))


def donation():
    x = jnp.ones((200, 200))
    address = x.unsafe_buffer_pointer()
    y = jax.jit(lambda x: x * 2, donate_argnums=0)(x)
    assert x.is_deleted() and y.unsafe_buffer_pointer() == address


def error_path():
    model = eqx.nn.Sequential([eqx.nn.Linear(3, 5, key=KEY), eqx.nn.Sequential([eqx.nn.Linear(4, 1, key=KEY)])])
    try:
        model(X[0])
    except (TypeError, ValueError) as error:
        assert "layers[1]" in str(error), f"no name in: {error}"


def checkpoint():
    state = optax.adam(0.1).init(W)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "one.eqx")
        eqx.tree_serialise_leaves(path, (W, state))
        back, _ = eqx.tree_deserialise_leaves(path, (jax.tree.map(jnp.zeros_like, W), state))
    close(back["w"], W["w"])


def loop():
    def total(x):
        return jax.lax.scan(lambda c, x: (c * 0.5 + x, c), jnp.zeros(3), x)[0].sum()

    f = jax.jit(total)
    _, slope = jax.jvp(f, (X,), (jnp.ones_like(X),))
    close(slope, jax.grad(f)(X).sum(), 1e-3)
    jax.vmap(f)(jnp.stack([X, 2 * X]))


def compiled(f):
    """Check a function of a sample under transforms that are compiled."""
    jax.jit(jax.vmap(f))(jnp.stack([X, 2 * X]))
    return jax.jit(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1])(X)


def condition():
    compiled(lambda x: jax.lax.while_loop(lambda c: (c**2).sum() < 99, lambda c: c * 1.5, x).sum())


def branch():
    def f(x):
        return jax.lax.cond(x.sum() > -1, lambda x: x**2, lambda x: 3 * x, x + 0.1).sum()

    close(jax.jit(jax.grad(f))(X).sum(), compiled(f), 1e-3)


MISSING = {
    "ragged": "the cells are there, but no layer that runs them over a sequence",
    "flat": "ravel_pytree has no names: the vector has to be taken apart first",
    "modules": "torch's modules and tensors are not JAX's",
}

if __name__ == "__main__":
    main(globals())
