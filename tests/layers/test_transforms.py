"""Raw torch.func and torch.compile on a whole model in train mode: no wrapper of ours needed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import luxtorch as lt
from luxtorch import BatchNorm, Chain, Dense, Dropout

MODEL = Chain(Dense(4, 8, torch.tanh), BatchNorm(8), Dropout(0.5), Dense(8, 2))


def loss(ps, st, x):
    y, st = MODEL(x, ps, st)
    return (y**2).mean(), st


def assert_trees_close(got, expected, **tolerances):
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerances)


@pytest.fixture
def case(make_key):
    return *lt.setup(make_key(), MODEL), lt.random.normal(make_key(), (16, 4))


@pytest.mark.parametrize("form", [dict, lt.ComponentVector])
def test_grad_jvp_and_compile_of_a_model_in_train_mode(case, form):
    ps, st, x = case
    ps = form(ps)
    gradient = torch.func.grad(loss, has_aux=True)
    expected, new = gradient(ps, st, x)
    assert not torch.equal(new["layer_2"]["running_mean"], st["layer_2"]["running_mean"])
    _, change, _ = torch.func.jvp(lambda p: loss(p, st, x), (ps,), (expected,), has_aux=True)
    squares = sum((leaf**2).sum() for leaf in tree_leaves(expected))
    torch.testing.assert_close(change, squares)
    for backend in ("aot_eager", "inductor") if form is dict else ("aot_eager",):
        got = torch.compile(gradient, fullgraph=True, backend=backend)(ps, st, x)
        assert_trees_close(got, (expected, new), rtol=1e-4, atol=1e-5)


def test_32_models_under_vmap_are_a_loop(make_key):
    x = lt.random.normal(make_key(), (16, 4))
    ps, st = torch.vmap(lambda key: lt.setup(key, MODEL))(lt.random.split(make_key(), 32))
    gradient = torch.func.grad(loss, has_aux=True)
    got = torch.vmap(gradient, (0, 0, None))(ps, st, x)
    compiled = torch.compile(torch.vmap(gradient, (0, 0, None)), fullgraph=True, backend="aot_eager")(ps, st, x)
    members = [gradient(*tree_map(lambda leaf, i=i: leaf[i], (ps, st)), x) for i in range(32)]
    expected = tree_map(lambda *leaves: torch.stack(leaves), *members)
    assert_trees_close(got, expected, rtol=1e-4, atol=1e-6)
    assert_trees_close(compiled, expected, rtol=1e-4, atol=1e-6)


def test_20_compiled_dropout_steps_are_one_graph_with_new_masks_each(make_key):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, x, seed = Dropout(0.5), torch.ones(64), make_key()

    def masks():
        _, st = lt.setup(seed, model)
        step = torch.compile(lambda x, st: model(x, {}, st), fullgraph=True, backend=backend)
        drawn = []
        for _ in range(20):
            y, st = step(x, st)
            drawn.append(tuple(y.tolist()))
        return drawn

    first = masks()
    assert len(graphs) == 1
    assert len(set(first)) == 20
    assert masks() == first


def test_nothing_moves_the_global_generator(case):
    ps, st, x = case
    before = torch.get_rng_state()
    torch.func.grad(loss, has_aux=True)(ps, st, x)
    torch.vmap(lambda x: MODEL(x, ps, st)[0])(x[None])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_outer_autograd_tape_sees_everything(case):
    ps, st, x = case
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
    value, new = loss(leaves, st, x)
    value.backward()
    expected, _ = torch.func.grad(loss, has_aux=True)(ps, st, x)
    assert_trees_close(tree_map(lambda leaf: leaf.grad, leaves), expected, rtol=1e-4, atol=1e-5)
    assert not any(leaf.requires_grad for leaf in tree_leaves(new))
