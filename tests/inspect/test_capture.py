"""What layers inside return, against hooks of torch, and under every transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch import InputError, KeyNameError
from luxtorch.core import tree_leaves, tree_map
from luxtorch.inspect._capture import capture

MODEL = lt.Chain(
    stem=lt.Dense(3, 4, torch.tanh),
    block=lt.SkipConnection(lt.Chain(norm=lt.BatchNorm(4), drop=lt.Dropout(0.5)), torch.add),
    head=lt.Dense(4, 2),
)
PATHS = ["stem", "block", "block.norm", "block.drop", "head"]


def module():
    """The same in torch.nn, without the dropout."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x) + x

    return nn.ModuleDict({"stem": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "block": Skip(), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_against_forward_hooks(make_key, rng, tree):
    twin, seen = module().double(), {}
    layers = lt.Chain(
        stem=lt.Dense(3, 4, torch.tanh), block=lt.SkipConnection(lt.Chain(norm=lt.BatchNorm(4)), torch.add),
        head=lt.Dense(4, 2),
    )  # fmt: skip
    ps, st = lt.f64(lt.setup(make_key(), layers))
    values = [value.detach().clone() for value in twin.parameters()]
    leaves, spec = torch.utils._pytree.tree_flatten(ps)
    assert [leaf.shape for leaf in leaves] == [value.shape for value in values]
    ps = torch.utils._pytree.tree_unflatten(values, spec)
    for name in ("stem", "block", "block.norm", "head"):
        twin.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y.detach()}))
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    expected = twin["head"](twin["block"](twin["stem"](x)))
    (y, inside), new = capture(layers, x, tree(ps), st, list(seen))
    torch.testing.assert_close(y, expected.detach())
    assert list(inside) == ["stem", "block.norm", "block", "head"]  # as they were called, and asked for
    for name, value in seen.items():
        torch.testing.assert_close(inside[name], value)
    torch.testing.assert_close(new["block"]["norm"]["running_mean"], twin["block"].norm.running_mean)


def test_all_layers_by_default(make_key):
    ps, st = lt.setup(make_key(), MODEL)
    x = lt.random.normal(make_key(), (5, 3))
    (y, inside), new = capture(MODEL, x, ps, st)
    assert list(inside) == PATHS
    (again, chosen), _ = capture(MODEL, x, ps, st, PATHS)
    assert torch.equal(again, y) and all(torch.equal(chosen[path], inside[path]) for path in PATHS)
    expected, expected_new = MODEL(x, ps, st)
    assert torch.equal(y, expected) and all(map(torch.equal, tree_leaves(new), tree_leaves(expected_new)))
    assert capture(MODEL, x, ps, st, [])[0][1] == {} and capture(lt.NoOpLayer(), x, {}, {})[0][1] == {}


@pytest.mark.parametrize("path", PATHS)
def test_one_path(make_key, path):
    ps, st = lt.setup(make_key(), MODEL)
    x = lt.random.normal(make_key(), (5, 3))
    (_, inside), _ = capture(MODEL, x, ps, st, path)
    assert list(inside) == [path]
    assert torch.equal(inside[path], capture(MODEL, x, ps, st)[0][1][path])


def objective(x, ps, st):
    (y, inside), new = capture(MODEL, x, ps, st)
    return y.square().sum() + sum(value.sin().sum() for value in inside.values()), (inside, new)


@pytest.mark.parametrize("compiled", [False, True])
def test_under_transforms(make_key, compiled):
    ps, st = lt.setup(make_key(), MODEL)
    st = lt.test_mode(st)
    xs = lt.random.normal(make_key(), (3, 5, 3))
    gradient = torch.func.grad(objective, argnums=1, has_aux=True)
    many = torch.vmap(gradient, (0, None, None))
    got = (torch.compile(many, fullgraph=True, backend="aot_eager") if compiled else many)(xs, ps, st)
    for i, x in enumerate(xs):
        expected = gradient(x, ps, st)
        assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(expected)
        leaves = [leaf[i] for leaf in tree_leaves(got)]
        torch.testing.assert_close(leaves, tree_leaves(expected), rtol=1e-4, atol=1e-5)


