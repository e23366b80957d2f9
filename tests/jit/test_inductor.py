"""Compiled kernels give the same numbers; in the background too, and where there is no compiler replay does."""

from __future__ import annotations

import time

import pytest
import torch
from torch._inductor import config

import luxtorch as lt
from luxtorch import optim
from luxtorch.core import tensors
from luxtorch.jit import DonatedError, _compiled, _inductor, _toolchain, jit
from luxtorch.jit._flatten import flatten
from luxtorch.jit._trace import trace

from .conftest import train

pytestmark = pytest.mark.skipif(not _toolchain.has_compiler(), reason="no C++ compiler")

MODELS = {
    "dropout": lambda: lt.Chain(lt.Dense(3, 16), lt.Dropout(0.5), lt.Dense(16, 2)),
    "batchnorm": lambda: lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4), lt.Dense(4, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("donate", [(), "ts"], ids=["kept", "donated"])
@pytest.mark.parametrize(("model", "tree"), [("dropout", "dict"), ("batchnorm", "vector")])
def test_training(make_state, batch, same, model, tree, donate):
    jitted = jit(train, donate=donate, backend="inductor")
    ts = make_state(MODELS[model](), optim.Momentum(0.1, 0.9), tree=tree)
    other = torch.utils._pytree.tree_map(torch.clone, ts)
    for _ in range(3):
        (got, ts), (expected, other) = jitted(ts, batch), train(other, batch)
        same(got, expected)
    same(ts, other, 1e-4)
    assert jitted.cache_info().misses == 1


@pytest.mark.slow
def test_donated_memory_is_reused(batch):
    def step(ps, x):
        return {name: p - 0.1 * x.sum() for name, p in ps.items()}, x * 2

    ps = {"a": torch.ones(400, 300), "b": torch.zeros(800, 300)}
    places = {p.data_ptr() for p in ps.values()}
    jitted, first = jit(step, donate="ps", backend="inductor"), ps
    for _ in range(3):
        ps, _ = jitted(ps, batch[0])
        assert {p.data_ptr() for p in ps.values()} == places
    torch.testing.assert_close(ps["a"], torch.ones(400, 300) - 0.3 * batch[0].sum())
    with pytest.raises(DonatedError):
        first["a"].sum()


@pytest.mark.slow
def test_backward(batch):
    def function(w, x):
        return (x @ w).tanh().square().sum()

    grads, jitted = [], jit(function, backend="inductor")
    for f in (jitted, function):
        w = torch.ones(3, 2, requires_grad=True)
        f(w, batch[0]).backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_keys_that_are_closed_over(same):
    """They are constants of unsigned integers, and so is what is derived of them."""
    key = lt.random.key(3)

    def function(x):
        return x + lt.random.normal(key, (3,)), lt.random.fold_in(key, 1), lt.random.uniform(lt.random.key(0), (3,))

    same(jit(function, backend="inductor")(torch.ones(3)), function(torch.ones(3)))


@pytest.mark.slow
def test_dynamic(rng):
    jitted = jit(lambda x, w: (x @ w).relu().mean(0), dynamic="x", backend="inductor")
    w = torch.randn(4, 2, generator=rng)
    for n in (8, 9, 33, 64):
        x = torch.randn(n, 4, generator=rng)
        torch.testing.assert_close(jitted(x, w), (x @ w).relu().mean(0))
    assert jitted.cache_info().misses == 1


@pytest.mark.slow
def test_background(batch):
    jitted = jit(lambda x: {"y": x.sin() * 2, "x": x}, backend="inductor", background=True)
    x, began = batch[0], time.monotonic()
    while not jitted.lower(x).code and time.monotonic() < began + 120:
        torch.testing.assert_close(jitted(x)["y"], x.sin() * 2)
    assert "cpp" in jitted.lower(x).code
    torch.testing.assert_close(jitted(x)["y"], x.sin() * 2)
    assert jitted.cache_info().misses == 1


def test_when_the_compiled_program_takes_over_is_reported(batch, monkeypatch, caplog):
    waiting = []
    monkeypatch.setattr(_compiled, "Thread", lambda target, args, daemon: _Later(waiting, target, args))
    jitted = jit(torch.sin, backend="inductor", background=True)
    with caplog.at_level("INFO", logger="luxtorch.jit"):
        jitted(batch[0])
        assert jitted.compiling == 1 and not caplog.messages
        waiting.pop()()
    assert jitted.compiling == 0
    assert [message for message in caplog.messages if "takes over" in message]
    torch.testing.assert_close(jitted(batch[0]), batch[0].sin())


def test_background_failures_are_warned_of(batch, monkeypatch):
    def fails(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(_inductor, "compile_trace", fails)
    monkeypatch.setattr(_compiled, "Thread", _AtOnce)
    jitted = jit(torch.sin, backend="inductor", background=True)
    with pytest.warns(RuntimeWarning, match="in the background failed.*no luck"):
        jitted(batch[0])
    assert torch.equal(jitted(batch[0]), batch[0].sin()) and jitted.compiling == 0


def test_without_a_compiler_there_is_one_warning_and_a_replay(batch, monkeypatch):
    monkeypatch.setattr(_toolchain, "has_compiler", lambda: False)
    _compiled.default_backend.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
            got = jit(torch.sin)(batch[0])
        assert torch.equal(got, batch[0].sin())
        assert torch.equal(jit(torch.cos)(batch[0]), batch[0].cos())
    finally:
        _compiled.default_backend.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["forward", "gradient", "in a loop", "batch of matrices", "recorded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_biases_are_added_in_a_loop_of_their_own(rng, monkeypatch, form, dtype):
    """Except in half precision, where a product with a bias is rounded once."""
    monkeypatch.setattr(_inductor, "find", lambda key: None)  # what an earlier process has compiled
    before, after = [], []

    class Watched(type(_inductor.last_pass())):
        def __call__(self, graph):
            before.extend(str(node.target) for node in graph.nodes)
            super().__call__(graph)
            after.extend(str(node.target) for node in graph.nodes)

    monkeypatch.setattr(_inductor, "last_pass", Watched)
    w, b = (torch.randn(shape, generator=rng, dtype=torch.float64) / 3 for shape in ((8, 8), (8,)))
    x = torch.randn((3, 5, 8) if form == "batch of matrices" else (5, 8), generator=rng, dtype=torch.float64)

    def loss(w, b, x):
        if form == "in a loop":
            return lt.scan(lambda x, _: (torch.addmm(b, x, w).tanh(), None), x, length=3)[0].sum()
        return torch.nn.functional.linear(x, w.T, b).tanh().sum()

    def step(w, b, x):
        if form == "recorded":
            leaves = [leaf.detach().requires_grad_() for leaf in (w, b)]
            return torch.autograd.grad(jit(loss, backend="inductor")(*leaves, x), leaves)
        if form == "forward":
            return loss(w, b, x)
        return lt.gradient(lambda wb: loss(*wb, x), (w, b))

    run = step if form == "recorded" else jit(step, backend="inductor")
    with config.patch(force_disable_caches=True):
        got = run(w.to(dtype), b.to(dtype), x.to(dtype))

    def by_hand(w, b):
        y = x
        for _ in range(3 if form == "in a loop" else 1):
            y = ((y[..., :, None] * w).sum(-2) + b).tanh()
        return y.sum()

    expected = by_hand(w, b) if form == "forward" else torch.func.grad(by_hand, (0, 1))(w, b)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    if dtype is torch.bfloat16:
        assert before == after
    else:
        assert "aten.addmm.default" in before and "aten.addmm.default" not in after


@pytest.mark.parametrize("form", ["called", pytest.param("exported", marks=pytest.mark.slow)])
def test_a_pass_of_a_users_own_is_the_last(tmp_path, form):
    seen = []
    w, b, x = torch.ones(3, 3), torch.ones(3), torch.ones(2, 3)
    function = jit(torch.addmm, backend="inductor")
    with config.patch(post_grad_custom_post_pass=lambda graph: seen.append(graph)):
        if form == "exported":
            function = lt.load_jitted(function.export(tmp_path / "sum.pt2", b, x, w))
        torch.testing.assert_close(function(b, x, w), torch.full((2, 3), 4.0))
    assert len(seen) == 1


class _Later:
    """A thread that runs when the test says so."""

    def __init__(self, waiting, target, args):
        self.start = lambda: waiting.append(lambda: target(*args))


class _AtOnce:
    """A thread that runs when it is started."""

    def __init__(self, target, args, daemon):
        self.start = lambda: target(*args)


def convolve(ps, x):
    return torch.nn.functional.conv2d(x, ps, padding=1).relu()


def gradient(ps, x):
    return ps - lt.gradient(lambda ps: convolve(ps, x).square().mean(), ps)


@pytest.mark.parametrize(
    ("function", "options", "changes"),
    [
        (convolve, {}, True),
        (gradient, {}, False),
        (lambda ps, x: torch.func.vmap(gradient, (None, 0))(ps, x[:, None]), {}, False),
        (gradient, {"layout_optimization": True}, True),
    ],
    ids=["forward", "gradient", "gradients of samples", "chosen"],
)
def test_convolutions_keep_the_layout_of_their_inputs_where_there_are_gradients(function, options, changes):
    leaves, spec = flatten(((torch.ones(4, 3, 3, 3), torch.ones(2, 3, 8, 8)), {}))
    traced = trace(lambda args, kwargs: function(*args), leaves, spec, {})
    with _inductor.settings(traced, options):
        assert config.layout_optimization == changes


@pytest.mark.slow
@pytest.mark.parametrize("place", ["plain", "in a loop"])
def test_steps_of_convolutions_in_the_layout_that_they_have(place, rng, monkeypatch):
    ps, x = torch.randn(20, 16, 3, 3, generator=rng), torch.randn(2, 16, 9, 7, generator=rng)
    compile_graph, convolutions = _inductor.compile_graph, []

    def watched(graph, *args, **kwargs):
        if any("convolution_backward" in str(node.target) for node in graph.graph.nodes):
            convolutions.append(config.layout_optimization)
        return compile_graph(graph, *args, **kwargs)

    monkeypatch.setattr(_inductor, "compile_graph", watched)
    monkeypatch.setattr(_inductor, "find", lambda key: None)  # what an earlier process has compiled

    def steps(ps, x):
        if place == "plain":
            return gradient(gradient(ps, x), x)
        return lt.scan(lambda ps, _: (gradient(ps, x), None), ps, length=2)[0]

    torch.testing.assert_close(jit(steps, backend="inductor")(ps, x), gradient(gradient(ps, x), x))
    assert convolutions == [False]
