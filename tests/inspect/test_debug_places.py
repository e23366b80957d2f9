"""Debug mode names the layer: a NaN planted in each of many kinds of layers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch.core import Layer, tree_leaves, tree_map
from luxtorch.core._paths import replace_children
from luxtorch.inspect._debug import NonFiniteError, debug_mode


class Net(nn.Module):
    """A module without a layer of luxtorch for it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.body = nn.ModuleDict({"norm": nn.LayerNorm(4), "out": nn.Linear(4, 2)})

    def forward(self, x):
        return self.body["out"](torch.tanh(self.body["norm"](self.first(x))))


@lt.compact(inner=lt.Dense(3, 3), scale=torch.ones(3))
def compact(m, x):
    return m.inner(x) * m.scale


IMAGE, SEQUENCE, ROWS = (2, 2, 6, 6), (2, 5, 4), (4, 3)
KINDS = {
    "Dense": (lt.Dense(3, 2, torch.tanh), ROWS),
    "Bilinear": (lt.Bilinear(3, 3, 2), ROWS),
    "Scale": (lt.Scale(3), ROWS),
    "Conv": (lt.Conv((3, 3), 2, 4), IMAGE),
    "ConvTranspose": (lt.ConvTranspose((3, 3), 2, 4), IMAGE),
    "BatchNorm": (lt.BatchNorm(2), IMAGE),
    "GroupNorm": (lt.GroupNorm(2, 1), IMAGE),
    "InstanceNorm": (lt.InstanceNorm(2), IMAGE),
    "LayerNorm": (lt.LayerNorm(3), ROWS),
    "RMSNorm": (lt.RMSNorm(3), ROWS),
    "Dropout": (lt.Dropout(0.2), ROWS),
    "AlphaDropout": (lt.AlphaDropout(0.2), ROWS),
    "MaxPool": (lt.MaxPool((2, 2)), IMAGE),
    "MeanPool": (lt.MeanPool((2, 2)), IMAGE),
    "Upsample": (lt.Upsample("nearest", scale_factor=2), IMAGE),
    "PReLU": (lt.PReLU(), ROWS),
    "WeightNorm": (lt.WeightNorm(lt.Dense(3, 2)), ROWS),
    "SpectralNorm": (lt.SpectralNorm(lt.Dense(3, 2)), ROWS),
    "MultiHeadAttention": (lt.MultiHeadAttention(4, num_heads=2), SEQUENCE),
    "TransformerEncoderLayer": (lt.TransformerEncoderLayer(4, 2, 8), SEQUENCE),
    "Recurrence": (lt.Recurrence(lt.LSTMCell(4, 3)), SEQUENCE),
    "BidirectionalRNN": (lt.BidirectionalRNN(lt.GRUCell(4, 3)), SEQUENCE),
    "StackedCell": (lt.Recurrence(lt.StackedCell(lt.RNNCell(4, 3), lt.GRUCell(3, 3))), SEQUENCE),
    "Chain": (lt.Chain(lt.Dense(3, 2), torch.tanh), ROWS),
    "Parallel": (lt.Parallel(torch.add, lt.Dense(3, 2), lt.Dense(3, 2)), ROWS),
    "SkipConnection": (lt.SkipConnection(lt.Dense(3, 3), torch.add), ROWS),
    "RepeatedLayer": (lt.RepeatedLayer(lt.Dense(3, 3), 2), ROWS),
    "Ensemble": (lt.Ensemble(lt.Dense(3, 3), 2), ROWS),
    "Checkpointed": (lt.Checkpointed(lt.Dense(3, 3)), ROWS),
    "compact": (compact, ROWS),
    "WrappedFunction": (lt.WrappedFunction(torch.tanh), ROWS),
    "from_torch": (lt.from_torch(Net()).layer, ROWS),
}


class Forward(lt.WrapperLayer):
    """Make one number NaN."""

    layer: Layer

    def __call__(self, x, ps, st):
        y, st = self.layer(x, ps, st)
        return tree_map(lambda leaf: leaf + torch.nan * (torch.arange(leaf.numel()) == 1).view(leaf.shape), y), st


class Backward(lt.WrapperLayer):
    """Change no number, and make the gradient NaN."""

    layer: Layer

    def __call__(self, x, ps, st):
        x = tree_map(lambda leaf: leaf if leaf is None else leaf + torch.sqrt(0 * leaf), x)
        return self.layer(x, ps, st)


