"""`lt.while_loop` and `lt.fori_loop`, eager and compiled, under transforms, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luxtorch as lt
from luxtorch.errors import DTypeError, InputError
from tests.loops.words import F64, HOW, LONG, WORDS, apply


def grow(theta: Any, **options: Any) -> Any:
    """Grow until a sum is large; different entries of a batch need different numbers of steps."""

    def body(state: Any) -> Any:
        return {"n": state["n"] + 1, "x": state["x"] * 1.5 + torch.sin(state["x"]) * theta["w"] / 8}

    start = {"n": torch.tensor(0), "x": theta["x"]}
    end = lt.while_loop(lambda state: state["x"].square().sum() < 30, body, start, **options)
    return end["x"].square().sum() * (1 + end["n"])


def reference(theta: Any) -> Any:
    """Do that in a fixed number of steps, of which those that are too many are not selected."""
    n, x, active = torch.tensor(0), theta["x"], torch.tensor(True)
    for _ in range(20):
        active = active & (x.square().sum() < 30)
        n = torch.where(active, n + 1, n)
        x = torch.where(active, x * 1.5 + torch.sin(x) * theta["w"] / 8, x)
    return x.square().sum() * (1 + n)


@pytest.fixture
def theta(rng):
    return {name: 0.5 + torch.rand(3, generator=rng, dtype=F64) for name in "xw"}


@pytest.mark.sampled(4)
@HOW
@pytest.mark.parametrize("word", ["", *LONG])
def test_every_word_with_a_limit(how, word, theta):
    got = how(apply(word, lambda t: grow(t, max_steps=20)))(theta)
    torch.testing.assert_close(got, apply(word, reference)(theta), rtol=1e-10, atol=1e-10)


@pytest.mark.sampled(4)
@HOW
@pytest.mark.parametrize("word", ["", *[word for word in WORDS if "R" not in word]])
def test_forward_mode_and_batches_without_one(how, word, theta):
    got = how(apply(word, grow))(theta)
    torch.testing.assert_close(got, apply(word, reference)(theta), rtol=1e-10, atol=1e-10)


def test_reverse_mode_without_one_is_refused_when_compiled(theta):
    torch.testing.assert_close(torch.func.grad(grow)(theta), torch.func.grad(reference)(theta))
    with pytest.raises(InputError, match="max_steps"):
        lt.jit(torch.func.grad(grow), backend="replay")(theta)


@HOW
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_limit_ends_the_loop(how, steps):
    got = how(lambda x: lt.while_loop(lambda x: x < 100, lambda x: x * 2, x, max_steps=steps))(torch.ones(()))
    assert got == 2**steps


@HOW
def test_a_condition_that_never_holds(how):
    x = torch.ones(2)
    got = how(lambda x: lt.while_loop(lambda x: x.sum() < 0, lambda x: x * 2, x))(x)
    assert torch.equal(got, x)
    assert torch.equal(how(torch.vmap(lambda x: lt.while_loop(lambda x: x < 0, lambda x: x * 2, x)))(x), x)


BAD = {
    "float": (lambda x: lt.while_loop(lambda x: x.sum(), lambda x: x, x), DTypeError, "boolean scalar"),
    "shape": (lambda x: lt.while_loop(lambda x: x < 3, lambda x: x, x), DTypeError, "boolean scalar"),
    "python": (lambda x: lt.while_loop(lambda x: True, lambda x: x, x), DTypeError, "boolean scalar"),
    "carry": (
        lambda x: lt.while_loop(lambda c: c["x"].sum() < 9, lambda c: {"x": c["x"].double()}, {"x": x}),
        DTypeError,
        "carry.x",
    ),
    "structure": (lambda x: lt.while_loop(lambda c: c[0].sum() < 9, lambda c: c[0], (x,)), InputError, "structure"),
    "max_steps": (
        lambda x: lt.while_loop(lambda x: x.sum() < 3, lambda x: x, x, max_steps=-1),
        InputError,
        "max_steps",
    ),
    "no function": (lambda x: lt.while_loop(None, lambda x: x, x), DTypeError, "cond"),
    "bound": (lambda x: lt.fori_loop(0, x.sum(), lambda i, c: c, x), DTypeError, "upper"),
    "float bound": (lambda x: lt.fori_loop(0.5, 2, lambda i, c: c, x), DTypeError, "lower"),
}


@HOW
@pytest.mark.parametrize("options", [{}, {"max_steps": 4}])
@pytest.mark.parametrize("case", BAD)
def test_errors(how, case, options):
    f, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        how(f)(torch.ones(2))


@HOW
@pytest.mark.parametrize(("lower", "upper"), [(0, 4), (2, 5), (3, 3), (5, 2), (-2, 1)])
@pytest.mark.parametrize("tensors", [False, True])
def test_numbers(how, lower, upper, tensors):
    x = torch.tensor([1.0, 2.0])
    expected = x
    for i in range(lower, upper):
        expected = expected * i + x
    body = lambda i, c: c * i + x  # noqa: E731
    if tensors:
        got = how(lambda a, b, x: lt.fori_loop(a, b, body, x))(torch.tensor(lower), torch.tensor(upper), x)
    else:
        got = how(lambda x: lt.fori_loop(lower, upper, body, x))(x)
        slope = how(torch.func.grad(lambda x: lt.fori_loop(lower, upper, lambda i, c: c * i, x).sum()))(x)
        assert torch.equal(
            slope, torch.full((2,), float(torch.tensor([*range(lower, upper), 1]).prod()) if lower < upper else 1.0)
        )
    assert torch.equal(got, expected)


@HOW
def test_a_batch_of_bounds(how):
    got = how(torch.vmap(lambda n: lt.fori_loop(0, n, lambda i, c: c + i, torch.tensor(0))))(torch.tensor([4, 0, 2]))
    assert got.tolist() == [6, 0, 1]
