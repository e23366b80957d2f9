"""Recurrent modules of torch: their numbers, under every transform, with a dropout by a key."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import luxtorch as lt
import luxtorch.random as lr
from luxtorch.core import flatten_names, tree_leaves, tree_map
from luxtorch.interop import Inputs, from_torch

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN, relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "LSTM, projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True},
    "layers": {"num_layers": 2},
    "all": {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
}
INPUTS = {
    "batch": lambda x: x,
    "one": lambda x: x[:, 0],
    "packed": lambda x: pack_padded_sequence(x, [4, 2, 1]),
    "packed, unsorted": lambda x: pack_padded_sequence(x, [1, 4, 2], enforce_sorted=False),
}


@pytest.fixture
def draw(rng):
    return lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)


def tensors(y):
    # Of a packed sequence only the data is a number that is computed.
    return [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def total(y):
    return sum((leaf.sin() * torch.linspace(1, 2, leaf.numel()).view(leaf.shape)).sum() for leaf in tensors(y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", INPUTS)
def test_numbers_and_derivatives_are_torchs(draw, kind, options, form):
    module = KINDS[kind](3, 4, dtype=torch.float64, **OPTIONS[options])
    x = INPUTS[form](draw(4, 3, 3))
    layer, ps, st = from_torch(module)
    y, after = layer(x, ps, st)
    expected = module(x)
    torch.testing.assert_close(tensors(y), [leaf.detach() for leaf in tensors(expected)])
    assert after.keys() == st.keys() and type(y[0]) is type(expected[0])
    total(expected).backward()

    def loss(ps):
        return total(layer(x, ps, st)[0])

    wanted = {name: value.grad for name, value in module.named_parameters()}
    torch.testing.assert_close(flatten_names(grad(loss)(ps)), wanted)
    taped = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
    loss(taped).backward()
    torch.testing.assert_close({name: leaf.grad for name, leaf in flatten_names(taped).items()}, wanted)
    _, slope = jvp(loss, (ps,), (tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(slope, sum(leaf.sum() for leaf in wanted.values()))
    models = tree_map(lambda leaf: torch.stack([leaf, leaf / 2]), ps)
    slopes = vmap(grad(loss))(models)
    torch.testing.assert_close(tree_map(lambda leaf: leaf[1], slopes), grad(loss)(tree_map(lambda leaf: leaf / 2, ps)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["batch", "packed"])
def test_a_start_is_passed_on(draw, kind, form):
    module = KINDS[kind](3, 4, 2, bidirectional=True, dtype=torch.float64)
    hidden = 2 if "projected" in kind else 4
    h = draw(4, 3, hidden)
    start = (h, draw(4, 3, 4)) if "LSTM" in kind else h
    x = INPUTS[form](draw(4, 3, 3))
    layer, ps, st = from_torch(module)
    expected = [leaf.detach() for leaf in tensors(module(x, start))]
    torch.testing.assert_close(tensors(layer(Inputs(x, start), ps, st)[0]), expected)
    functional, _ = jvp(lambda ps: tensors(layer(Inputs(x, start), ps, st)[0]), (ps,), (ps,))
    torch.testing.assert_close(functional, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["batch", "packed"])
def test_dropout_between_the_layers_comes_from_the_key(make_key, draw, kind, form):
    module = KINDS[kind](3, 40, 3, dropout=0.5, dtype=torch.float64)
    layer, ps, st = from_torch(module)
    x = INPUTS[form](draw(4, 3, 3))
    before = torch.get_rng_state()
    keys = lr.split(make_key(), 2)

    def run(key):
        return layer(x, ps, {**st, "rng": key})

    (y, after), (again, _) = run(keys[0]), run(keys[0])
    torch.testing.assert_close(tensors(y), tensors(again), rtol=0, atol=0)
    assert not torch.equal(tensors(y)[0], tensors(layer(x, ps, after)[0])[0])
    both = vmap(lambda key: tensors(run(key)[0]))(keys)
    torch.testing.assert_close([leaf[1] for leaf in both], tensors(run(keys[1])[0]))
    quiet, _ = layer(x, ps, lt.test_mode(st))
    torch.testing.assert_close(tensors(quiet), [leaf.detach() for leaf in tensors(module.eval()(x))])
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_spares_the_last_layer_and_scales(make_key):
    module = nn.RNN(1, 4000, 2, dropout=0.25, bias=False, nonlinearity="relu")
    layer, ps, st = from_torch(module)
    ps = tree_map(torch.zeros_like, ps)
    ps["weight_ih_l0"] = torch.ones(4000, 1)
    ps["weight_ih_l1"] = torch.eye(4000)
    (y, _), _ = layer(torch.ones(1, 1, 1), ps, {**st, "rng": make_key()})
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).double().mean() - 0.25) < 0.03


def test_a_tape_of_a_kernel_can_be_differentiated_again(draw):
    layer, ps, st = from_torch(nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64))
    x = draw(4, 2, 3).requires_grad_()
    (first,) = torch.autograd.grad(total(layer(x, ps, st)[0]), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    ones = torch.ones_like(x)
    _, like = jvp(grad(lambda x: total(layer(x, ps, st)[0])), (x.detach(),), (ones,))
    torch.testing.assert_close(second, like)


CELLS = {
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell": nn.RNNCell,
    "RNNCell, relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_are_torchs(draw, cell, start, batch, bias):
    module = CELLS[cell](3, 4, bias=bias, dtype=torch.float64)
    x, h = draw(*batch, 3), draw(*batch, 4)
    carry = ((h, draw(*batch, 4)) if cell == "LSTMCell" else h,) if start else ()
    layer, ps, st = from_torch(module)
    expected = module(x, *carry)
    torch.testing.assert_close(layer(Inputs(x, *carry), ps, st)[0], expected)
    total(expected).backward()

    def loss(ps, x):
        return total(layer(Inputs(x, *carry), ps, st)[0])

    wanted = {name: value.grad for name, value in module.named_parameters()}
    torch.testing.assert_close(flatten_names(grad(loss)(ps, x)), wanted)
    models = tree_map(lambda leaf: torch.stack([leaf, leaf]), ps)
    slopes = vmap(grad(loss), (0, None))(models, x)
    torch.testing.assert_close({name: leaf[1] for name, leaf in flatten_names(slopes).items()}, wanted)
    _, slope = jvp(lambda ps: loss(ps, x), (ps,), (tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(slope, sum(leaf.sum() for leaf in wanted.values()))


class Tagger(nn.Module):
    """Ask what kind its module is, as code that serves several kinds does."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        y, state = self.rnn(x)
        h = state[0] if isinstance(self.rnn, nn.LSTM) else state
        return self.out(y), h


