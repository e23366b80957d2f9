"""Sequences of different lengths in one batch: each is computed as if it were alone, without padding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import luxtorch as lt
from luxtorch import BidirectionalRNN, Cell, GRUCell, LSTMCell, Recurrence, RNNCell, StackedCell
from luxtorch.core import tree_leaves, tree_map
from luxtorch.init import normal
from luxtorch.testing import check_derivatives
from luxtorch.testing._orders import QUICK

TIME, LENGTHS = 5, (3, 5, 0, 1)


class Leaky(Cell):
    """A cell of somebody else's: its carry has a tuple inside, and its output is a dict."""

    def initial_parameters(self, key):
        return {"rate": lt.random.uniform(key, (2,))}

    def initial_carry(self, x, ps, st):
        return (torch.ones_like(x), (x.new_zeros(x.shape[:-1]),)), st

    def step(self, x, carry, ps, st):
        level, (count,) = carry
        level = level + ps["rate"] * (x - level)
        return ({"sum": level.sum(-1), "level": level.tanh()}, (level, (count + 1,))), st


CELLS = {
    "rnn": RNNCell(2, 3, "relu"),
    "softplus": RNNCell(2, 3, "softplus"),
    "lstm": LSTMCell(2, 3),
    "lstm without bias": LSTMCell(2, 3, bias=False),
    "learned": LSTMCell(2, 3, train_state=True, train_memory=True, init_state=normal, init_memory=normal),
    "gru": GRUCell(2, 3),
    "stack": StackedCell(GRUCell(2, 4), LSTMCell(4, 3, train_state=True, init_state=normal)),
    "another": Leaky(),
}
each_cell = pytest.mark.parametrize("name", CELLS)


@pytest.fixture
def draw(make_key):
    return lambda *shape: lt.random.normal(make_key(), shape, dtype=torch.float64)


def as_lengths(make_key):
    return torch.tensor(LENGTHS)


def as_mask(make_key):
    return torch.arange(TIME) < torch.tensor(LENGTHS)[:, None]


def as_mask_with_holes(make_key):
    """As many steps, at any places."""
    order = lt.random.uniform(make_key(), (len(LENGTHS), TIME)).argsort(-1)
    return as_mask(make_key).take_along_dim(order, 1)


AS = (as_lengths, as_mask, as_mask_with_holes)


def places(steps):
    """Return for each sequence the numbers of the steps that count."""
    if steps.dtype != torch.bool:
        return [list(range(n)) for n in steps.tolist()]
    return [row.nonzero().flatten().tolist() for row in steps]


def each_alone(cell, ps, st, xs, steps, start=None):
    """Return what `Recurrence` returns for each sequence alone: outputs at the places of the steps, and the carries."""
    layer, found = Recurrence(cell, return_sequence=True, return_carry=True), []
    for n, rows in enumerate(places(steps)):
        x = xs[n, rows]
        carry = tree_map(lambda leaf, n=n: leaf[n], start) if start else None
        (y, carry), _ = layer((x, carry), ps, st)
        spread = tree_map(
            lambda leaf, rows=rows: leaf.new_zeros(TIME, *leaf.shape[1:]).index_put(
                (torch.tensor(rows, dtype=torch.int64),), leaf
            ),
            y,
        )
        found.append((spread, carry))
    return tree_map(lambda *leaves: torch.stack(leaves), *found)


def swapped(steps, batch_first):
    return steps if batch_first or steps.ndim == 1 else steps.mT


