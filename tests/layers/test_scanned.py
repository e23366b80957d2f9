"""Layers that call others many times are one operator inside of lt.jit, of the numbers of the plain loop."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_structure

import luxtorch as lt
from luxtorch.layers._shared import UNROLLED

FORMS = {
    "ScannedChain": (lt.ScannedChain(lt.Dense(3, 3, "tanh"), 4), [(2, 3)]),
    "ScannedChain of states and keys": (
        lt.ScannedChain(lt.SkipConnection(lt.Chain(lt.BatchNorm(3), lt.Dropout(0.5)), torch.add), 3),
        [(4, 3)],
    ),
    "ScannedChain of a function": (lt.ScannedChain(torch.sin, 2), [(2, 3)]),
    "ScannedChain of one": (lt.ScannedChain(lt.Dense(3, 3, "tanh"), 1), [(2, 3)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


class Unit(lt.Cell):
    """The minimal gated unit, with noise: a custom cell with a key among its states."""

    size: int

    def initial_parameters(self, key):
        names = ("gate", "candidate")
        return {name: lt.init.normal(lt.random.fold_in(key, name), (self.size, self.size)) for name in names}

    def initial_states(self, key):
        return {"rng": key}

    def initial_carry(self, x, ps, st):
        return torch.zeros_like(x), st

    def step(self, x, carry, ps, st):
        key, rng = lt.random.split(st["rng"])
        f = torch.sigmoid(x + carry @ ps["gate"])
        h = carry + f * (torch.tanh(x + (f * carry) @ ps["candidate"]) - carry)
        return (h + 0.1 * lt.random.normal(key, h.shape, dtype=h.dtype), h), {"rng": rng}


LONG = UNROLLED + 3
CELLS = {"custom": Unit(3), "lstm": lt.LSTMCell(3, 3), "gru": lt.GRUCell(3, 3), "rnn": lt.RNNCell(3, 3)}
TRANSFORMS = {
    "value": lambda f: f,
    "grad": grad,
    "by x": lambda f: grad(f, 1),
    "jvp": lambda f: lambda ps, x: jvp(lambda x: f(ps, x), (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f: lambda ps, x: vmap(lambda one: f(ps, one[None]))(x),
    "vmap of grad": lambda f: lambda ps, x: vmap(lambda one: grad(f)(ps, one[None]))(x),
    "grad of vmap": lambda f: grad(lambda ps, x: vmap(lambda one: f(ps, one[None]))(x).sum()),
    "grad of grad": lambda f: grad(lambda ps, x: grad(f, 1)(ps, x).square().sum()),
    "hessian": lambda f: lambda ps, x: hessian(lambda x0: f(ps, torch.cat((x0[:, None], x[:, 1:]), 1)))(x[:, 0]),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("cell", ["custom", *[pytest.param(name, marks=pytest.mark.slow) for name in CELLS][1:]])
def test_long_sequences(make_key, cell, transform, lengths):
    model = lt.Recurrence(CELLS[cell], return_sequence=True)
    ps, st = lt.setup(make_key(), model)
    ps, st = lt.f64(ps), lt.f64(st)
    x = lt.random.normal(make_key(), (2, 2 * LONG, 3), dtype=torch.float64)

    def loss(ps, x):
        steps = torch.full(x.shape[:1], x.shape[1] - 2)
        return model((x, None, steps) if lengths else x, ps, st)[0].square().sum()

    function = TRANSFORMS[transform](loss)
    jitted = lt.jit(function, backend="replay")
    torch.testing.assert_close(jitted(ps, x), function(ps, x), rtol=1e-9, atol=1e-10)
    counts = [jitted.lower(ps, x[:, :time].clone()).graph.count("torch.ops.") for time in (LONG, 2 * LONG)]
    assert counts[0] == counts[1] < 200


def test_one_graph_serves_all_long_sequences(make_key):
    model = lt.Recurrence(CELLS["custom"])
    ps, st = lt.setup(make_key(), model)
    function = grad(lambda ps, x: model(x, ps, st)[0].square().sum())
    jitted = lt.jit(function, dynamic={"x": 1}, backend="replay")
    for time in (LONG, 2 * LONG, LONG + 1):
        x = lt.random.normal(make_key(), (2, time, 3))
        torch.testing.assert_close(jitted(ps, x), function(ps, x), rtol=1e-4, atol=1e-5)
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_carry_has_the_dtype_of_the_first_output(make_key, dtype):
    model = lt.Recurrence(CELLS["custom"])
    ps, st = lt.setup(make_key(), model)
    x = lt.random.normal(make_key(), (2, LONG, 3))

    def value(ps, x):
        with torch.autocast("cpu", dtype):
            return model(x, ps, st)[0]

    torch.testing.assert_close(lt.jit(value, backend="replay")(ps, x), value(ps, x))


def test_a_scanned_chain_is_a_chain(make_key):
    layer = lt.Chain(lt.Dense(3, 3, "tanh"), lt.Dropout(0.3))
    model, chain = lt.ScannedChain(layer, 4), lt.Chain(*[layer] * 4)
    ps, st = lt.setup(make_key(), model)
    x = lt.random.normal(make_key(), (5, 3))
    y, new = model(x, ps, st)
    names = [f"layer_{i}" for i in range(1, 5)]
    parts = [dict(zip(names, lt.unstack(tree), strict=True)) for tree in (ps, st)]
    expected, states = chain(x, *parts)
    got, wanted = (y, *lt.unstack(new)), (expected, *states.values())
    assert tree_structure(got) == tree_structure(wanted)
    torch.testing.assert_close(tree_leaves(got), tree_leaves(wanted), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [lambda n: lt.ScannedChain(lt.Dense(3, 3, "tanh"), n), lambda n: lt.RepeatedLayer(lt.Dense(3, 3, "tanh"), n)],
    ids=["ScannedChain", "RepeatedLayer"],
)
def test_the_graph_does_not_grow_with_the_depth(make_key, make):
    counts = []
    for n in (LONG, 2 * LONG):
        model = make(n)
        ps, st = lt.setup(make_key(), model)
        x = lt.random.normal(make_key(), (2, 3))
        step = lt.jit(grad(lambda ps, x, model=model, st=st: model(x, ps, st)[0].sum()), backend="replay")
        torch.testing.assert_close(step(ps, x), grad(lambda ps: model(x, ps, st)[0].sum())(ps))  # noqa: B023
        counts.append(step.lower(ps, x).graph.count("torch.ops."))
    assert counts[0] == counts[1] < 40


@pytest.mark.slow
def test_inductor_compiles_the_step_once(make_key):
    model = lt.Recurrence(CELLS["custom"])
    ps, st = lt.setup(make_key(), model)
    x = lt.random.normal(make_key(), (2, 5 * LONG, 3))
    function = grad(lambda ps, x: model(x, ps, st)[0].square().sum())
    torch.testing.assert_close(lt.jit(function)(ps, x), function(ps, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ps, x: lt.ScannedChain(lt.Dense(3, 3), 2)(x, ps, {}), "'weight' must be a stack of 2"),
        (lambda ps, x: lt.ScannedChain(lt.Dense(3, 3), 3)(x, {"w": ps["weight"]}, {}), "no parameter 'w'"),
        (lambda ps, x: lt.ScannedChain(lt.Dense(3, 3), 0), "n must be at least 1"),
        (lambda ps, x: lt.ScannedChain(3, lt.Dense(3, 3)), "must be a layer"),
        (lambda ps, x: lt.jit(lambda x: lt.ScannedChain(lambda x: x[None], 2)(x, {}, {})[0])(x), "must keep its shape"),
    ],
)
def test_wrong_stacks(make_key, call, words):
    ps, _ = lt.setup(make_key(), lt.ScannedChain(lt.Dense(3, 3), 3))
    with pytest.raises(lt.LuxtorchError, match=words):
        call(ps, torch.ones(2, 3))
