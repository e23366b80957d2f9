"""`lt.scan` under every word of transforms is the loop of Python, for bodies of all kinds, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import luxtorch as lt
from tests.loops.words import F64, LONG, apply, loop

T = 4


def gru(scan: Any, theta: Any) -> Tensor:
    """A cell that closes over its weights."""

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        update, reset, new = (x @ theta["wx"]).chunk(3)
        of_update, of_reset, of_new = (h @ theta["wh"]).chunk(3)
        z, r = torch.sigmoid(update + of_update), torch.sigmoid(reset + of_reset)
        h = (1 - z) * torch.tanh(new + r * of_new) + z * h
        return h, h * 2

    h, ys = scan(step, theta["h"], theta["x"])
    return (ys * h).sum() + ys.square().sum()


def integers(scan: Any, theta: Any) -> Tensor:
    """A carry and a sequence of integers beside the numbers."""

    def step(carry: Any, x: Any) -> Any:
        count, h = carry
        h = torch.sin(h * x["factor"] + count * theta["h"][0])
        return (count + x["step"], h), (count * 2, h.sum())

    (count, h), (counts, ys) = scan(
        step,
        (torch.tensor(1), theta["h"]),
        {"step": torch.arange(T), "factor": theta["x"]},
    )
    return (ys * counts).sum() + (h * count).sum()


def dropout(scan: Any, theta: Any) -> Tensor:
    """A key in the carry, of which each step splits its own."""

    def step(carry: Any, x: Tensor) -> Any:
        key, h = carry
        key, own = lt.random.split(key)
        keep = lt.random.bernoulli(own, 0.6, (3,)).to(F64)
        h = torch.tanh(h * keep + x * theta["wh"][0, :3])
        return (key, h), h

    (_, h), ys = scan(step, (lt.random.key(3), theta["h"]), theta["x"])
    return (ys * h).sum() + ys.pow(3).sum()


def vector(scan: Any, theta: Any) -> Tensor:
    """A carry of a dict with a ComponentVector."""
    start = {"v": lt.ComponentVector({"a": theta["h"], "b": theta["h"] * 2}), "n": theta["h"].sum(), "none": None}

    def step(carry: Any, x: Tensor) -> Any:
        v = lt.ComponentVector({"a": torch.tanh(carry["v"].a + x), "b": carry["v"].b * torch.cos(carry["v"].a)})
        return {"v": v, "n": carry["n"] * 0.5 + (v.b * theta["x"][0]).sum(), "none": None}, {"y": v.a * carry["n"]}

    carry, ys = scan(step, start, theta["x"], reverse=True)
    return carry["n"] + carry["v"].flat.pow(2).sum() + ys["y"].sum()


def nested(scan: Any, theta: Any) -> Tensor:
    """A scan, of which each step scans what it closes over, and maps a part."""

    def step(h: Tensor, x: Tensor) -> Any:
        def inner(c: Tensor, w: Tensor) -> Any:
            c = torch.tanh(c * w + x)
            return c, c.sum() * theta["h"][1]

        c, ys = scan(inner, h, theta["wh"][:, :3])
        several = torch.vmap(lambda s: scan(lambda a, b: (a * b.cos() + s * x, None), h, theta["x"])[0])(theta["h"])
        return c + 0.1 * several.sum(0), ys.sum()

    h, ys = scan(step, theta["h"], theta["x"])
    return h.square().sum() + ys.sin().sum()


def components(scan: Any, theta: Any) -> Tensor:
    """A vector that is closed over: its components, groups and the whole, also by derivatives and batches inside."""
    v = lt.ComponentVector({"p": {"w": theta["wh"][:, :3], "h": theta["h"].sin()}, "x": theta["x"].tanh()})
    group = v["p"]

    def loss(ps: Any, h: Tensor) -> Tensor:
        return torch.tanh(ps["p"]["w"] @ h + ps["x"][0]).sum()

    def step(h: Tensor, x: Tensor) -> Any:
        slope = torch.func.grad(loss)(v, h)
        h = torch.tanh(group["w"] @ h + x) * v["p"].h + 0.1 * slope["p"]["w"].sum(0)
        inner, _ = scan(lambda c, w: (torch.sin(c + w * group["h"]), None), h, v["p"]["w"])
        several = torch.vmap(lambda w: (w * v["x"][1]).sum())(group["w"])
        return inner + several, (h.sum() + v.flat[1] * v.p.flat[2]) * group.flat[0]

    h, ys = scan(step, theta["h"], theta["x"])
    return (h * v["p"]["h"]).sum() + ys.square().sum() + group["w"].square().sum()


BODIES = {body.__name__: body for body in (gru, integers, dropout, vector, nested, components)}


@pytest.fixture
def theta(rng: torch.Generator) -> dict[str, Tensor]:
    shapes = {"wx": (3, 9), "wh": (3, 9), "h": (3,), "x": (T, 3)}
    return {name: 0.5 * torch.randn(shape, generator=rng, dtype=F64) for name, shape in shapes.items()}


def _without_none(scan: Any) -> Any:
    """Let the loop of the tests return None for the results that are None."""

    def scanned(f: Any, init: Any, xs: Any = None, **options: Any) -> Any:
        empty: list[bool] = []

        def step(carry: Any, x: Any) -> Any:
            carry, y = f(carry, x)
            empty.append(y is None)
            return carry, x if y is None else y

        carry, ys = scan(step, init, xs, **options)
        return carry, None if empty[0] else ys

    return scanned


PYTHON = _without_none(loop)


FIRST, *OTHERS = BODIES


@pytest.mark.parametrize("word", ["", *LONG])
@pytest.mark.parametrize("body", BODIES)
def test_eager(body: str, word: str, theta: Any) -> None:
    expected = apply(word, lambda t: BODIES[body](PYTHON, t))(theta)
    got = apply(word, lambda t: BODIES[body](lt.scan, t))(theta)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("word", ["", *LONG])
@pytest.mark.parametrize("body", [FIRST, *(pytest.param(body, marks=pytest.mark.slow) for body in OTHERS)])
def test_replayed(body: str, word: str, theta: Any) -> None:
    expected = apply(word, lambda t: BODIES[body](PYTHON, t))(theta)
    got = lt.jit(apply(word, lambda t: BODIES[body](lt.scan, t)), backend="replay")(theta)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