def flat(layer):
    """Return a model with a layer at the end of a path, the path, and what makes the model's trees of the layer's."""
    return lt.Chain(layer, lt.NoOpLayer()), "layer_1", lambda tree: {"layer_1": tree, "layer_2": {}}


def nested(layer):
    """Return the same, deeper inside."""
    return (
        lt.Chain(first=lt.NoOpLayer(), block=lt.Chain(a=torch.sin, b=lt.SkipConnection(layer, lambda y, x: y))),
        "block.b",
        lambda tree: {"first": {}, "block": {"a": {}, "b": tree}},
    )


DEPTHS = (flat, nested)


def trees(layer, make_key, around):
    ps, st = lt.setup(make_key(), layer)
    return around(ps), around(st)


def loss(model, x, st):
    return lambda ps: sum(leaf.square().sum() for leaf in tree_leaves(model(x, ps, st)[0]))


def by_tape(model, x, ps, st):
    x = x.clone().requires_grad_()
    loss(model, x, st)(tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)).backward()


def by_grad(model, x, ps, st):
    torch.func.grad(lambda x: loss(model, x, st)(ps))(x)


def by_vmap(model, x, ps, st):
    torch.vmap(torch.func.grad(lambda x: loss(model, x, st)(ps)))(torch.stack([x, 2 * x]))


def by_jacrev(model, x, ps, st):
    torch.func.jacrev(lambda x: loss(model, x, st)(ps))(x)


def by_grad_of_grad(model, x, ps, st):
    torch.func.grad(lambda x: torch.func.grad(lambda x: loss(model, x, st)(ps))(x).square().sum())(x)


WAYS = (by_tape, by_grad, by_vmap, by_jacrev, by_grad_of_grad)


@pytest.mark.parametrize("plant", [Forward, Backward])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_nan_is_found_in_every_kind_of_layer(make_key, kind, plant, way=by_grad):
    layer, shape = KINDS[kind]
    x = lt.random.normal(make_key(), shape)
    model, path, around = DEPTHS[len(kind) % 2](plant(layer))
    ps, st = trees(layer, make_key, around)
    with pytest.raises(NonFiniteError) as caught:
        way(debug_mode(model), x, ps, st)
    error = caught.value
    assert (error.path, error.direction) == (path, plant.__name__.lower())
    assert error.where.startswith(f"model.{path} (") and "NaN" in str(error) and "input" in error.got


@pytest.mark.parametrize("kind", [kind for kind, (layer, _) in KINDS.items() if lt.parameter_length(layer)])
def test_a_parameter_that_is_nan_is_found_at_its_own_layer(make_key, kind):
    layer, shape = KINDS[kind]
    x, (ps, st) = lt.random.normal(make_key(), shape), lt.setup(make_key(), layer)
    for name, leaf in lt.flatten_names(ps).items():
        broken = lt.unflatten_names({name: leaf * torch.inf * 0}, like=ps)
        with pytest.raises(NonFiniteError) as caught:
            debug_mode(lt.Chain(net=layer))(x, {"net": broken}, {"net": st})
        assert f"'{name.removeprefix(caught.value.path.removeprefix('net')[1:]).lstrip('.')}'" in str(caught.value)
        assert f"net.{name}".startswith(caught.value.path)


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plant", [Forward, Backward])
@pytest.mark.parametrize("kind", KINDS)
def test_under_every_transform(make_key, kind, plant, way, depth):
    layer, shape = KINDS[kind]
    x = lt.random.normal(make_key(), shape)
    model, path, around = depth(plant(layer))
    ps, st = trees(layer, make_key, around)
    with pytest.raises(NonFiniteError) as caught:
        way(debug_mode(model), x, ps, st)
    assert (caught.value.path, caught.value.direction) == (path, plant.__name__.lower())


def deep():
    """A model in which layers lie in containers of many kinds."""
    return lt.Chain(
        stem=lt.Conv((3, 3), 2, 4),
        block=lt.SkipConnection(lt.Chain(conv=lt.Conv((1, 1), 4, 4), norm=lt.BatchNorm(4)), torch.add),
        two=lt.Parallel(torch.add, left=lt.Chain(lt.Conv((1, 1), 4, 4)), right=lt.Checkpointed(lt.Conv((1, 1), 4, 4))),
        flat=lt.ReshapeLayer(8, 8),
        rnn=lt.Recurrence(lt.StackedCell(lt.GRUCell(8, 8), lt.LSTMCell(8, 8)), return_sequence=True),
        attend=lt.TransformerEncoderLayer(8, 2, 8),
        many=lt.Ensemble(lt.Chain(inside=lt.Dense(8, 8), act=torch.tanh), 2),
    )


