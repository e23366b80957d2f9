"""`lt.map` is vmap, one after another or batch after batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luxtorch as lt
from luxtorch.errors import InputError


def eager(f: Any) -> Any:
    return f


def replayed(f: Any) -> Any:
    return lt.jit(f, backend="replay")


HOW = pytest.mark.parametrize("how", [eager, replayed])


@HOW
@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 7])
@pytest.mark.parametrize("n", [1, 5, 0])
def test_values_and_gradients(how, batch_size, n, rng):
    xs = {"a": torch.randn(n, 3, generator=rng), "b": torch.randn(n, generator=rng), "none": None}
    w = torch.randn(3, 3, generator=rng)

    def f(mapped, w, xs):
        ys = mapped(lambda x: {"y": torch.tanh(x["a"] @ w) * x["b"], "none": None}, xs)
        assert ys["none"] is None
        return ys["y"].square().sum(), ys["y"]

    got = how(
        lambda w, a, b: torch.func.grad(
            lambda w: f(lambda g, xs: lt.map(g, xs, batch_size=batch_size), w, {"a": a, "b": b, "none": None}),
            has_aux=True,
        )(w)
    )(w, xs["a"], xs["b"])
    y = torch.tanh(xs["a"] @ w) * xs["b"][:, None]
    torch.testing.assert_close(got[1], y)
    torch.testing.assert_close(
        got[0], torch.func.grad(lambda w: (torch.tanh(xs["a"] @ w) * xs["b"][:, None]).square().sum())(w)
    )


@HOW
@pytest.mark.parametrize("batch_size", [None, 2])
def test_keys(how, batch_size, make_key):
    keys = lt.random.split(make_key(), 5)
    got = how(lambda keys: lt.map(lambda key: lt.random.normal(key, (2,)), keys, batch_size=batch_size))(keys)
    assert torch.equal(got, torch.stack([lt.random.normal(key, (2,)) for key in keys]))


def test_errors():
    with pytest.raises(InputError, match="length"):
        lt.map(lambda x: x, None)
    with pytest.raises(InputError, match="batch_size"):
        lt.map(lambda x: x, torch.ones(2), batch_size=0)
