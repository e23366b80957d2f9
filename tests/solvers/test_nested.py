"""Derivatives of a model by its inputs, and of these by its parameters: what physics-informed networks need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import luxtorch as lt

FORMS = {"dict": lambda tree: tree, "vector": lt.ComponentVector}


@pytest.fixture(params=FORMS)
def form(request) -> Any:
    return FORMS[request.param]


@pytest.fixture
def points(rng) -> Tensor:
    return torch.rand(7, 2, generator=rng, dtype=torch.float64)


def reverse(u):
    """Return u_t and u_xx, by gradients of gradients at each point."""

    def at(point):
        t, x = point
        u_t = lt.gradient(lambda t: u(t, x), t)
        u_xx = lt.gradient(lambda x: lt.gradient(lambda x: u(t, x), x), x)
        return u_t, u_xx

    return torch.vmap(at)


def forward(u):
    """Return the same, by products with ones along all points."""

    def along(f, x):
        return lt.jacobian_vector_product(f, x, torch.ones_like(x))

    def at(points):
        t, x = points.T
        return along(lambda t: u(t, x), t), along(lambda x: along(lambda x: u(t, x), x), x)

    return at


def mixed(u):
    """Return the same, forward over reverse, from the Hessian at each point."""

    def at(point):
        value = lambda point: u(*point)  # noqa: E731
        return lt.gradient(value, point)[0], lt.hessian(value, point, mode="forward")[1, 1]

    return torch.vmap(at)


WAYS = {"reverse": reverse, "forward": forward, "mixed": mixed}


@pytest.fixture(params=WAYS)
def way(request) -> Any:
    return WAYS[request.param]


class Wave(lt.Layer):
    """A layer whose derivatives are known: u = exp(-a t) sin(b x)."""

    def initial_parameters(self, key):
        return {"a": torch.tensor(0.7), "b": torch.tensor(3.0)}

    def __call__(self, x, ps, st):
        t, x = x.unbind(-1)
        return torch.exp(-ps["a"] * t) * torch.sin(ps["b"] * x), st


MODELS = {
    "wave": Wave(),
    "network": lt.Chain(lt.Dense(2, 6, torch.tanh), lt.Dense(6, 1), lt.WrappedFunction(lambda y: y.squeeze(-1))),
}


def field(model, ps, st):
    return lambda t, x: model(torch.stack([t, x], -1), ps, st)[0]


def test_derivatives_are_those_that_are_known(way, form, points):
    ps = form(lt.f64(lt.setup(0, MODELS["wave"])[0]))
    u_t, u_xx = way(field(MODELS["wave"], ps, {}))(points)
    t, x = points.T
    u = torch.exp(-0.7 * t) * torch.sin(3 * x)
    torch.testing.assert_close((u_t, u_xx), (-0.7 * u, -9 * u), rtol=1e-6, atol=1e-6)  # 0.7 was a float32


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_of_a_residual(way, form, model, points, rng):
    """It is what differences of the residual say, in double precision; the equation is u_t = u_xx / 10."""
    ps, st = lt.setup(1, MODELS[model])
    ps = form(lt.f64(ps))

    def loss(ps):
        u_t, u_xx = way(field(MODELS[model], ps, st))(points)
        return (u_t - u_xx / 10).square().mean()

    grads = lt.gradient(loss, ps)
    assert type(grads) is type(ps)
    leaves, spec = torch.utils._pytree.tree_flatten(ps)
    direction = [torch.randn(leaf.shape, generator=rng, dtype=torch.float64) for leaf in leaves]
    slope = sum((g * d).sum() for g, d in zip(torch.utils._pytree.tree_leaves(grads), direction, strict=True))
    h = 1e-6
    ends = [
        loss(torch.utils._pytree.tree_unflatten([p + s * h * d for p, d in zip(leaves, direction, strict=True)], spec))
        for s in (1, -1)
    ]
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), slope, rtol=1e-6, atol=1e-8)


def test_the_ways_agree_under_vmap_over_models(points):
    """Eight networks at once: each has its own derivatives."""
    model = MODELS["network"]
    ps, st = lt.stack([lt.f64(lt.setup(seed, model)) for seed in range(8)])
    found = [torch.vmap(lambda ps, st, way=way: way(field(model, ps, st))(points))(ps, st) for way in WAYS.values()]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    assert found[0][1].shape == (8, 7) and math.isfinite(found[0][1].sum())


@pytest.fixture
def trained():
    """The gradient of a residual, in a way, as a function of parameters and points; and parameters."""
    model = MODELS["network"]
    ps, st = lt.setup(1, model)

    def make(way):
        def gradient(ps, points):
            return lt.gradient(lambda ps: sum(d.square().mean() for d in way(field(model, ps, st))(points)), ps)

        return gradient

    return make, lt.ComponentVector(ps, dtype=torch.float64)


def test_jit_knows_them(way, trained, points):
    make, ps = trained
    jitted = lt.jit(make(way), backend="replay")
    for _ in range(2):
        torch.testing.assert_close(jitted(ps, points).flat, make(way)(ps, points).flat)


# torch.compile does not trace forward mode inside of forward mode.
@pytest.mark.parametrize("way", ["reverse", "mixed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_knows_them(way, backend, trained, points):
    make, ps = trained
    gradient = make(WAYS[way])
    compiled = torch.compile(gradient, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ps, points).flat, gradient(ps, points).flat)
