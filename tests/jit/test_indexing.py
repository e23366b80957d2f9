"""Indexing by whole numbers that are traced gives what it gives in eager code, read and written, under transforms."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.jit import jit

F64 = torch.float64

# Of a tensor (4, 3, 5) by numbers i and j, and by positions p of the last dimension.
INDICES = {
    "first": lambda i, j, p: i,
    "in a tuple": lambda i, j, p: (i,),
    "second": lambda i, j, p: (slice(None), i),
    "last": lambda i, j, p: (..., i),
    "before dots": lambda i, j, p: (i, ...),
    "around dots": lambda i, j, p: (i, ..., j),
    "two": lambda i, j, p: (i, j),
    "two apart": lambda i, j, p: (i, slice(None), j),
    "all": lambda i, j, p: (i, j, i),
    "a new dimension": lambda i, j, p: (None, i, None, slice(1, None), j),
    "a slice": lambda i, j, p: (slice(1, 3), i, slice(None, None, 2)),
    "a number of Python": lambda i, j, p: (-1, i),
    "positions": lambda i, j, p: (i, slice(None), p),
    "positions before": lambda i, j, p: (p[:2], j),
    "a list": lambda i, j, p: ([0, 2], i),
}
NUMBERS = [(0, 2), (2, 1), (-1, -3)]
DTYPES = [torch.int64, torch.int32, torch.int8]


def read(index):
    return lambda x, i, j, p: x[index(i, j, p)] * 2


def write(index):
    def f(x, i, j, p):
        y = x.clone()
        y[index(i, j, p)] = x.sum()
        y[index(i, j, p)] += 1.0
        return y

    return f


FORMS = {"read": read, "write": write}
TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: lambda x, *given: torch.func.grad(lambda x: f(x, *given).sin().sum())(x),
    "jvp": lambda f: lambda x, *given: torch.func.jvp(lambda x: f(x, *given), (x,), (x.cos(),))[1],
    "vmap": lambda f: lambda x, *given: torch.vmap(lambda x: f(x, *given))(torch.stack([x, 2 * x])),
    "hessian": lambda f: (
        lambda x, *given: torch.func.grad(
            lambda x: torch.func.grad(lambda x: f(x, *given).sin().sum())(x).square().sum()
        )(x)
    ),
}


@pytest.fixture
def given(rng):
    return torch.randn(4, 3, 5, generator=rng, dtype=F64), torch.tensor([3, 0, 1])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", INDICES)
def test_a_traced_number_is_an_index(index, form, transform, given):
    x, p = given
    f = TRANSFORMS[transform](FORMS[form](INDICES[index]))
    jitted = jit(f, backend="replay")
    for dtype in DTYPES:
        for i, j in NUMBERS:
            numbers = torch.tensor(i, dtype=dtype), torch.tensor(j, dtype=dtype)
            torch.testing.assert_close(jitted(x, *numbers, p), f(x, *numbers, p))
    assert jitted.cache_info().misses == len(DTYPES)


def test_each_of_a_batch_has_its_own_number(given):
    x, _ = given
    numbers = torch.tensor([2, -1, 0])
    for f in (lambda i: x[i], lambda i: x[1, i], lambda i: torch.func.grad(lambda x: x[i].sum())(x)):
        torch.testing.assert_close(
            jit(torch.vmap(f), backend="replay")(numbers), torch.stack([f(int(i)) for i in numbers])
        )


def test_the_number_of_a_loop_is_an_index(given):
    x, _ = given

    def f(x):
        return lt.fori_loop(0, 4, lambda i, c: c * 0.5 + x[i] * x[-1, i % 3].sum(), torch.zeros(3, 5, dtype=F64))

    torch.testing.assert_close(jit(f, backend="replay")(x), f(x))
    slope = torch.func.grad(lambda x: f(x).sin().sum())
    torch.testing.assert_close(jit(slope, backend="replay")(x), slope(x))


@pytest.mark.parametrize("number", [4, -5])
def test_a_number_outside_is_an_error_of_the_call(number, given):
    x, _ = given
    jitted = jit(lambda x, i: x[i], backend="replay")
    torch.testing.assert_close(jitted(x, torch.tensor(1)), x[1])
    with pytest.raises(IndexError, match="out of range"):
        jitted(x, torch.tensor(number))


def test_too_many_are_an_error_of_the_trace(given):
    x, _ = given
    with pytest.raises((IndexError, lt.errors.TracingError), match="too many indices"):
        jit(lambda x, i: x[i, i, i, i], backend="replay")(x, torch.tensor(1))