def test_a_compiled_function_tells_models_apart(make_key):
    models = [lt.Chain(lt.Dense(3, 3, function), lt.Dense(3, 2)) for function in (torch.tanh, torch.sin)]
    ps, st = lt.setup(make_key(), models[0])
    x = lt.random.normal(make_key(), (5, 3))

    def call(model, x):
        (first, second) = (capture(model, x, ps, st, path)[0][1][path] for path in ("layer_1", "layer_2"))
        return first.sum() * second + capture(models[0], x, ps, st)[0][1]["layer_1"].sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for model in (*models, *models):
        torch.testing.assert_close(compiled(model, x), call(model, x))


def test_gradients_reach_what_is_captured_in_every_mode(make_key):
    ps, st = lt.f64(lt.setup(make_key(), MODEL))
    st = lt.test_mode(st)
    x = lt.random.normal(make_key(), (5, 3), dtype=torch.float64)
    along = tree_map(lambda leaf: lt.random.normal(make_key(), leaf.shape, dtype=leaf.dtype), ps)
    gradient = torch.func.grad(lambda ps: objective(x, ps, st)[0])(ps)
    expected = sum((a * b).sum() for a, b in zip(tree_leaves(gradient), tree_leaves(along), strict=True))
    _, slope = torch.func.jvp(lambda ps: objective(x, ps, st)[0], (ps,), (along,))
    torch.testing.assert_close(slope, expected)
    assert torch.autograd.gradcheck(lambda x: objective(x, ps, st)[0], x.requires_grad_())


def test_layers_that_are_called_in_their_own_ways(make_key):
    x = lt.random.normal(make_key(), (2, 5, 3))
    model = lt.Chain(
        rnn=lt.Recurrence(lt.StackedCell(lt.GRUCell(3, 4), lt.LSTMCell(4, 4)), return_sequence=True),
        many=lt.Ensemble(lt.Chain(inside=lt.Dense(4, 2)), 3),
        low=lt.AlternatePrecision(torch.float64, lt.Chain(inside=lt.Dense(2, 2))),
        again=lt.RepeatedLayer(lt.Dense(2, 2), 2),
    )
    (y, inside), _ = capture(model, x, *lt.setup(make_key(), model))
    assert {path: tuple(value.shape) for path, value in inside.items()} == {
        "rnn": (2, 5, 4),
        "many": (3, 2, 5, 2),
        "many.inside": (3, 2, 5, 2),
        "low": (3, 2, 5, 2),
        "again": (3, 2, 5, 2),
    }
    assert torch.equal(inside["again"], y)


def test_modules_of_torch(make_key):
    net = nn.Sequential(nn.Linear(3, 4), nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True).encoder)
    layer, ps, st = lt.from_torch(nn.ModuleList([net])[0])
    x = lt.random.normal(make_key(), (2, 5, 3))
    (_, inside), _ = capture(layer, x, ps, st, ["0", "1.layers.0.linear1"])
    torch.testing.assert_close(inside["0"], net[0](x).detach())
    assert inside["1.layers.0.linear1"].shape == (2, 5, 8)


def test_wrong_paths(make_key):
    ps, st = lt.setup(make_key(), MODEL)
    x = torch.ones(5, 3)
    with pytest.raises(KeyNameError, match="Did you mean 'stem'") as caught:
        capture(MODEL, x, ps, st, "steam")
    assert "the path 'steam'" in str(caught.value)
    with pytest.raises(InputError, match="paths of layers"):
        capture(MODEL, x, ps, st, [3])
    with pytest.raises(InputError, match="must be called by its container"):
        unused = Unused(lt.Dense(3, 3))
        capture(unused, x, *lt.setup(0, unused), "inner")


class Unused(lt.ContainerLayer):
    """Never call the layer inside."""

    inner: lt.Dense

    def __call__(self, x, ps, st):
        return x, st


def test_what_is_not_called_is_left_out_by_default():
    model = lt.Chain(Unused(lt.Dense(3, 3)))
    (_, inside), _ = capture(model, torch.ones(2, 3), *lt.setup(0, model))
    assert list(inside) == ["layer_1"]
