"""Inside of a transform, of a compiler or of another jit, a jitted function is the function itself."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import luxtorch as lt
from luxtorch.jit import jit

from .conftest import train


def loss(w, x):
    return (x @ w).tanh().square().sum()


JITTED = jit(loss, backend="replay")

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f),
    "value and grad": lambda f: torch.func.grad_and_value(f),
    "vmap": lambda f: torch.vmap(f, in_dims=(None, 0)),
    "vmap of models": lambda f: lambda w, x: torch.vmap(f, in_dims=(0, None))(torch.stack([w, 2 * w]), x),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f), in_dims=(None, 0)),
    "jvp": lambda f: lambda w, x: torch.func.jvp(f, (w, x), (x.T @ x @ w, x)),
    "vjp": lambda f: lambda w, x: torch.func.vjp(f, w, x)[1](torch.ones(())),
    "hessian": lambda f: torch.func.hessian(f),
    "gradient": lambda f: lambda w, x: lt.gradient(lambda w: f(w, x), w),
    "functionalize": lambda f: torch.func.functionalize(f),
    "compile": lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
    "compile of vmap": lambda f: torch.compile(torch.vmap(f, in_dims=(None, 0)), backend="aot_eager", fullgraph=True),
    "make_fx": lambda f: lambda w, x: torch.fx.experimental.proxy_tensor.make_fx(f)(w, x)(w, x),
}


@pytest.fixture
def weight(rng):
    return torch.randn(3, 2, generator=rng)


@pytest.mark.parametrize("outer", [False, True], ids=["plain", "jitted"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(weight, batch, same, name, outer):
    if outer and name in ("compile", "compile of vmap", "make_fx"):
        pytest.skip("no compiler runs inside of a trace")
    transform = TRANSFORMS[name]
    before = JITTED.cache_info()
    got = transform(JITTED)
    got = jit(got, backend="replay") if outer else got
    for _ in range(2):
        same(got(weight, batch[0]), transform(loss)(weight, batch[0]))
    assert JITTED.cache_info() == before


def test_forward_mode(weight, batch, same):
    results = []
    for f in (JITTED, loss):
        with forward_ad.dual_level():
            results.append(tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(weight, weight + 1), batch[0]))))
    same(*results)


def test_jit_in_jit(make_state, batch, same):
    inner = jit(train, backend="replay", donate="ts")

    def twice(ts, batch):
        return inner(inner(ts, batch)[1], batch)

    outer, ts = jit(twice, backend="replay"), make_state()
    same(outer(ts, batch), train(train(ts, batch)[1], batch))
    assert inner.cache_info().misses == 0
    assert ts.step == 0  # an inner call donates nothing


def test_ensembles(make_state, batch, same):
    states = lt.stack([make_state(lt.Dense(3, 2)) for _ in range(3)])
    many = torch.vmap(train, in_dims=(0, None))
    same(jit(many, backend="replay")(states, batch), many(states, batch))
    same(torch.vmap(jit(train, backend="replay"), in_dims=(0, None))(states, batch), many(states, batch))
