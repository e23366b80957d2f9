"""A jitted function returns what the function returns."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import optim
from luxtorch.jit import jit

from .conftest import stub, train

RULES = {
    "Descent": optim.Descent(0.1),
    "Nesterov": optim.Nesterov(0.1, 0.9),
    "Adam": optim.Adam(0.01),
    "AdamW": optim.AdamW(0.01),
    "RAdam": optim.RAdam(0.01),
    "Lion": optim.Lion(0.01),
    "RMSProp": optim.RMSProp(0.01),
    "clipped": optim.OptimiserChain(optim.ClipNorm(0.1), optim.Adam(0.01)),
    "scheduled": optim.Adam(optim.cosine(0.1, 0.01, 5)),
}

MODELS = {
    "batchnorm": lambda: lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4), lt.Dense(4, 2)),
    "dropout": lambda: lt.Chain(lt.Dense(3, 16), lt.Dropout(0.5), lt.Dense(16, 2)),
    "layernorm": lambda: lt.Chain(lt.Dense(3, 4), lt.LayerNorm((4,)), lt.Dense(4, 2, torch.nn.functional.gelu)),
    "lstm": lambda: lt.Chain(
        lt.WrappedFunction(lambda x: x.unsqueeze(-1)), lt.Recurrence(lt.LSTMCell(1, 4)), lt.Dense(4, 2)
    ),
    "attention": lambda: lt.Chain(
        lt.WrappedFunction(lambda x: x.unsqueeze(1).expand(-1, 3, -1)),
        lt.Dense(3, 8),
        lt.WrappedFunction(_attend),
        lt.Dense(8, 2),
    ),
}


def _attend(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x).mean(1)


@pytest.mark.parametrize("tree", ["dict", "vector"])
@pytest.mark.parametrize("rule", RULES)
def test_training_steps(make_state, batch, same, rule, tree):
    jitted = jit(train, backend="replay")
    ts = other = make_state(rule=RULES[rule], tree=tree)
    for _ in range(3):
        (got, ts), (expected, other) = jitted(ts, batch), train(other, batch)
        same(got, expected)
    same(ts, other, 1e-4)
    assert jitted.cache_info().misses == 1 and ts.step == 3


@pytest.mark.parametrize("backend", ["replay", stub], ids=["replay", "stub"])
@pytest.mark.parametrize("tree", ["dict", "vector"])
@pytest.mark.parametrize("model", MODELS)
def test_models(make_state, batch, same, model, tree, backend):
    jitted = jit(train, backend=backend)
    ts = other = make_state(MODELS[model](), optim.Descent(0.1), tree=tree)
    for _ in range(3):
        (got, ts), (expected, other) = jitted(ts, batch), train(other, batch)
        same(got, expected)
    same(ts, other, 1e-4)
    assert jitted.cache_info().misses == 1


def _loss(ps, x):
    return (torch.tanh(x @ ps["w"]) ** 2).sum()


FUNCTIONS = {
    "gradient": lambda ps, x: torch.func.grad_and_value(_loss)(ps, x),
    "hessian": lambda ps, x: torch.func.hessian(_loss)(ps, x),
    "forward": lambda ps, x: torch.func.jvp(lambda ps: _loss(ps, x), (ps,), (ps,)),
    "per sample": lambda ps, x: torch.vmap(torch.func.grad(_loss), in_dims=(None, 0))(ps, x),
    "lux": lambda ps, x: lt.withgradient(lambda ps: _loss(ps, x), ps),
    "draws": lambda ps, x: lt.random.normal(lt.random.fold_in(lt.random.key(0), 3), (4,)) + x.sum(),
    "batched draws": lambda ps, x: torch.vmap(lambda k: lt.random.uniform(k, (2,)))(
        lt.random.split(lt.random.key(1), 3)
    ),
    "in place inside": lambda ps, x: torch.zeros(3, 2).add_(1).index_add_(0, torch.tensor([0, 2]), x[:2, :2]).mul_(2),
    "views": lambda ps, x: (x.T, x[1:], ps["w"].view(-1), x.split([3, 5])),
    "arguments": lambda ps, x: {"x": x, "again": (x, ps)},
    "statics": lambda ps, x: {"n": 3, "none": None, "name": "a", "static": lt.Static(4), "x": x + 1},
    "constants": lambda ps, x: x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(3.0).item(),
    "nothing": lambda ps, x: None,
    "casts": lambda ps, x: (x.double() @ ps["w"].double(), x.to(torch.bfloat16) + 1, x > 0),
    "integers": lambda ps, x: torch.arange(5)[x.shape[0] % 3 :] // 2,
}


@pytest.mark.parametrize("backend", ["replay", stub], ids=["replay", "stub"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(batch, rng, same, name, backend):
    function = FUNCTIONS[name]
    jitted = jit(function, backend=backend)
    ps, x = {"w": torch.randn(3, 2, generator=rng)}, batch[0]
    for scale in (1.0, 2.0):
        same(jitted(ps, scale * x), function(ps, scale * x))
    assert jitted.cache_info()[:2] == (1, 1)


def test_arguments_that_come_back_are_themselves(batch):
    x, y = batch
    again, more = jit(lambda x, y: (y, x + 1), backend="replay")(x, y)
    assert again is y and more is not x


def test_results_can_be_differentiated_later(batch):
    x = batch[0]
    weights = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        features = jit(torch.tanh, backend="replay")(x)
    assert not features.is_inference()
    (features * weights).sum().backward()
    torch.testing.assert_close(weights.grad, torch.tanh(x).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(batch, same, dtype):
    def function(x, w):
        return torch.nn.functional.linear(x, w).sum(0), x.exp()

    x, w = batch[0], batch[0][:2].clone()
    jitted = jit(function, backend="replay")
    same(jitted(x, w), function(x, w))
    with torch.autocast("cpu", dtype):
        got, expected = jitted(x, w), function(x, w)
        assert got[0].dtype == dtype
        same(got, expected)
    same(jitted(x, w), function(x, w))
    assert jitted.cache_info().misses == 2


def test_global_generators_stay(batch):
    before = torch.get_rng_state()
    jit(lambda x: x + lt.random.normal(lt.random.key(0), (8, 3)), backend="replay")(batch[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mode_is_part_of_the_structure(make_state, batch, same):
    model = lt.Dropout(0.5)
    ps, st = lt.setup(0, model)
    jitted = jit(lambda x, st: model(x, ps, st), backend="replay")
    x = batch[0]
    for state in (st, lt.test_mode(st), st):
        same(jitted(x, state), model(x, ps, state))
    assert jitted.cache_info()[:2] == (1, 2)


def test_order_of_a_dict_counts(batch):
    x, y = batch[0], batch[0] + 1

    def first(tree):
        return next(iter(tree.values())) * 2

    jitted = jit(first, backend="replay")
    assert torch.equal(jitted({"a": x, "b": y}), x * 2)
    assert torch.equal(jitted({"b": y, "a": x}), y * 2)


def test_the_gradient_of_nested_forward_mode(rng, same):
    def solution(ps, t, x):
        return torch.exp(-ps["a"] * t) * torch.sin(ps["b"] * x)

    def curvature(ps, t, x):
        def slope(x):
            return torch.func.jvp(lambda x: solution(ps, t, x), (x,), (torch.ones_like(x),))[1]

        return torch.func.jvp(slope, (x,), (torch.ones_like(x),))[1]

    def gradient(ps, t, x):
        return torch.func.grad(lambda ps: curvature(ps, t, x).square().sum())(ps)

    t, x = torch.rand(2, 5, generator=rng)
    ps = {"a": torch.tensor(0.5), "b": torch.tensor(0.7)}
    same(jit(gradient, backend="replay")(ps, t, x), gradient(ps, t, x))