@each_cell
@pytest.mark.parametrize(("form", "batch_first"), list(product(AS, (True, False))))
def test_each_sequence_is_run_as_if_alone(make_key, draw, name, form, batch_first):
    cell, steps, xs = CELLS[name], form(make_key), draw(len(LENGTHS), TIME, 2)
    ps, st = lt.f64(lt.setup(make_key(), cell))
    layer = Recurrence(cell, batch_first=batch_first, return_sequence=True, return_carry=True)
    given = xs if batch_first else xs.transpose(0, 1)
    start = None
    for _ in range(2):
        expected = each_alone(cell, ps, st, xs, steps, start)
        (ys, carry), _ = layer((given, start, swapped(steps, batch_first)), ps, st)
        ys = ys if batch_first else tree_map(lambda leaf: leaf.transpose(0, 1), ys)
        torch.testing.assert_close((ys, carry), expected)
        (y, again), _ = Recurrence(cell, batch_first=batch_first, return_carry=True)(
            (given, start, swapped(steps, batch_first)), ps, st
        )
        torch.testing.assert_close(again, carry)
        for n, rows in enumerate(places(steps)):
            for leaf, all_leaves in zip(tree_leaves(y), tree_leaves(ys), strict=True):
                assert torch.equal(leaf[n], all_leaves[n, rows[-1]] if rows else torch.zeros_like(leaf[n]))
        start = carry  # and from there on
    one, two = layer((given, None, swapped(steps, batch_first)), ps, st), layer((given, None, None), ps, st)
    assert not torch.equal(tree_leaves(one)[0], tree_leaves(two)[0])


@each_cell
def test_one_sequence_without_a_batch(make_key, draw, name):
    cell, x = CELLS[name], draw(TIME, 2)
    layer = Recurrence(cell, return_sequence=True, return_carry=True)
    ps, st = lt.f64(lt.setup(make_key(), layer))
    (y, carry), _ = layer(x[:3], ps, st)
    for steps in (torch.tensor(3), torch.arange(TIME) < 3):
        (ys, after), _ = layer((x, None, steps), ps, st)
        torch.testing.assert_close((tree_map(lambda leaf: leaf[:3], ys), after), (y, carry))
        assert not any(leaf[3:].any() for leaf in tree_leaves(ys))


def total(tree):
    return sum((leaf.sin() * torch.linspace(1, 2, leaf.numel()).view(leaf.shape)).sum() for leaf in tree_leaves(tree))


@each_cell
@pytest.mark.parametrize("form", AS)
def test_derivatives_are_those_of_each_alone(make_key, draw, name, form):
    cell, steps, xs = CELLS[name], form(make_key), draw(len(LENGTHS), TIME, 2)
    ps, st = lt.f64(lt.setup(make_key(), cell))
    layer = Recurrence(cell, return_sequence=True, return_carry=True)

    def loss(ps, xs, steps=steps):
        return total(layer((xs, None, steps), ps, st)[0])

    def alone(ps, xs):
        return total(each_alone(cell, ps, st, xs, steps))

    wanted = grad(alone, (0, 1))(ps, xs)
    padding = torch.ones(len(LENGTHS), TIME, dtype=torch.bool)
    for n, rows in enumerate(places(steps)):
        padding[n, rows] = False
    spoilt = xs.masked_fill(padding[..., None], torch.nan)  # nobody looks at it
    for given in (xs, spoilt):
        torch.testing.assert_close(grad(loss, (0, 1))(ps, given), wanted)
        leaves, structure = torch.utils._pytree.tree_flatten((ps, given))
        taped = [leaf.clone().requires_grad_() for leaf in leaves]
        loss(*structure.unflatten(taped)).backward()
        torch.testing.assert_close(structure.unflatten([leaf.grad for leaf in taped]), wanted)
        jitted = lt.jit(lambda ps, xs, steps: grad(loss, (0, 1))(ps, xs, steps), backend="replay")
        torch.testing.assert_close(jitted(ps, given, steps), wanted)
    along = tree_map(torch.ones_like, (ps, xs))
    torch.testing.assert_close(jvp(loss, (ps, xs), along), jvp(alone, (ps, xs), along))
    models = tree_map(lambda leaf: torch.stack([leaf, leaf / 2]), ps)
    torch.testing.assert_close(vmap(grad(loss), (0, None))(models, xs), vmap(grad(alone), (0, None))(models, xs))
    # Lengths may differ between what vmap runs.
    many = torch.stack([steps, steps.flip(0)])
    torch.testing.assert_close(vmap(loss, (None, None, 0))(ps, xs, many)[1], loss(ps, xs, many[1]))


