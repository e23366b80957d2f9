"""Recurrent modules of torch: their numbers, under every transform, with a dropout by a key."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence, unpad_sequence

import luxtorch as lt
import luxtorch.random as lr
from luxtorch.core import flatten_names, tree_leaves, tree_map
from luxtorch.interop import Inputs, from_torch
from luxtorch.testing import check_derivatives

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


class Padded(nn.Module):
    """Pack its sequences and pad them again, as taggers and encoders do."""

    def __init__(self, kind, options, enforce_sorted, total_length):
        super().__init__()
        self.embed = nn.Linear(3, 3, dtype=torch.float64)
        self.rnn = KINDS[kind](3, 4, dtype=torch.float64, **options)
        self.enforce_sorted, self.total_length = enforce_sorted, total_length

    def forward(self, x, lengths):
        first = self.rnn.batch_first
        x = pack_padded_sequence(self.embed(x), lengths, first, self.enforce_sorted)
        y, after = self.rnn(x)
        y, lengths = pad_packed_sequence(y, first, -0.5, self.total_length)
        return y, after, lengths


def check_padded(draw, kind, options, lengths, as_given):
    enforce_sorted = sorted(lengths, reverse=True) == list(lengths)
    module = Padded(kind, options, enforce_sorted, 5 if options.get("bidirectional") else None)
    x = draw(3, 4, 3) if options.get("batch_first") else draw(4, 3, 3)
    given = as_given(lengths)
    layer, ps, st = from_torch(module)
    expected = module(x, given)
    total(expected).backward()
    wanted = {name: value.grad for name, value in module.named_parameters()}
    y, _ = layer(Inputs(x, given), ps, st)
    torch.testing.assert_close(y, expected)

    def loss(ps, x=x):
        return total(layer(Inputs(x, given), ps, st)[0])

    torch.testing.assert_close(flatten_names(grad(loss)(ps)), wanted)
    value, slope = jvp(lambda ps: tensors(layer(Inputs(x, given), ps, st)[0]), (ps,), (ps,))
    torch.testing.assert_close(value, [leaf.detach() for leaf in tensors(expected)])
    _, slope = jvp(loss, (ps,), (tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(slope, sum(leaf.sum() for leaf in wanted.values()))
    models = tree_map(lambda leaf: torch.stack([leaf / 2, leaf]), ps)
    slopes = vmap(grad(loss))(models)
    torch.testing.assert_close({name: leaf[1] for name, leaf in flatten_names(slopes).items()}, wanted)
    both = vmap(grad(loss), (None, 0))(ps, torch.stack([x / 2, x]))
    torch.testing.assert_close({name: leaf[1] for name, leaf in flatten_names(both).items()}, wanted)
    return loss, ps, x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [(4, 2, 1), (1, 3, 2)], ids=["sorted", "unsorted"])
def test_sequences_packed_inside_are_torchs(draw, kind, options, lengths):
    as_given = torch.tensor if options == "plain" else list
    check_padded(draw, kind, OPTIONS[options], lengths, as_given)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_packed_inside_have_every_derivative(make_key, draw, kind):
    loss, ps, x = check_padded(draw, kind, OPTIONS["all"], (2, 4, 1), list)
    check_derivatives(loss, ps, x, rng=make_key(), words=("RF", "FR", "FF", "rf", "RFR"))


class Joined(nn.Module):
    """Pack a list of sequences."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, dtype=torch.float64)

    def forward(self, *xs):
        packed = pack_sequence([x * 2 for x in xs], enforce_sorted=False)
        return unpad_sequence(*pad_packed_sequence(self.rnn(packed)[0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequences_are_joined_and_parted(draw, side):
    module, xs = Joined(), [draw(2, 3), draw(4, 3), draw(1, 3)]
    layer, ps, st = from_torch(module)
    expected = [leaf.detach() for leaf in module(*xs)]
    value, _ = jvp(lambda *xs: layer(Inputs(*xs), ps, st)[0], tuple(xs), tuple(xs))
    torch.testing.assert_close(value, expected)
    both = vmap(lambda *xs: layer(Inputs(*xs), ps, st)[0])(*(torch.stack([x, 2 * x]) for x in xs))
    torch.testing.assert_close([leaf[0] for leaf in both], expected)
    pad = from_torch(Padding(side))
    many = [torch.stack([x, 2 * x]) for x in xs]
    got = vmap(lambda *xs: pad.layer(Inputs(*xs), pad.ps, pad.st)[0])(*many)
    torch.testing.assert_close(got[0], pad_sequence(xs, True, 3.0, side))


class Padding(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, *xs):
        return pad_sequence(xs, True, 3.0, self.side)


def test_lengths_that_have_no_numbers_are_refused(draw):
    layer, ps, st = from_torch(Padded("LSTM", {}, False, None))
    x, lengths = draw(4, 3, 3), torch.tensor([2, 4, 1])
    text = "as shapes depend on them[\\s\\S]*lt.Recurrence"
    with pytest.raises(lt.LuxtorchError, match=text):
        vmap(lambda x, n: layer(Inputs(x, n), ps, st)[0][0])(x[None], lengths[None])
    for given in (lengths, (2, 4, 1)):
        with pytest.raises(lt.LuxtorchError, match=text):
            lt.jit(lambda x, n: layer(Inputs(x, n), ps, st)[0][0], backend="replay")(x, given)


@pytest.mark.slow
def test_sequences_packed_inside_break_a_compiled_graph(draw):
    layer, ps, st = from_torch(Padded("GRU", {}, False, None))
    x = Inputs(draw(4, 3, 3), torch.tensor([2, 4, 1]))
    compiled = torch.compile(lambda ps: layer(x, ps, st)[0], backend="aot_eager")
    torch.testing.assert_close(compiled(ps), layer(x, ps, st)[0])


@pytest.mark.parametrize("lengths", [[5, 4, 1], [4, 0, 1]], ids=str)
def test_lengths_that_do_not_fit_are_refused(draw, lengths):
    layer, ps, st = from_torch(Padded("LSTM", {}, False, None))
    x = draw(4, 3, 3)

    def run(ps):
        return layer(Inputs(x, lengths), ps, st)[0][0]

    for call in (run, lambda ps: jvp(run, (ps,), (ps,))):
        with pytest.raises(lt.LuxtorchError, match="length"):
            call(ps)