PLACES = (
    "stem", "block.conv", "block.norm", "two.left.layer_1", "two.right", "flat", "rnn.layer_1", "rnn.layer_2",
    "attend.self_attn.q_proj", "attend.self_attn", "attend.norm1", "many.inside", "many.act",
)  # fmt: skip


def planted(layer, names, plant):
    """Return a model with a NaN planted at the end of a path."""
    children = layer.children()
    if "" in children and names:
        return replace_children(layer, {"": planted(children[""], names, plant)})
    if not names:
        return plant(layer) if not isinstance(layer, lt.Cell) else poisoned_cell(layer, plant)
    return replace_children(layer, {names[0]: planted(children[names[0]], names[1:], plant)})


def poisoned_cell(cell, plant):
    """Return a cell of a class of its own, since only a cell can be run over a sequence."""

    class Poisoned(type(cell)):
        def scan(self, xs, carry, ps, st):
            xs = xs + torch.sqrt(0 * xs) if plant is Backward else xs
            (ys, carry), st = super().scan(xs, carry, ps, st)
            return (ys * torch.nan if plant is Forward else ys, carry), st

    new = object.__new__(Poisoned)
    new._set(**{name: value for name, value in vars(cell).items() if not name.startswith("_")})
    return new


@pytest.mark.parametrize("plant", [Forward, Backward])
@pytest.mark.parametrize("path", PLACES)
def test_a_planted_nan_is_found_at_every_place_of_a_deep_model(make_key, path, plant):
    model, tree = deep(), lt.ComponentVector if plant is Backward else dict
    ps, st = lt.setup(make_key(), model)
    x = lt.random.normal(make_key(), (2, 2, 6, 6))
    broken = planted(model, path.split("."), plant)
    with pytest.raises(NonFiniteError) as caught:
        torch.func.grad(lambda x, ps: loss(debug_mode(broken), x, st)(ps), argnums=(0, 1))(x, tree(ps))
    assert (caught.value.path, caught.value.direction) == (path, plant.__name__.lower())


@pytest.mark.parametrize("plant", [Forward, Backward])
@pytest.mark.parametrize("name", ["first", "body.norm", "body.out"])
def test_modules_inside_a_module_are_named(make_key, name, plant):
    class Poison(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            x = x + torch.sqrt(0 * x) if plant is Backward else x
            return self.module(x) * (torch.nan if plant is Forward else 1)

    net = Net()
    outer, last = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    (outer._modules if outer is not net else net._modules)[last] = Poison(net.get_submodule(name))
    model, ps, st = lt.from_torch(net)
    x = lt.random.normal(make_key(), ROWS)
    for way in (by_tape, by_grad, by_vmap):
        with pytest.raises(NonFiniteError) as caught:
            way(debug_mode(lt.Chain(net=model)), x, {"net": ps}, {"net": st})
        assert (caught.value.path, caught.value.direction) == (f"net.{name}", plant.__name__.lower())


NATURAL = {
    "the root of zero": (lambda x: 0 * x, torch.sqrt, "backward"),
    "the norm of zero": (lambda x: 0 * x, lambda x: x.pow(2).sum(-1).sqrt(), "backward"),
    "a power below one of zero": (lambda x: 0 * x, lambda x: x**0.5, "backward"),
    "the logarithm of a negative number": (torch.neg, torch.log, "forward"),
    "no variance": (torch.ones_like, lt.LayerNorm(4, eps=0.0), "forward"),
    "an overflow": (lambda x: 1e5 * x, torch.exp, "forward"),
    "a row without a key": (lambda x: x - torch.inf, lambda x: torch.softmax(x, -1), "forward"),
}


@pytest.mark.parametrize("way", WAYS[:4])
@pytest.mark.parametrize("fault", NATURAL)
def test_faults_as_they_happen(fault, way):
    before, hit, direction = NATURAL[fault]
    model = lt.Chain(before=before, hit=hit)
    ps, st = lt.setup(0, model)
    infinite = fault == "a row without a key"  # the layer before makes them on purpose
    with pytest.raises(NonFiniteError) as caught:
        way(debug_mode(model, inf_check=not infinite), torch.ones(2, 4), ps, st)
    assert (caught.value.path, caught.value.direction) == ("hit", direction)