@pytest.mark.parametrize("words", [("RF", "FR", "FF", "rf"), pytest.param(QUICK, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "stack", "another"])
def test_derivatives_of_every_order(make_key, draw, name, words):
    cell = CELLS[name] if name != "rnn" else CELLS["softplus"]
    layer = Recurrence(cell, return_sequence=True, return_carry=True)
    ps, st = lt.f64(lt.setup(make_key(), layer))
    for form in AS[::2]:
        steps = form(make_key)[:2]
        check_derivatives(
            lambda ps, xs, steps=steps: layer((xs, None, steps), ps, st)[0],
            ps,
            draw(2, TIME, 2),
            rng=make_key(),
            words=words,
        )


@pytest.mark.parametrize(("form", "batch_first", "kind"), list(product(AS, (True, False), ("lstm", "gru", "stack"))))
def test_both_directions_begin_at_the_ends_of_each_sequence(make_key, draw, form, batch_first, kind):
    layer = BidirectionalRNN(CELLS[kind], batch_first=batch_first, return_carry=True)
    ps, st = lt.f64(lt.setup(make_key(), layer))
    steps, xs = form(make_key), draw(len(LENGTHS), TIME, 2)
    given = xs if batch_first else xs.transpose(0, 1)
    (ys, carries), _ = layer((given, None, swapped(steps, batch_first)), ps, st)
    ys = ys if batch_first else ys.transpose(0, 1)
    for n, rows in enumerate(places(steps)):
        (y, alone), _ = layer(xs[n, rows], ps, st)
        torch.testing.assert_close(ys[n, rows], y)
        torch.testing.assert_close(tree_map(lambda leaf, n=n: leaf[n], carries), alone)
        assert not ys[n, [t for t in range(TIME) if t not in rows]].any()
    (again, _), _ = layer((given, carries, swapped(steps, batch_first)), ps, st)
    assert not torch.equal(again, ys if batch_first else ys.transpose(0, 1))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_both_directions_are_torchs(make_key, draw, kind):
    module = getattr(nn, kind)(2, 3, batch_first=True, bidirectional=True, dtype=torch.float64)
    lengths, xs = torch.tensor([3, 5, 1]), draw(3, TIME, 2)
    packed = pack_padded_sequence(xs, lengths, True, enforce_sorted=False)
    y, last = module(packed)
    expected, _ = pad_packed_sequence(y, True)
    cell = {"RNN": RNNCell, "LSTM": LSTMCell, "GRU": GRUCell}[kind](2, 3)
    layer = BidirectionalRNN(cell, return_carry=True)
    weights = {name: value.detach() for name, value in module.named_parameters()}
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ps = {
        "forward_rnn": {name: weights[f"{name}_l0"] for name in names},
        "backward_rnn": {name: weights[f"{name}_l0_reverse"] for name in names},
    }
    (ys, carries), _ = layer((xs, None, lengths), ps, lt.initial_states(0, layer))
    torch.testing.assert_close(ys, expected.detach())
    last = last if isinstance(last, tuple) else (last,)
    torch.testing.assert_close(carries, tuple(tuple(part[way].detach() for part in last) for way in range(2)))


def test_half_precision_and_autocast(make_key):
    layer = Recurrence(LSTMCell(2, 3), return_sequence=True, return_carry=True)
    ps, st = lt.setup(make_key(), layer)
    x, lengths = lt.random.normal(make_key(), (2, 4, 2)), torch.tensor([2, 4])
    expected, _ = layer((x, None, lengths), ps, st)
    for dtype in (torch.bfloat16, torch.float16):
        cast = lt.bf16 if dtype == torch.bfloat16 else lt.f16
        got, _ = layer((x.to(dtype), None, lengths), cast(ps), st)
        torch.testing.assert_close(lt.f32(got), expected, rtol=0.1, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = layer((x, None, lengths), ps, st)
    torch.testing.assert_close(lt.f32(got), expected, rtol=0.1, atol=0.05)


def test_no_steps_at_all(make_key):
    layer = Recurrence(GRUCell(2, 3), return_sequence=True, return_carry=True)
    ps, st = lt.setup(make_key(), layer)
    x = torch.ones(2, 0, 2)
    torch.testing.assert_close(layer((x, None, torch.tensor([0, 0])), ps, st), layer(x, ps, st))


class Counter(Cell):
    def initial_carry(self, x, ps, st):
        return x.new_zeros(()), st

    def step(self, x, carry, ps, st):
        return (x, carry + 1), st


X = torch.ones(2, 3, 2)
WRONG = {
    "too long": ((X, None, torch.tensor([2, 4])), "lengths must be from 0 to 3"),
    "negative": ((X, None, torch.tensor([2, -1])), "lengths must be from 0 to 3"),
    "too many": ((X, None, torch.tensor([2, 2, 2])), "lengths has the wrong shape[\\s\\S]*\\(2,\\)[\\s\\S]*\\(3,\\)"),
    "mask": ((X, None, torch.ones(3, 2).bool()), "mask has the wrong shape[\\s\\S]*\\(2, 3\\)[\\s\\S]*\\(3, 2\\)"),
    "floats": ((X, None, torch.ones(2)), "lengths must be a tensor of integers[\\s\\S]*float32"),
    "a list": ((X, None, [2, 3]), "lengths must be a tensor of integers[\\s\\S]*a list"),
    "four parts": ((X, None, None, None), "length 4"),
}


@pytest.mark.parametrize("layer", [Recurrence(GRUCell(2, 3)), BidirectionalRNN(GRUCell(2, 3))], ids=["one", "both"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_lengths_are_explained(layer, name):
    x, text = WRONG[name]
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.LuxtorchError, match=text):
        layer(x, ps, st)
    if isinstance(x[2], torch.Tensor) and len(x) == 3:
        with pytest.raises(lt.LuxtorchError, match=text):
            vmap(lambda steps: layer((X, None, steps), ps, st)[0])(x[2][None])


def test_a_carry_that_sequences_share_is_explained():
    with pytest.raises(lt.LuxtorchError, match="each sequence must have a carry of its own"):
        Recurrence(Counter())((X, None, torch.tensor([1, 2])), {}, {})


@pytest.mark.parametrize(
    "model",
    [
        lt.Chain(Recurrence(GRUCell(2, 3), return_sequence=True), Recurrence(GRUCell(3, 3))),
        lt.Chain(BidirectionalRNN(GRUCell(2, 3)), lt.Dense(6, 2), BidirectionalRNN(GRUCell(2, 3))),
        lt.RepeatedLayer(Recurrence(GRUCell(2, 2), return_sequence=True), 3),
    ],
)
def test_lengths_are_not_lost(model):
    ps, st = lt.setup(0, model)
    with pytest.raises(lt.InputError, match="passes lengths only"):
        model((X, None, torch.tensor([1, 2])), ps, st)
    model((X, None), ps, st)
    model((X, None, None), ps, st)


def test_lengths_may_stand_in_a_chain_of_one(draw):
    model = lt.Chain(Recurrence(StackedCell(GRUCell(2, 3), GRUCell(3, 3))), lt.Dense(3, 1))
    ps, st = lt.setup(0, model)
    y, _ = model((X, None, torch.tensor([1, 2])), ps, st)
    torch.testing.assert_close(y[0], model(X[0, :1], ps, st)[0])