def test_a_module_inside_is_what_it_was(rng):
    module = Tagger().eval()
    layer, ps, st = from_torch(module)
    x = torch.randn(2, 5, 3, generator=rng)
    torch.testing.assert_close(layer(x, ps, st)[0], tuple(module(x)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTM, projected"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled(rng, kind, training):
    layer, ps, st = from_torch(KINDS[kind](3, 4, 2, dropout=0.5, bidirectional=True).train(training))
    x = torch.randn(4, 2, 3, generator=rng)

    def step(ps, st, x):
        return grad(lambda ps: total(layer(x, ps, st)[0]))(ps)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ps, st, x), step(ps, st, x))


class Doubled(nn.GRU):
    """Override a forward, as subclasses do."""

    def forward(self, x):
        return super().forward(2 * x)[0]


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4, 2), lambda: Doubled(3, 4)], ids=["LSTM", "subclass"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_read_the_weights_that_they_are_given(rng, make, copied):
    module = make()
    layer, ps, st = from_torch(module)
    x = torch.randn(4, 2, 3, generator=rng)
    layer(x, ps, st)
    other = copied(layer)
    torch.testing.assert_close(tensors(other(x, ps, st)[0]), [leaf.detach() for leaf in tensors(module(x))])
    zeros = tree_map(torch.zeros_like, ps)
    assert not any(leaf.any() for leaf in tensors(other(x, zeros, st)[0]))
