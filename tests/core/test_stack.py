"""Stacking trees into one, and taking the stack apart."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as some

import luxtorch as lt
from luxtorch import DTypeError, InputError, KeyNameError, Static, optim, training
from luxtorch.core import stack, unstack

MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5), lt.NoOpLayer(), lt.Dense(4, 2))
Pair = collections.namedtuple("Pair", ["ps", "st"])

TREES = {
    "tensor": lambda ps, st: ps["layer_1"]["weight"],
    "parameters": lambda ps, st: ps,
    "states": lambda ps, st: st,
    "tuple": lambda ps, st: (ps, st),
    "namedtuple": Pair,
    "list and dict": lambda ps, st: {"models": [ps, {}, st]},
    "vector": lambda ps, st: lt.ComponentVector(ps),
    "vector and states": lambda ps, st: (lt.ComponentVector(ps), st),
    "TrainState": lambda ps, st: training.TrainState(MODEL, ps, st, optim.Adam(0.01)),
    "no tensors but constants": lambda ps, st: {"a": 1.5, "b": "b", "c": (ps["layer_1"]["bias"], Static("c"))},
}


@pytest.fixture(params=TREES)
def trees(request, make_key):
    return [TREES[request.param](*lt.setup(make_key(), MODEL)) for _ in range(3)]


def leaves(tree):
    return pytree.tree_leaves(tree)


def test_each_leaf_is_what_torch_stacks(trees):
    stacked = stack(trees)
    assert type(stacked) is type(trees[0])
    for got, *each in zip(leaves(stacked), *map(leaves, trees), strict=True):
        if isinstance(each[0], torch.Tensor):
            assert torch.equal(got, torch.stack(each)) and got.dtype == each[0].dtype
        else:
            assert got == each[0]


def test_unstack_is_the_inverse(trees):
    apart = unstack(stack(trees))
    assert len(apart) == 3
    for got, expected in zip(apart, trees, strict=True):
        assert pytree.tree_structure(got) == pytree.tree_structure(expected)
        for a, b in zip(leaves(got), leaves(expected), strict=True):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_nothing_that_came_is_changed_or_shared(trees):
    before = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, trees)
    tensors = [leaf for leaf in leaves(stack(trees)) if isinstance(leaf, torch.Tensor)]
    for leaf in tensors:
        leaf.zero_()
    for a, b in zip(leaves(trees), leaves(before), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_a_stack_of_vectors_is_a_batch_of_vectors(make_key):
    vectors = [lt.ComponentVector(lt.setup(make_key(), MODEL)[0]) for _ in range(3)]
    batch = stack(vectors)
    assert batch.axes is vectors[0].axes and batch.flat.shape == (3, len(vectors[0].flat))
    assert torch.equal(batch.layer_1.weight[1], vectors[1].layer_1.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_stack_of_models_is_called_by_vmap(make_key, compiled):
    models, x = [lt.setup(make_key(), MODEL) for _ in range(3)], lt.random.normal(make_key(), (5, 3))

    def outputs(models, x):
        ps, st = stack(models)
        return unstack(torch.vmap(lambda ps, st: MODEL(x, ps, st))(ps, st))

    call = torch.compile(outputs, fullgraph=True, backend="aot_eager") if compiled else outputs
    for got, model in zip(call(models, x), models, strict=True):
        expected = MODEL(x, *model)
        assert pytree.tree_structure(got) == pytree.tree_structure(expected)
        torch.testing.assert_close(leaves(got), leaves(expected))


@pytest.mark.parametrize("level", ["grad", "jvp", "vmap"])
def test_stacking_goes_through_transforms(rng, level):
    x = torch.randn(4, 3, generator=rng)
    weights = torch.randn(2, 3, generator=rng)

    def f(x):
        first, second = unstack(stack([{"a": x.sin()}, {"a": x.cos()}]))
        return (weights * stack([first, second])["a"]).sum()

    def g(x):
        return (weights * torch.stack([x.sin(), x.cos()])).sum()

    if level == "vmap":
        torch.testing.assert_close(torch.vmap(f)(x), torch.vmap(g)(x))
    elif level == "grad":
        torch.testing.assert_close(torch.func.grad(f)(x[0]), torch.func.grad(g)(x[0]))
    else:
        torch.testing.assert_close(torch.func.jvp(f, (x[0],), (x[1],)), torch.func.jvp(g, (x[0],), (x[1],)))


@given(number=some.integers(1, 5), shape=some.lists(some.integers(0, 3), max_size=3))
def test_any_number_of_any_shape(number, shape):
    trees = [{"a": torch.full(shape, float(i)), "b": torch.tensor(i)} for i in range(number)]
    stacked = stack(iter(trees))
    assert stacked["a"].shape == (number, *shape) and stacked["b"].tolist() == list(range(number))
    apart = unstack(stacked)
    assert [int(tree["b"]) for tree in apart] == list(range(number))
    assert all(torch.equal(a["a"], b["a"]) for a, b in zip(apart, trees, strict=True))


def test_a_deep_ensemble_trained_at_once_is_the_same_as_trained_one_by_one(make_key):
    x = lt.random.normal(make_key(), (16, 3), dtype=torch.float64)
    data = x, x[:, :2].sin()

    def objective(model, ps, st, data):
        y, st = model(data[0], ps, st)
        return (y - data[1]).square().mean(), st, {}

    def new(ps):
        return training.TrainState(MODEL, ps, lt.f64(st), optim.Adam(0.05))

    def step(ts):
        _, loss, _, ts = training.single_train_step(objective, data, ts)
        return loss, ts

    apart = []
    for _ in range(8):
        ps, st = lt.setup(make_key(), MODEL)
        apart.append(new(lt.f64(ps)))
    together, many = stack(apart), torch.vmap(step)
    for _ in range(5):
        losses, together = many(together)
        results = [step(ts) for ts in apart]
        apart = [ts for _, ts in results]
        torch.testing.assert_close(losses, torch.stack([loss for loss, _ in results]))
    assert len({float(loss) for loss in losses}) == 8
    for got, expected in zip(unstack(together), apart, strict=True):
        assert pytree.tree_structure(got) == pytree.tree_structure(expected)
        torch.testing.assert_close(leaves(got), leaves(expected))


def models(change=lambda ps, st: (ps, st)):
    return [lt.setup(0, MODEL), lt.setup(1, MODEL), change(*lt.setup(2, MODEL))]


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("trees", "error", "words"),
    [
        ([], InputError, "at least one tree"),
        (models(lambda ps, st: (ps, lt.test_mode(st))), InputError, r"'1.layer_2.training' of tree 2.*True.*False"),
        (models(lambda ps, st: (without(ps, "layer_5"), st)), KeyNameError, "'0' of tree 2 lacks 'layer_5'"),
        (models(lambda ps, st: ({**ps, "more": {}}, st)), KeyNameError, "'0' of tree 2 has 'more'"),
        (models(lambda ps, st: ({**ps, "layer_4": {"a": st}}, st)), KeyNameError, "'0.layer_4' of tree 2 has 'a'"),
        ([{"weight": 1.0}, {"weigth": 1.0}], KeyNameError, "Tree 1 lacks 'weight'.*Did you mean 'weight'"),
        (models(lambda ps, st: (lt.f64(ps), st)), DTypeError, "'0.layer_1.weight' of tree 2.*float32.*float64"),
        (
            models(lambda ps, st: ({**ps, "layer_5": {**ps["layer_5"], "bias": torch.ones(3)}}, st)),
            InputError,
            r"'0.layer_5.bias' of tree 2.*\(2,\).*\(3,\)",
        ),
        (models(lambda ps, st: (ps, st, st)), InputError, "Tree 2 must have the structure"),
        (models(lambda ps, st: [ps, st]), InputError, "Tree 2 must have the structure.*tuple.*list"),
        ([{"a": 1.0}, {"a": 2.0}], InputError, "'a' of tree 1 differs.*1.0.*2.0"),
        ([{"a": 1.0}, {"a": torch.ones(())}], InputError, "'a' of tree 1 differs.*1.0.*float32"),
        ([torch.ones(2), torch.ones(3)], InputError, r"Tree 1 differs.*\(2,\).*\(3,\)"),
        ([torch.ones(2), torch.ones(2, device="meta")], InputError, "on cpu.*on meta"),
        ([lt.ComponentVector({name: torch.ones(2)}) for name in "ab"], KeyNameError, "Tree 1 lacks 'a'"),
        (
            [training.TrainState(MODEL, *lt.setup(0, MODEL), rule) for rule in (optim.Adam(), optim.AdamW())],
            InputError,
            "'optimizer_state' of tree 1 must have the structure.*Adam.*AdamW",
        ),
    ],
)
def test_trees_that_differ_are_told_where(trees, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        stack(trees)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "without tensors"),
        ({"a": 1.0, "b": Static(True)}, "without tensors"),
        ({"a": torch.ones(2, 3), "b": {"c": torch.ones(3, 2)}}, r"\(2, ...\).*'b.c' of shape \(3, 2\)"),
        ({"a": torch.ones(2), "b": torch.ones(())}, r"\(2, ...\).*'b' of shape \(\)"),
        (torch.ones(()), "must have a common first dimension"),
        (lt.setup(0, MODEL), "must have a common first dimension"),
    ],
)
def test_what_is_no_stack_is_not_taken_apart(tree, words):
    with pytest.raises(InputError, match=f"(?s){words}"):
        unstack(tree)


def test_an_empty_stack_is_of_no_trees():
    assert unstack({"a": torch.ones(0, 3)}) == []
