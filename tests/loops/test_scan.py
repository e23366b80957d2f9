"""`lt.scan`: what it takes, edge cases, and errors that name the leaf; eager, and as an operator."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.errors import DTypeError, InputError, LuxtorchError, TracingError
from tests.loops.words import F64, HOW, eager, loop


@pytest.mark.sampled(3)
@HOW
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"unroll": 2}, {"checkpoint": True}, {"checkpoint": 2}, {"unroll": 7}])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), F64, torch.complex64, torch.bfloat16]
)
def test_values_and_gradients(how, n, reverse, options, dtype, rng):
    xs, w = torch.randn(n, 3, generator=rng).to(dtype), torch.randn(3, 3, generator=rng).to(dtype)

    def make(scan, **options):
        def f(w, xs):
            carry, ys = scan(lambda c, x: (torch.tanh(c @ w + x), c * x), torch.ones_like(w[0]), xs, **options)
            return (carry.sum() + (ys * ys).sum()).abs().sum(), (carry, ys)

        return lambda w, xs: torch.func.grad_and_value(f, (0, 1), has_aux=True)(w, xs)

    got = how(make(lt.scan, reverse=reverse, **options))(w, xs)
    expected = make(loop, reverse=reverse)(w, xs)
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(got, expected, **tolerance)


@HOW
def test_eager_and_replayed_values_are_those_of_the_loop_bit_for_bit(how, rng):
    xs, w = torch.randn(6, 3, generator=rng), torch.randn(3, 3, generator=rng)
    f = lambda scan: lambda w, xs: scan(lambda c, x: (torch.tanh(c @ w + x), c), torch.zeros(3), xs)  # noqa: E731
    for got, expected in zip(how(f(lt.scan))(w, xs), f(loop)(w, xs), strict=True):
        assert torch.equal(got, expected)


@HOW
@pytest.mark.parametrize("reverse", [False, True])
def test_an_empty_sequence(how, reverse):
    def f(c, xs):
        return lt.scan(lambda c, x: (c + x.sum(), {"y": x * c, "none": None}), c, xs, reverse=reverse)

    carry, ys = how(f)(torch.tensor(2.0), torch.zeros(0, 3))
    assert carry == 2 and ys["y"].shape == (0, 3) and ys["none"] is None
    slope = how(torch.func.grad(lambda c, xs: f(c, xs)[0] * 3))(torch.tensor(2.0), torch.zeros(0, 3))
    assert slope == 3


@HOW
def test_a_carry_without_numbers_and_one_without_leaves(how):
    xs = torch.arange(6.0).reshape(3, 2)
    carry, ys = how(lambda c, xs: lt.scan(lambda c, x: (c, x.sum()), c, xs))(torch.zeros(0, 2), xs)
    assert carry.shape == (0, 2) and ys.tolist() == [1, 5, 9]
    carry, ys = how(lambda xs: lt.scan(lambda c, x: (c, x.sum()), {"a": None, "b": ()}, xs))(xs)
    assert carry == {"a": None, "b": ()} and ys.tolist() == [1, 5, 9]


@HOW
def test_numbers_and_modes_in_the_carry_stay_what_they_are(how):
    state = lt.setup(0, lt.Dropout(0.5))[1]
    init = {"n": 3, "st": state, "x": torch.ones(2)}
    carry, _ = how(lambda x: lt.scan(lambda c, _: (c | {"x": c["x"] * c["n"]}, None), init | {"x": x}, length=2))(
        init["x"]
    )
    assert carry["n"] == 3 and carry["x"].tolist() == [9, 9]
    assert lt.core.tensors(carry["st"])[0].equal(lt.core.tensors(state)[0])


@HOW
def test_states_of_dropout_are_the_carry(how, make_key):
    model = lt.Chain(lt.Dense(3, 3, torch.tanh), lt.Dropout(0.5))
    ps, st = lt.setup(make_key(), model)
    xs = lt.random.normal(make_key(), (5, 3))

    def f(scan):
        def loss(ps, st, xs):
            def step(st, x):
                y, st = model(x, ps, st)
                return st, y

            st, ys = scan(step, st, xs)
            return ys.square().sum(), (st, ys)

        return lambda ps, st, xs: torch.func.grad(loss, has_aux=True)(ps, st, xs)

    got, expected = how(f(lt.scan))(ps, st, xs), f(_with_modes)(ps, st, xs)
    for one, other in zip(lt.core.tensors(got), lt.core.tensors(expected), strict=True):
        torch.testing.assert_close(one, other)
    assert not got[1][1][0].equal(got[1][1][1])


def _with_modes(f, init, xs):
    carry, ys = init, []
    for x in xs:
        carry, y = f(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


@HOW
def test_what_is_closed_over_and_scanned_at_once_is_two_things(how, rng):
    x = torch.randn(3, 3, generator=rng, dtype=F64)

    def f(scan):
        return lambda x: scan(lambda c, row: (torch.sin(c @ x + row * x[0]), None), x[1], x)[0].sum()

    for transform in (eager, torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(how(transform(f(lt.scan)))(x), transform(f(_with_none))(x))


def _with_none(f, init, xs):
    carry = init
    for x in xs:
        carry, _ = f(carry, x)
    return carry, None


@HOW
def test_a_body_may_differentiate_what_it_closes_over(how, rng):
    """An inner loop of gradient steps, differentiated by what it began with, and by a rate."""
    w, xs = torch.randn(3, generator=rng, dtype=F64), torch.randn(4, 3, generator=rng, dtype=F64)

    def f(scan):
        def outer(theta):
            def loss(w, x):
                return (torch.tanh(w * theta["w"]) * x).sum().square()

            def step(w, x):
                slope = lt.gradient(lambda w: loss(w, x), w)
                return w - theta["rate"] * slope + lt.gradient(lambda v: loss(v, x), theta["w"]), None

            return scan(step, theta["w"], xs)[0].square().sum()

        return outer

    theta = {"w": w, "rate": torch.tensor(0.1, dtype=F64)}
    for transform in (lt.gradient, torch.vmap):
        batch = {"w": torch.stack([w, 2 * w]), "rate": torch.tensor([0.1, 0.2], dtype=F64)}
        if transform is torch.vmap:
            got, expected = (
                how(torch.vmap(torch.func.grad(f(lt.scan))))(batch),
                torch.vmap(torch.func.grad(f(_with_none)))(batch),
            )
        else:
            got, expected = how(lambda t: lt.gradient(f(lt.scan), t))(theta), lt.gradient(f(_with_none), theta)
        torch.testing.assert_close(got, expected)


@HOW
def test_a_function_with_a_backward_of_its_own_keeps_it(how, rng):
    class Double(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, w):
            return x * w

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return 10 * g * w, 100 * g * x

    w = torch.tensor(2.0)

    def step(w):
        return lambda c, _: (Double.apply(c, w).detach() + Double.apply(c, w), None)

    got = how(torch.func.grad(lambda w: lt.scan(step(w), torch.ones(()), length=2)[0]))(w)
    assert got == torch.func.grad(lambda w: _with_none(step(w), torch.ones(()), [0, 0])[0])(w)


@HOW
def test_no_grad_inside_of_a_body_counts(how):
    def step(c, x):
        with torch.no_grad():
            scale = c.sin()
        return c * scale + x, None

    xs = torch.arange(3.0, dtype=F64)
    c = torch.tensor(0.3, dtype=F64)
    got = how(torch.func.grad(lambda c: lt.scan(step, c, xs)[0]))(c)
    torch.testing.assert_close(got, torch.func.grad(lambda c: _with_none(step, c, xs)[0])(c))


def test_autocast_is_that_of_the_call(rng):
    w, xs = torch.randn(3, 3, generator=rng), torch.randn(4, 3, generator=rng)

    def loss(scan):
        def f(w):
            with torch.autocast("cpu", torch.bfloat16):
                return scan(lambda c, x: ((c @ w).float() + x, None), torch.ones(3), xs)[0].sum()

        return f

    got = lt.jit(torch.func.grad(loss(lt.scan)), backend="replay")(w)
    torch.testing.assert_close(got, torch.func.grad(loss(_with_none))(w), rtol=2e-2, atol=2e-2)
    f32 = torch.func.grad(lambda w: _with_none(lambda c, x: (c @ w + x, None), torch.ones(3), xs)[0].sum())(w)
    assert not torch.allclose(got, f32, rtol=1e-5)


def test_the_tape_goes_through_a_jitted_scan(rng):
    w, xs = torch.randn(3, 3, generator=rng, requires_grad=True), torch.randn(4, 3, generator=rng)
    f = lambda scan: lambda w: scan(lambda c, x: ((c @ w).tanh() + x, c), torch.ones(3), xs)[1].square().sum()  # noqa: E731
    (got,) = torch.autograd.grad(lt.jit(f(lt.scan), backend="replay")(w), w)
    (eager,) = torch.autograd.grad(f(lt.scan)(w), w)
    (expected,) = torch.autograd.grad(f(loop)(w), w)
    torch.testing.assert_close(got, expected)
    assert torch.equal(eager, expected)


def test_eager_code_prints_and_stops_as_a_loop_does():
    seen = []

    def step(c, x):
        seen.append(float(x))
        return c + x, None

    lt.scan(step, torch.tensor(0.0), torch.tensor([1.0, 2.0]))
    assert seen == [1, 2]


@pytest.mark.parametrize("checkpoint", [True, 2])
def test_checkpoints_of_the_tape(checkpoint, rng):
    w, xs = torch.randn(3, 3, generator=rng, requires_grad=True), torch.randn(5, 3, generator=rng)
    calls = []

    def f(scan, **options):
        def step(c, x):
            calls.append(1)
            return (c @ w).tanh() + x, c

        return scan(step, torch.ones(3), xs, **options)[1].square().sum()

    (got,) = torch.autograd.grad(f(lt.scan, checkpoint=checkpoint), w)
    (expected,) = torch.autograd.grad(f(loop), w)
    torch.testing.assert_close(got, expected)


# Errors.

X = torch.ones(3, 2)
BAD = {
    "structure": (lambda: lt.scan(lambda c, x: ({"b": x}, None), {"a": X[0]}, X), InputError, "structure"),
    "shape": (
        lambda: lt.scan(lambda c, x: ({"a": {"h": x.sum()}}, None), {"a": {"h": X[0]}}, X),
        InputError,
        "carry.a.h",
    ),
    "dtype": (lambda: lt.scan(lambda c, x: ([c[0].double()], None), [X[0]], X), DTypeError, "carry.0"),
    "number": (lambda: lt.scan(lambda c, x: ((c[0] + 1, c[1]), None), (0, X[0]), X), DTypeError, "carry.0"),
    "number to tensor": (lambda: lt.scan(lambda c, x: (x.sum(), None), 0, X), DTypeError, "carry"),
    "no pair": (lambda: lt.scan(lambda c, x: c, X[0], X), InputError, "pair"),
    "result": (lambda: lt.scan(lambda c, x: (c, {"n": 1.5}), X[0], X), DTypeError, "y.n"),
    "lengths": (lambda: lt.scan(lambda c, x: (c, None), X[0], {"a": X, "b": {"c": X[:2]}}), InputError, "xs.b.c"),
    "another length": (lambda: lt.scan(lambda c, x: (c, None), X[0], X, length=4), InputError, "4"),
    "no length": (lambda: lt.scan(lambda c, x: (c, None), X[0]), InputError, "length"),
    "no dimension": (lambda: lt.scan(lambda c, x: (c, None), X[0], {"a": X, "b": X.sum()}), InputError, "xs.b"),
    "negative": (lambda: lt.scan(lambda c, x: (c, None), X[0], length=-1), InputError, "length"),
    "a float": (lambda: lt.scan(lambda c, x: (c, None), X[0], length=1.5), DTypeError, "length"),
    "no function": (lambda: lt.scan(None, X[0], X), DTypeError, "f must be"),
    "unroll": (lambda: lt.scan(lambda c, x: (c, None), X[0], X, unroll=0), InputError, "unroll"),
    "checkpoint": (lambda: lt.scan(lambda c, x: (c, None), X[0], X, checkpoint=0), InputError, "checkpoint"),
}


@HOW
@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_place(how, case):
    call, kind, text = BAD[case]
    with pytest.raises(kind, match=text) as caught:
        how(lambda one: (call(), one)[1])(torch.ones(()))
    assert isinstance(caught.value, LuxtorchError)


@pytest.mark.parametrize("case", ["argument of the function", "made before", "constant", "element", "carry"])
def test_writes_into_what_is_closed_over_are_refused(case):
    constant = torch.zeros(2)

    def f(given, xs):
        made = given * 2

        def step(c, x):
            target = {
                "argument of the function": given,
                "made before": made,
                "constant": constant,
                "element": x,
                "carry": c,
            }
            target[case].add_(1)
            return c + x, None

        return lt.scan(step, xs[0], xs)[0]

    with pytest.raises(TracingError, match=r"test_scan\.py:\d+: .* in place") as caught:
        lt.jit(f, backend="replay")(torch.ones(2), X)
    assert caught.value.fix


def test_a_body_may_write_into_what_it_makes():
    def step(c, x):
        made = c.clone()
        made.add_(x)
        mask = torch.zeros(2)
        mask[0] = 1
        return made * mask, None

    assert lt.jit(lambda xs: lt.scan(step, xs[0], xs)[0], backend="replay")(X).tolist() == [4, 0]


def test_a_tensor_that_requires_grad_is_no_constant():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match="requires grad"):
        lt.jit(lambda xs: lt.scan(lambda c, x: (c * w, None), xs[0], xs)[0], backend="replay")(X)
