"""Loops inside of torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.core import tensors

F64 = torch.float64
C = torch.tensor([3.0, 4.0], dtype=F64)
XS = torch.arange(10.0, dtype=F64).reshape(5, 2) / 10


def scanned(x, xs):
    return lt.scan(
        lambda c, x: ({"h": (c["h"] * 0.5 + x * C).tanh(), "n": None}, {"y": c["h"]}),
        {"h": x, "n": None},
        xs,
        reverse=True,
    )


def counted(x, xs):
    return lt.scan(lambda c, x: ((c[0] + 1, (c[1] * C + x).sin()), c[0]), (torch.tensor(0), x), xs)


def drawn(x, xs):
    def step(carry, x):
        key, own = lt.random.split(carry[0])
        return (key, carry[1] * lt.random.uniform(own, (2,), dtype=F64) + x), carry[1]

    return lt.scan(step, (lt.random.key(1), x), xs)[1]


def branched(x, xs):
    return lt.cond(x.sum() > 0, lambda z: z * C * x.sin(), lambda z: z - C, x)


def switched(x, xs):
    return lt.switch(x.sum().long(), [lambda z: z * C, torch.sin, lambda z: z - 1, torch.cos], x)


def unlimited(x, xs):
    return lt.while_loop(lambda s: s[1].sum() < 100, lambda s: (s[0] + 1, s[1] * C), (torch.tensor(0), x))


def limited(x, xs):
    return lt.while_loop(lambda s: s[1].sum() < 100, lambda s: (s[0] + 1, s[1] * C), (torch.tensor(0), x), max_steps=6)


def numbers(x, xs):
    return lt.fori_loop(0, 4, lambda i, c: c * 0.5 + i, x)


def mapped(x, xs):
    return lt.map(lambda row: (row * x).sum(), xs, batch_size=2)


FUNCTIONS = {f.__name__: f for f in (scanned, counted, drawn, branched, switched, unlimited, limited, numbers, mapped)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name):
    f, x = FUNCTIONS[name], torch.tensor([1.0, 2.0], dtype=F64)
    torch.testing.assert_close(compiled(f)(x, XS), f(x, XS))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_export(name):
    f, x = FUNCTIONS[name], torch.tensor([1.0, 2.0], dtype=F64)

    class Module(torch.nn.Module):
        def forward(self, x, xs):
            return f(x, xs)

    program = torch.export.export(Module(), (x, XS))
    torch.testing.assert_close(program.module()(x, XS), f(x, XS))


def scalar(f):
    return lambda x: sum(leaf.sum() for leaf in tensors(f(x, XS)) if leaf.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "drawn"])
def test_gradients_on_the_tape(name):
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    f = scalar(FUNCTIONS[name])
    (got,) = torch.autograd.grad(compiled(f)(x), x)
    (expected,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(got, expected)


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("drawn", "unlimited")])
def test_transforms(name, transform):
    x = torch.tensor([1.0, 2.0], dtype=F64)
    f = TRANSFORMS[transform](scalar(FUNCTIONS[name]))
    torch.testing.assert_close(compiled(f)(x), f(x))


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_a_loop_of_unknown_length_is_not_transformed(transform):
    f = TRANSFORMS[transform](scalar(unlimited))
    with pytest.raises(Exception, match="max_steps"):
        compiled(f)(torch.tensor([1.0, 2.0], dtype=F64))


def test_a_scan_does_not_unroll():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    f = torch.compile(lambda x, xs: scanned(x, xs)[0]["h"], backend=backend, fullgraph=True)
    f(torch.ones(2, dtype=F64), torch.zeros(50, 2, dtype=F64))
    assert "higher_order.scan" in graphs[0].code and graphs[0].code.count("tanh") == 0
