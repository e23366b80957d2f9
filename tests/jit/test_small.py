"""Graphs of small operators: one thread, and calls from C++."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.jit import jit
from luxtorch.jit._flatten import flatten
from luxtorch.jit._inductor import is_small, on_one_thread, options_for
from luxtorch.jit._trace import trace

# A function of a matrix, and the largest number of rows (of as many columns) for which it is small.
LIMITS = {
    "product": (lambda x: x @ x, 64),
    "batch of products": (lambda x: torch.bmm(x[None].expand(8, -1, -1), x[None].expand(8, -1, -1)), 32),
    "convolution": (lambda x: torch.nn.functional.conv2d(x[None, None], torch.ones(8, 1, 3, 3), padding=1), 60),
    "loop": (lambda x: x.sin() + 1, 256),
    "sum": (lambda x: x.sum(), 256),
    "sort": (lambda x: x.sort(0).values, 256),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_small(name):
    function, limit = LIMITS[name]
    assert is_small(_graph(function, torch.zeros(limit, limit)))
    assert not is_small(_graph(function, torch.zeros(limit + 8, limit + 8)))


def test_an_operator_that_nobody_knows_is_not_small():
    model = lt.Recurrence(lt.LSTMCell(2, 3))
    ps, st = lt.setup(0, model)
    assert not is_small(_graph(lambda x: model(x, ps, st)[0], torch.zeros(4, 5, 2)))


def test_a_symbolic_size_is_not_small():
    leaves, spec = flatten(((torch.ones(4, 3),), {}))
    assert not is_small(trace(lambda args, kwargs: args[0].sin(), leaves, spec, {0: (0,)}).graph)


@pytest.mark.parametrize(("operators", "from_cpp"), [(3, False), (80, True), (2500, False)])
def test_who_calls_the_operators(operators, from_cpp):
    def function(x):
        for _ in range(operators):
            x = x.sin()
        return x

    assert options_for(_graph(function, torch.ones(3)))["cpp_wrapper"] is from_cpp


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_number_of_threads_is_put_back(two_threads):
    def program(inputs):
        seen.append(torch.get_num_threads())
        return [1 / inputs[0]]

    seen = []
    run = on_one_thread(program)
    assert run([2]) == [0.5] and torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        run([0])
    assert torch.get_num_threads() == 2 and seen == [1, 1]


def test_with_one_thread_there_is_nothing_to_do():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    program = torch.sin
    try:
        assert on_one_thread(program) is program
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("donate", [(), "ps"])
def test_many_small_layers(two_threads, make_key, rng, same, donate):
    model = lt.Chain(*(lt.Dense(8, 8, "tanh") for _ in range(12)))
    ps, st = lt.setup(make_key(), model)
    ps, x = lt.ComponentVector(ps), torch.randn(4, 8, generator=rng)

    def step(ps):
        value, grads = lt.withgradient(lambda ps: model(x, ps, st)[0].square().sum(), ps)
        return value, ps - 0.1 * grads

    jitted = jit(step, donate=donate)
    other = lt.ComponentVector(ps.to_dict())
    for _ in range(3):
        (got, ps), (expected, other) = jitted(ps), step(other)
        same(got, expected, 1e-5)
    same(ps.flat, other.flat, 1e-5)
    assert "cpp_wrapper" in jitted.lower(ps).code or "AOTI" in jitted.lower(ps).code
    assert jitted.cache_info().misses == 1 and torch.get_num_threads() == 2


def _graph(function, x):
    leaves, spec = flatten(((x,), {}))
    return trace(lambda args, kwargs: function(*args), leaves, spec, {}).graph
