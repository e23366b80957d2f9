"""A function that is traced once for each kind of arguments gives the graph that it would give without."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.optim import _leafwise
from luxtorch.optim._leafwise import traced_once

TABLE = torch.arange(6.0).reshape(2, 3)


def two(x: Tensor, y: Tensor) -> Any:
    return {"sum": x + y, "given": x, "product": [(x * y).sin()]}


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "several results": two,
    "an argument": lambda x, y: x,
    "a view of an argument": lambda x, y: x.t(),
    "views of one result": lambda x, y: (x @ y.t()).unbind(),
    "one result twice": lambda x, y: [x + y] * 2,
    "a result of several": lambda x, y: x.max(1),
    "a write inside": lambda x, y: x.clone().mul_(y),
    "a constant": lambda x, y: x * TABLE + y,
    "a number that is made": lambda x, y: x + torch.ones(()) * y,
    "a number": lambda x, y: (x + y, 3, None, "text"),
    "shapes": lambda x, y: x.reshape(-1)[: x.shape[1]] + y[0],
    "numbers of another dtype": lambda x, y: (x.to(torch.float64) + y, x > y),
    "the imaginary part": lambda x, y: torch.complex(x, y).conj(),
    "a gradient": lambda x, y: lt.gradient(lambda x: (x * y).sin().sum(), x),
    "a random number": lambda x, y: x + lt.random.normal(lt.random.key(0), x.shape) * y,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("place", ["plain", "in vmap", "in grad"])
def test_the_graph_and_its_numbers_are_those_without(name, place, rng):
    function = FUNCTIONS[name]
    xs = [torch.randn(2, 3, generator=rng) for _ in range(6)]

    def repeated(wrap: Any) -> Callable[..., Any]:
        def run(*xs: Tensor) -> Any:
            one = wrap(function)
            results = [one(x, y) for x, y in zip(xs[::2], xs[1::2], strict=True)]
            return [leaf for leaf in torch.utils._pytree.tree_leaves(results) if isinstance(leaf, Tensor)]

        def summed(*xs: Tensor) -> Tensor:
            return sum(leaf.real.double().square().sum() for leaf in run(*xs))  # type: ignore[return-value]

        if place == "in vmap":
            return torch.func.vmap(run)
        return torch.func.grad(summed, argnums=tuple(range(6))) if place == "in grad" else run

    if place == "in vmap":
        xs = [torch.stack([x, x + 1]) for x in xs]
    plain = make_fx(repeated(lambda function: function), tracing_mode="fake", _allow_non_fake_inputs=True)(*xs)
    once = make_fx(repeated(traced_once), tracing_mode="fake", _allow_non_fake_inputs=True)(*xs)
    assert once.code == plain.code
    for got, expected in zip(once(*xs), plain(*xs), strict=True):
        assert torch.equal(got, expected)


def test_each_kind_is_traced_once():
    calls = []

    def function(x: Tensor, scale: float) -> Tensor:
        calls.append(x.shape)
        return x.sin() * scale

    kinds = [torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 2), torch.ones(2, 2).t()]
    kinds += [torch.ones(4)[1:3], torch.ones(1).expand(2)]

    def run(*xs: Tensor) -> list[Tensor]:
        once = traced_once(function)
        return [once(x, scale) for _ in range(3) for scale in (2.0, 3.0) for x in xs]

    graph = make_fx(run, tracing_mode="fake")(*kinds)
    assert len(calls) == 2 * len(kinds)
    for got, expected in zip(graph(*kinds), run(*kinds), strict=True):
        assert torch.equal(got, expected)


def test_the_same_tensor_twice_is_another_kind():
    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        once = traced_once(lambda x, y: x - 2 * y)
        return [once(x, y), once(x, x), once(y, x), once(y, y)]

    x, y = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    graph = make_fx(run, tracing_mode="fake")(x, y)
    for got, expected in zip(graph(x, y), [x - 2 * y, -x, y - 2 * x, -y], strict=True):
        assert torch.equal(got, expected)


def test_outside_of_traces_the_function_runs():
    calls = []
    once = traced_once(lambda x: calls.append(x) or x + 1)
    for i in range(3):
        assert once(torch.tensor(float(i))) == i + 1
    assert len(calls) == 3


def test_symbolic_sizes_are_traced_each_time():
    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        once = traced_once(lambda x: x * x.shape[0])
        return [once(x), once(y)]

    graph = make_fx(run, tracing_mode="symbolic")(torch.ones(3), torch.ones(3))
    assert [tensor.tolist() for tensor in graph(torch.ones(2), torch.ones(2))] == [[2.0, 2.0]] * 2


def test_torch_compile_takes_it():
    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        once = traced_once(lambda x: x.sin() + 1)
        return [once(x), once(y)]

    x, y = torch.ones(2), torch.zeros(2)
    for got, expected in zip(torch.compile(run, backend="aot_eager", fullgraph=True)(x, y), run(x, y), strict=True):
        assert torch.equal(got, expected)


RULES = {
    name: rule
    for name, rule in vars(optim).items()
    if inspect.isclass(rule) and issubclass(rule, optim.LeafwiseRule) and rule is not optim.LeafwiseRule
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.complex64, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_training_step_is_traced_as_without(name, dtype, rng, monkeypatch):
    rule = RULES[name]()
    if dtype.is_complex and not rule.takes_complex():
        pytest.skip("it does not take complex parameters")
    ps = {f"leaf_{i}": torch.randn(3, 2 + i % 2, generator=rng).to(dtype) for i in range(4)}
    opt_state = optim.setup(rule, ps)

    def step(opt_state: Any, ps: Any) -> Any:
        def loss(ps: Any) -> Tensor:
            return sum(p.abs().float().pow(3).sum() for p in ps.values())  # type: ignore[return-value]

        return optim.update(opt_state, ps, lt.gradient(loss, ps))

    once = lt.jit(step, backend="replay").lower(opt_state, ps).graph
    monkeypatch.setattr(_leafwise, "traced_once", lambda function: function)
    assert once == lt.jit(step, backend="replay").lower(opt_state, ps).graph


def test_the_formula_runs_once_for_equal_parameters(monkeypatch):
    calls = []

    class Counted(optim.Adam):
        def delta(self, *args: Any) -> Any:
            calls.append(1)
            return super().delta(*args)

    model = lt.Chain(*[lt.Dense(4, 4) for _ in range(8)])
    ps, st = lt.setup(0, model)
    ts = training.TrainState(model, ps, st, Counted(0.1))
    batch = torch.ones(2, 4), torch.zeros(2, 4)

    def step(ts: Any) -> Any:
        return training.single_train_step(lt.losses.MSELoss(), batch, ts)[3]

    got = lt.jit(step, backend="replay")(ts)
    assert len(calls) <= 4  # weights and biases, before the first layers' and after
    pairs = zip(*(torch.utils._pytree.tree_leaves(state.parameters) for state in (got, step(ts))), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
