"""The operators that loops compile to: how many, that their bodies are freed, by every backend."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import luxtorch as lt
from luxtorch.errors import LuxtorchError
from luxtorch.jit import _bodies
from luxtorch.jit._toolchain import has_compiler
from tests.loops.words import loop, replayed

compiled = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


def total(w, xs):
    carry, ys = lt.scan(lambda c, x: (torch.tanh(c @ w + x), c), torch.zeros(3), xs)
    return carry.sum() + ys.square().sum()


def power(w, xs):
    return lt.while_loop(lambda c: c.sum() < 100, lambda c: c * w.exp().sum(), xs.sum().abs() + 1)


def limited(w, xs):
    return lt.while_loop(lambda c: c.sum() < 100, lambda c: c * w.exp().sum(), xs.sum().abs() + 1, max_steps=9)


def branch(w, xs):
    return lt.cond(xs.sum() > 0, lambda a: (a @ w).sum(), lambda a: a.sin().sum() * w.sum(), xs)


@pytest.fixture
def given(rng):
    return torch.randn(3, 3, generator=rng) * 0.5, torch.randn(4, 3, generator=rng)


def calls(graph):
    return sum(graph.count(f"luxtorch.{name}.default(") for name in ("scan", "while_loop", "switch"))


def forward(f):
    return lambda w, xs: torch.func.jvp(f, (w, xs), (w.cos(), xs.cos()))[1]


TRANSFORMS = {
    "value": (lambda f: f, 1),
    "R": (torch.func.grad, 2),
    "F": (forward, 2),
    "V": (lambda f: lambda w, xs: torch.vmap(f, (0, None))(torch.stack([w, -w]), xs), 1),
    "VR": (lambda f: lambda w, xs: torch.vmap(torch.func.grad(f), (0, None))(torch.stack([w, -w]), xs), 2),
    "RR": (torch.func.hessian, 4),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_number_of_operators_does_not_depend_on_the_length(name, given):
    transform, most = TRANSFORMS[name]
    f = lt.jit(transform(total), backend="replay")
    short, long = (f.lower(given[0], torch.zeros(n, 3)).graph for n in (2, 50))
    assert 1 <= calls(short) == calls(long) <= most
    assert short.count("\n") == long.count("\n")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("f", [total, limited, branch], ids=lambda f: f.__name__)
def test_bodies_are_freed_with_the_function(f, given):
    gc.collect()
    before = _bodies.in_table()
    jitted = lt.jit(torch.func.grad(f), backend="replay")
    jitted(*given)
    assert _bodies.in_table() > before
    for _ in range(3):
        jitted(*given)
    during = _bodies.in_table()
    jitted.cache_clear()
    jitted(*given)
    gc.collect()
    assert _bodies.in_table() == during
    del jitted
    gc.collect()
    assert _bodies.in_table() == before


def test_a_function_is_traced_a_few_times_whatever_the_length(given):
    count = 0

    def step(c, x):
        nonlocal count
        count += 1
        return torch.tanh(c @ given[0] + x), None

    jitted = lt.jit(torch.func.grad(lambda xs: lt.scan(step, xs[0], xs)[0].sum()), backend="replay")
    jitted(torch.zeros(40, 3))
    assert count <= 4
    jitted(torch.zeros(40, 3))
    assert count <= 4


def test_a_module_of_make_fx_keeps_its_bodies(given):
    module = make_fx(total, tracing_mode="fake")(*given)
    gc.collect()
    torch.testing.assert_close(module(*given), total(*given))
    with pytest.raises(LuxtorchError, match="gone"):
        _bodies.body_named("nothing")


@pytest.mark.slow
@compiled
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check`:FutureWarning")  # by torch, for its hessian
@pytest.mark.parametrize("name", ["value", "R", "VR", "RR"])
@pytest.mark.parametrize("f", [total, limited, branch], ids=lambda f: f.__name__)
def test_inductor(f, name, given):
    transform, _ = TRANSFORMS[name]
    got = lt.jit(transform(f), backend="inductor")(*given)
    torch.testing.assert_close(got, transform(f)(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("name", ["value", "F", "V"])
def test_inductor_runs_a_loop_of_unknown_length(name, given):
    transform, _ = TRANSFORMS[name]
    got = lt.jit(transform(power), backend="inductor")(*given)
    torch.testing.assert_close(got, transform(power)(*given), rtol=1e-4, atol=1e-5)


BODIES = {
    "exchanged": lambda c, x: ((c[1], c[0] + x), c[0]),
    "the element": lambda c, x: ((x, x.flip(0)), {"x": x, "c": c}),
    "a product": lambda c, x: (c, torch.outer(c[0], x) @ c[1]),
    "views": lambda c, x: ((c[1], x[:1].expand(3)), (x[1:], c[0].expand(2, 3).t())),
    "other dtypes": lambda c, x: ((c[0], c[0]), (x * 1j, x.bfloat16(), x > 0, torch.argsort(c[0] * x))),
}


@pytest.mark.slow
@compiled
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_inductor_reads_and_writes_sequences_in_place(given):
    """What a step takes and returns may be one another, or parts of one another; the length and direction are any."""
    w, xs = given

    def f(w, xs):
        return {
            (name, n, reverse): lt.scan(body, (w[0], w[1]), xs[:n], reverse=reverse)
            for name, body in BODIES.items()
            for n, reverse in ((0, False), (1, True), (4, False), (4, True))
        }

    torch.testing.assert_close(lt.jit(f, backend="inductor")(w, xs), f(w, xs))


@pytest.mark.slow
@compiled
def test_inductor_on_the_tape(given):
    w = given[0].requires_grad_()
    (got,) = torch.autograd.grad(lt.jit(total)(w, given[1]), w)
    (expected,) = torch.autograd.grad(total(w, given[1]), w)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_dynamic_length_has_one_graph(given):
    jitted = lt.jit(torch.func.grad(total), backend="replay", dynamic={"xs": (0,)})
    for n in (3, 4, 7):
        xs = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(jitted(given[0], xs), torch.func.grad(total)(given[0], xs))
    assert jitted.cache_info().misses == 1


def test_donation(given):
    def f(state, xs):
        return {"c": lt.scan(lambda c, x: (torch.tanh(c + x), None), state["c"], xs)[0]}

    jitted = lt.jit(f, backend="replay", donate="state")
    state = {"c": torch.ones(3)}
    expected = f(f(state, given[1]), given[1])
    torch.testing.assert_close(jitted(jitted({"c": torch.ones(3)}, given[1]), given[1]), expected)


def test_the_backward_pass_computes_no_step_again(given):
    """What the derivative of a step needs is saved, so that `exp` and `tanh` are in the forward body alone."""

    def operators(**options):
        def g(w, xs):
            step = lambda c, x: (torch.tanh(torch.exp(c @ w) + x), None)  # noqa: E731
            return lt.scan(step, torch.zeros(3), xs, **options)[0].sum()

        jitted = lt.jit(torch.func.grad(g), backend="replay")
        names = re.findall(r"scan\.default\('(\w+)'", jitted.lower(*given).graph)
        bodies = [_bodies.body_named(name).graph.code for name in names]
        return [body.count("aten.tanh.default") for body in bodies]

    assert operators() == [1, 0]
    assert operators(checkpoint=True) == [1, 1]


HOLDERS = {
    "vector": lambda v: v,
    "vector in a dict": lambda v: {"p": v}["p"],
    "dict of groups": lambda v: {"cell": v["cell"]},
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_vector_that_is_closed_over_costs_what_a_dict_costs(holder, make_key):
    """The gradient of each component is added up by itself; that of the vector is put together after the loop."""
    cell = lt.GRUCell(3, 3)
    ps = {"cell": lt.initial_parameters(make_key(), cell), "other": torch.ones(50)}
    xs = torch.ones(4, 2, 3)

    def loss(ps):
        def step(carry, x):
            (y, carry), _ = cell((x, carry), ps["cell"], {})
            return carry, y

        return lt.scan(step, (torch.ones(2, 3),), xs)[1].sum()

    def operators(given, hold):
        graph = lt.jit(torch.func.grad(lambda ps: loss(hold(ps))), backend="replay").lower(given).graph
        names = re.findall(r"scan\.default\('(\w+)'", graph)
        return [sorted(re.findall(r"torch\.ops\.(\S+)\(", _bodies.body_named(name).graph.code)) for name in names]

    assert operators(lt.ComponentVector(ps), HOLDERS[holder]) == operators(ps, lambda ps: ps)


@pytest.mark.parametrize("how", ["tape in grad", "pullback later", "jvp of a pullback"])
def test_a_derivative_that_comes_later_is_right(how, given):
    """Where nobody could know that there will be a second derivative, what was saved for the first is not enough."""
    w, xs = given[0].double(), given[1].double()

    def f(scan):
        def loss(w):
            h, ys = scan(lambda c, x: (torch.tanh(c @ w + x), c * c), torch.zeros(3, dtype=w.dtype), xs)
            return h.square().sum() + ys.sum()

        def taped(w):
            (slope,) = torch.autograd.grad(loss(w), w, create_graph=True)
            return (slope * slope.cos()).sum()

        def later(w):
            _, pull = torch.func.vjp(loss, w)
            return torch.func.grad(lambda u: (pull(u)[0] ** 2).sum())(torch.ones((), dtype=w.dtype))

        def tangent(w):
            _, pull = torch.func.vjp(loss, w)
            one = torch.ones((), dtype=w.dtype)
            return torch.func.jvp(lambda u: (pull(u)[0] ** 2).sum(), (one,), (one,))[1]

        return {"tape in grad": torch.func.grad(taped), "pullback later": later, "jvp of a pullback": tangent}[how]

    got = lt.jit(f(lt.scan), backend="replay")(w)
    torch.testing.assert_close(got, f(loop)(w))


LOOPS = {
    "scan": lambda f, x: lt.scan(lambda c, _: (f(c), None), x, length=3)[0],
    "fori_loop": lambda f, x: lt.fori_loop(0, 3, lambda i, c: f(c), x),
    "while_loop": lambda f, x: lt.while_loop(lambda c: c.sum() < 1e9, f, x, max_steps=3),
    "cond": lambda f, x: lt.cond(x.sum() > 0, f, lambda c: c, x),
    "switch": lambda f, x: lt.switch((x.sum() > 0).long(), [f, f], x),
    "map": lambda f, x: lt.map(f, torch.stack([x, 2 * x])),
}
TRANSFORMED = {
    "value": lambda f: f,
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack([x, x + 1])),
}


def recorded(f, x):
    """A derivative by a graph that is recorded now."""
    _, back = torch.func.vjp(f, x)
    return lambda c: back(c)[0]


def inside(f, x):
    """The same, recorded in each call."""
    return lambda c: torch.func.vjp(f, x)[1](c)[0]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("transform", TRANSFORMED)
def test_a_graph_from_outside_is_refused_and_one_from_inside_is_right(loop, transform, rng):
    w, x = (torch.rand(shape, generator=rng, dtype=torch.float64) for shape in ((3, 3), (3,)))

    def run(derivative):
        return TRANSFORMED[transform](lambda x: LOOPS[loop](derivative(lambda x: torch.tanh(w @ x) * x, x), x))

    torch.testing.assert_close(replayed(run(inside))(x), run(inside)(x))
    torch.testing.assert_close(run(recorded)(x), run(inside)(x))
    with pytest.raises(lt.InputError, match="must not differentiate what was computed outside"):
        replayed(run(recorded))(x)


def by_scan(p):
    return lt.scan(lambda h, x: (torch.tanh(h * p()["a"]["w"] + p()["b"]), None), torch.ones(3), torch.ones(4, 3))[0]


def by_while_loop(p):
    start = torch.tensor(0), torch.ones(3)
    body = lambda c: (c[0] + 1, torch.tanh(c[1] * p()["a"]["w"] + p()["b"]))  # noqa: E731
    return lt.while_loop(lambda c: c[0] < 4, body, start, max_steps=4)[1]


def by_cond(p):
    return lt.cond(torch.tensor(True), lambda: p()["a"]["w"] * p()["b"], lambda: p()["b"])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("loop", [by_scan, by_while_loop, by_cond])
@pytest.mark.parametrize("group", ["whole", "group", "group in a dict"])
def test_a_body_may_close_over_a_vector_and_its_groups_which_are_used_again_after_it(loop, group):
    """A vector keeps its components: those that a body has read are not to be found outside of it, nor the reverse."""

    def f(v):
        p = {"whole": v, "group": v["p"], "group in a dict": {"p": v["p"]}}[group]
        parts = (lambda: p) if group == "group" else (lambda: p["p"])
        return (loop(parts) * parts()["a"]["w"]).sum() + loop(parts).sum() + parts()["b"].sum()

    v = lt.ComponentVector({"p": {"a": {"w": torch.tensor([0.5, 1.0, -2.0])}, "b": torch.ones(3)}, "q": torch.ones(2)})
    torch.testing.assert_close(lt.jit(f, backend="replay")(v), f(v))
    grad = torch.func.grad(f)
    torch.testing.assert_close(lt.jit(grad, backend="replay")(v).flat, grad(v).flat)
