"""Cells, and what runs them over sequences: the laws."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import BidirectionalRNN, Cell, GRUCell, LSTMCell, Recurrence, RNNCell, StackedCell, StatefulRecurrentCell
from luxtorch.init import normal, ones


class Leaky(Cell):
    """A cell that somebody else might write: its carry is one tensor, and its output is another thing."""

    in_features: int

    def initial_parameters(self, key):
        return {"rate": lt.random.uniform(key, (self.in_features,))}

    def initial_carry(self, x, ps, st):
        return torch.zeros_like(x), st

    def step(self, x, carry, ps, st):
        carry = carry + ps["rate"] * (x - carry)
        return (carry.sum(-1, keepdim=True), carry), st


LEARNED = LSTMCell(2, 3, train_state=True, train_memory=True, init_state=normal, init_memory=normal)
DRAWN = LSTMCell(2, 3, train_state=True, init_memory=normal)
SEQUENCE = [(2, 2, 2)]

FORMS = {
    "RNNCell": (RNNCell(2, 3), [(4, 2)]),
    "RNNCell, softplus, no bias": (RNNCell(2, 3, "softplus", bias=False), [(4, 2)]),
    "RNNCell, learned": (RNNCell(2, 3, None, train_state=True, init_state=ones), [(4, 2)]),
    "LSTMCell": (LSTMCell(2, 3), [(4, 2), (2,)]),
    "LSTMCell without bias": (LSTMCell(2, 3, bias=False), [(4, 2)]),
    "LSTMCell, learned": (LEARNED, [(4, 2)]),
    "GRUCell": (GRUCell(2, 3), [(4, 2), (2,)]),
    "GRUCell without bias, drawn": (GRUCell(2, 3, bias=False, init_state=normal), [(4, 2)]),
    "StackedCell": (StackedCell(GRUCell(2, 3), LSTMCell(3, 2, train_memory=True)), [(4, 2)]),
    "StackedCell with dropout": (StackedCell(RNNCell(2, 4), Leaky(4), dropout=0.5), [(4, 2)]),
    "Recurrence of RNNCell": (Recurrence(RNNCell(2, 3)), SEQUENCE),
    "Recurrence of LSTMCell": (Recurrence(LSTMCell(2, 3), return_sequence=True), [(2, 3, 2), (3, 2)]),
    "Recurrence of GRUCell": (Recurrence(GRUCell(2, 3), return_carry=True), SEQUENCE),
    "Recurrence, time first": (Recurrence(GRUCell(2, 3), batch_first=False, return_sequence=True), SEQUENCE),
    "Recurrence, learned": (Recurrence(LEARNED, return_sequence=True), SEQUENCE),
    "Recurrence, drawn": (Recurrence(DRAWN, return_sequence=True, return_carry=True), SEQUENCE),
    "Recurrence of another cell": (Recurrence(Leaky(2), return_sequence=True, return_carry=True), SEQUENCE),
    "Recurrence of a stack": (Recurrence(StackedCell(LSTMCell(2, 3), GRUCell(3, 2)), return_sequence=True), SEQUENCE),
    "Recurrence of a stack with dropout": (
        Recurrence(StackedCell(DRAWN, GRUCell(3, 2, train_state=True), dropout=0.5), return_carry=True),
        SEQUENCE,
    ),
    "Recurrence of no steps": (Recurrence(LSTMCell(2, 3), return_sequence=True, return_carry=True), [(2, 0, 2)]),
    "Recurrence with lengths": (
        Recurrence(LSTMCell(2, 3), return_sequence=True, return_carry=True),
        [((2, 3, 2), ((2, 3), (2, 3)), torch.tensor([1, 3]))],
    ),
    "Recurrence of a stack with dropout, with lengths": (
        Recurrence(StackedCell(GRUCell(2, 3), GRUCell(3, 2), dropout=0.5), return_sequence=True),
        [((2, 3, 2), (((2, 3),), ((2, 2),)), torch.tensor([3, 1]))],
    ),
    "Recurrence of another cell with lengths": (
        Recurrence(Leaky(2), return_carry=True),
        [((2, 3, 2), (2, 2), torch.tensor([3, 2]))],
    ),
    "StatefulRecurrentCell": (StatefulRecurrentCell(LSTMCell(2, 3), batch_size=4), [(4, 2)]),
    "StatefulRecurrentCell, learned": (StatefulRecurrentCell(LEARNED), [(2,)]),
    "StatefulRecurrentCell of a stack with dropout": (
        StatefulRecurrentCell(StackedCell(DRAWN, Leaky(3), dropout=0.5), batch_size=4),
        [(4, 2)],
    ),
    "BidirectionalRNN": (BidirectionalRNN(LSTMCell(2, 3)), SEQUENCE),
    "BidirectionalRNN, added": (BidirectionalRNN(GRUCell(2, 3), RNNCell(2, 3), torch.add), SEQUENCE),
    "BidirectionalRNN, time first, with carries": (
        BidirectionalRNN(DRAWN, GRUCell(2, 2), None, batch_first=False, return_carry=True),
        SEQUENCE,
    ),
    "BidirectionalRNN with a mask": (
        BidirectionalRNN(GRUCell(2, 3)),
        [((2, 3, 2), (((2, 3),), ((2, 3),)), torch.tensor([[True, True, False], [False, True, True]]))],
    ),
}


def started(st):
    """Set states as after a first call."""
    return lt.update_state(st, "started", torch.tensor(True))


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMS if "Stateful" in name])
def test_every_law_holds_after_the_first_call(make_key, draw, name):
    layer, inputs = FORMS[name]
    lt.testing.check_layer(layer, *map(draw, inputs), rng=make_key(), modes=[started])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (4,)])
def test_the_laws_hold_from_a_carry_on(make_key, batch):
    layer = Recurrence(StackedCell(GRUCell(2, 3), LSTMCell(3, 3)), return_sequence=True)
    h = [lt.random.normal(make_key(), (*batch, 3)) for _ in range(3)]
    xs = lt.random.normal(make_key(), (*batch, 3, 2))
    lt.testing.check_layer(layer, (xs, ((h[0],), (h[1], h[2]))), rng=make_key(), modes=[lt.train_mode])
    x = xs[..., 0, :]
    lt.testing.check_layer(LSTMCell(2, 3), (x, (h[0], h[1])), rng=make_key(), modes=[lt.train_mode])
