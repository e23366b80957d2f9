"""Recurrent layers: initial values and carries, sequences in parts, states, errors and prints."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import BidirectionalRNN, Cell, GRUCell, LSTMCell, Recurrence, RNNCell, StackedCell, StatefulRecurrentCell
from luxtorch.init import glorot_uniform, normal, ones, zeros
from luxtorch.layers.recurrent._fused import stepwise


class Counter(Cell):
    """Count the steps, in the carry and in the state."""

    def initial_carry(self, x, ps, st):
        return x.new_zeros(x.shape[:-1]), st

    def initial_states(self, key):
        return {"count": torch.zeros((), device=key.device)}

    def step(self, x, carry, ps, st):
        return ((x, carry + 1), carry + 1), {"count": st["count"] + 1}


CELLS = {
    "rnn": RNNCell(2, 3),
    "softplus": RNNCell(2, 3, "softplus"),
    "lstm": LSTMCell(2, 3),
    "gru": GRUCell(2, 3),
    "learned": LSTMCell(2, 3, train_state=True, train_memory=True, init_state=normal, init_memory=normal),
    "stack": StackedCell(GRUCell(2, 4), LSTMCell(4, 3, train_state=True, init_state=ones)),
}
each_cell = pytest.mark.parametrize("name", CELLS)


@pytest.mark.parametrize(("kind", "gates"), [(RNNCell, 1), (LSTMCell, 4), (GRUCell, 3)])
def test_each_gate_is_initialized_by_itself(make_key, kind, gates):
    ps, st = lt.setup(make_key(), kind(20, 30))
    for name, width in (("weight_ih", 20), ("weight_hh", 30)):
        blocks = ps[name].chunk(gates)
        assert ps[name].shape == (gates * 30, width)
        for block in blocks:
            bound = (6 / (width + 30)) ** 0.5
            assert 0.95 * bound < block.abs().max() <= bound
        assert all(not torch.equal(blocks[0], other) for other in blocks[1:])
    assert torch.equal(ps["bias_ih"], torch.zeros(30 * gates)) and torch.equal(ps["bias_hh"], ps["bias_ih"])
    assert st == {}


def test_a_tuple_of_initializers_has_one_for_each_gate():
    layer = LSTMCell(2, 3, init_bias=[zeros, ones, zeros, zeros], init_weight=(ones, ones, zeros, zeros))
    ps, _ = lt.setup(0, layer)
    assert ps["bias_ih"].tolist() == ps["bias_hh"].tolist() == [0] * 3 + [1] * 3 + [0] * 6
    assert torch.equal(ps["weight_hh"], torch.cat([torch.ones(6, 3), torch.zeros(6, 3)]))
    other = lt.setup(0, LSTMCell(2, 3, init_weight=ones, init_recurrent_weight=zeros))[0]
    assert other["weight_ih"].min() == 1 and other["weight_hh"].max() == 0
    assert layer == LSTMCell(2, 3, init_bias=(zeros, ones, zeros, zeros), init_weight=(ones, ones, zeros, zeros))


def test_options_leave_the_other_parameters_as_they_are():
    plain, learned = lt.setup(0, LSTMCell(2, 3))[0], lt.setup(0, CELLS["learned"])[0]
    assert set(learned) - set(plain) == {"hidden_state", "memory"}
    assert all(torch.equal(plain[name], learned[name]) for name in plain)


@pytest.mark.parametrize("sequence", [False, True])
def test_a_learned_start_is_that_of_every_sequence_and_is_trained(make_key, sequence):
    cell = CELLS["learned"]
    layer, x = (Recurrence(cell), lt.random.normal(make_key(), (4, 5, 2))) if sequence else (cell, torch.ones(4, 2))
    ps, st = lt.setup(make_key(), layer)
    carry = (ps["hidden_state"].expand(4, 3), ps["memory"].expand(4, 3))
    torch.testing.assert_close(layer(x, ps, st), layer((x, carry), ps, st))
    ps = lt.core.tree_map(lambda leaf: leaf.requires_grad_(), ps)
    y = layer(x, ps, st)[0]
    (y if sequence else y[0]).sum().backward()
    assert ps["hidden_state"].grad.abs().min() > 0 and ps["memory"].grad.abs().min() > 0


def test_a_drawn_start_is_another_for_each_sequence_and_each_call(make_key):
    cell = LSTMCell(2, 3, train_state=True, init_state=ones, init_memory=normal)
    ps, st = lt.setup(make_key(), cell)
    (h, c), st_1 = cell.initial_carry(torch.ones(4, 2), ps, st)
    assert torch.equal(h, torch.ones(4, 3)) and len(c.unique()) == 12
    (_, again), _ = cell.initial_carry(torch.ones(4, 2), ps, st)
    (_, other), _ = cell.initial_carry(torch.ones(4, 2), ps, st_1)
    assert torch.equal(c, again) and not torch.equal(c, other)
    (_, _), st_2 = cell((torch.ones(4, 2), (h, c)), ps, st_1)
    assert torch.equal(st_2["rng"], st_1["rng"])
    doubled = cell.initial_carry(torch.ones(4, 2).double(), lt.f64(ps), st)[0]
    assert [part.dtype for part in doubled] == [torch.float64] * 2


@each_cell
@pytest.mark.parametrize("batch", [(), (4,)])
def test_a_sequence_is_its_steps_and_its_parts(make_key, name, batch):
    cell = CELLS[name]
    ps, st = lt.setup(make_key(), cell)
    xs = lt.random.normal(make_key(), (6, *batch, 2))
    layer = Recurrence(cell, batch_first=False, return_sequence=True, return_carry=True)
    (ys, last), _ = layer(xs, ps, st)
    carry, outputs = None, []
    for x in xs:
        (y, carry), _ = cell(x if carry is None else (x, carry), ps, st)
        outputs.append(y)
    torch.testing.assert_close((ys, last), (torch.stack(outputs), carry))
    (first, carry), _ = layer(xs[:2], ps, st)
    (second, carry), _ = layer((xs[2:], carry), ps, st)
    torch.testing.assert_close((ys, last), (torch.cat([first, second]), carry))
    (y, carry), _ = Recurrence(cell, batch_first=False, return_carry=True)((xs, None), ps, st)
    torch.testing.assert_close((ys[-1], last), (y, carry))


@each_cell
@pytest.mark.parametrize("batch", [(), (0,), (4,)])
def test_a_sequence_without_steps_has_no_last_output(make_key, name, batch):
    cell = CELLS[name]
    ps, st = lt.setup(make_key(), cell)
    xs = torch.ones(*batch, 0, 2)
    layer = Recurrence(cell, return_sequence=True, return_carry=True)
    (ys, carry), _ = layer(xs, ps, st)
    assert ys.shape == (*batch, 0, 3)
    torch.testing.assert_close(carry, cell.initial_carry(torch.ones(*batch, 2), ps, st)[0])
    again = layer((xs, carry), ps, st)[0][1]
    torch.testing.assert_close(carry, again)
    with pytest.raises(lt.InputError, match="at least one step[\\s\\S]*return_sequence=True"):
        Recurrence(cell)(xs, ps, st)


def test_a_cell_of_ones_own_counts():
    layer = Recurrence(Counter(), return_sequence=True, return_carry=True)
    ps, st = lt.setup(0, layer)
    ((xs, counts), carry), st = layer(torch.ones(2, 3, 1), ps, st)
    assert xs.shape == (2, 3, 1) and counts.tolist() == [[1, 2, 3]] * 2 and carry.tolist() == [3, 3]
    assert st["count"] == 3
    ((xs, counts), carry), st = layer(torch.ones(2, 0, 1), ps, st)
    assert xs.shape == (2, 0, 1) and counts.shape == (2, 0) and carry.tolist() == [0, 0] and st["count"] == 3


@each_cell
def test_no_step_costs_a_sequence_of_gradient(make_key, name):
    # An index into a sequence has a gradient of the size of the sequence: a whole one for each step is quadratic.
    cell = CELLS[name]
    if isinstance(cell, StackedCell):
        return
    ps, st = lt.setup(make_key(), cell)
    xs = lt.random.normal(make_key(), (5, 4, 2)).requires_grad_()
    weights = [ps[name].requires_grad_() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    ys, _ = stepwise(cell, xs, cell.initial_carry(xs[0], ps, st)[0], weights)
    seen, todo = set(), [ys.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    names = [node.name() for node in seen]
    assert not any(kind in text for text in names for kind in ("Select", "Index"))
    assert sum("Unbind" in text for text in names) == 1


@pytest.mark.parametrize("batch_size", [None, 4])
@each_cell
def test_a_stateful_cell_walks_through_the_sequence(make_key, name, batch_size):
    cell = CELLS[name]
    layer = StatefulRecurrentCell(cell, batch_size)
    ps, fresh = lt.setup(make_key(), layer)
    batch = () if batch_size is None else (batch_size,)
    xs = lt.random.normal(make_key(), (3, *batch, 2))
    expected, _ = Recurrence(cell, batch_first=False, return_sequence=True)(
        xs, ps, lt.initial_states(0, Recurrence(cell))
    )
    st = fresh
    for _ in range(2):
        for x, wanted in zip(xs, expected, strict=True):
            y, st = layer(x, ps, st)
            torch.testing.assert_close(y, wanted)
        assert bool(st["started"])
        st = lt.update_state(st, "started", torch.tensor(False))
    assert not bool(fresh["started"])


def test_a_stateful_cell_keeps_the_precision_of_its_state(make_key):
    layer = StatefulRecurrentCell(LSTMCell(2, 3))
    ps, st = lt.setup(make_key(), layer)
    for _ in range(2):
        y, st = layer(torch.ones(2).half(), lt.f16(ps), st)
        assert y.dtype == torch.float16 and [part.dtype for part in st["carry"].values()] == [torch.float32] * 2


def test_a_stateful_cell_is_compiled_once(make_key):
    layer = StatefulRecurrentCell(LSTMCell(2, 3), 4)
    ps, st = lt.setup(make_key(), layer)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, ps, st: layer(x, ps, st), fullgraph=True, backend=count)
    x = lt.random.normal(make_key(), (4, 2))
    for _ in range(3):
        (y, new), (expected, st) = compiled(x, ps, st), layer(x, ps, st)
        torch.testing.assert_close((y, new["carry"]), (expected, st["carry"]))
    assert len(graphs) == 1


def test_a_stack_drops_on_the_way_up_while_training(make_key):
    everything = Recurrence(StackedCell(GRUCell(2, 3), RNNCell(3, 4, bias=False), dropout=1.0), return_sequence=True)
    ps, st = lt.setup(make_key(), everything)
    x = lt.random.normal(make_key(), (2, 5, 2))
    assert torch.equal(everything(x, ps, st)[0], torch.zeros(2, 5, 4))
    layer = Recurrence(StackedCell(GRUCell(2, 3), GRUCell(3, 4), GRUCell(4, 4), dropout=0.5), return_sequence=True)
    ps, st = lt.setup(make_key(), layer)
    y, new = layer(x, ps, st)
    assert torch.equal(y, layer(x, ps, st)[0]) and not torch.equal(y, layer(x, ps, new)[0])
    by_steps = torch.func.vjp(lambda x: layer(x, ps, st)[0], x)[0]
    torch.testing.assert_close(y, by_steps)  # the mask does not depend on the path
    quiet = Recurrence(StackedCell(GRUCell(2, 3), GRUCell(3, 4), GRUCell(4, 4)), return_sequence=True)
    assert "dropout" not in lt.setup(0, quiet)[0]
    plain = {name: ps[name] for name in ("layer_1", "layer_2", "layer_3")}
    wanted, _ = quiet(x, plain, dict.fromkeys(plain, {}))
    assert torch.equal(layer(x, ps, lt.test_mode(st))[0], wanted)


def test_both_directions_are_merged_as_asked_for(make_key):
    x = lt.random.normal(make_key(), (2, 5, 2))
    make = {merge: BidirectionalRNN(GRUCell(2, 3), merge=merge) for merge in ("cat", None, torch.maximum)}
    ps, st = lt.setup(make_key(), make["cat"])
    assert list(ps) == ["forward_rnn", "backward_rnn"]
    assert not torch.equal(ps["forward_rnn"]["weight_hh"], ps["backward_rnn"]["weight_hh"])
    (y, z), _ = make[None](x, ps, st)
    assert torch.equal(make["cat"](x, ps, st)[0], torch.cat([y, z], -1))
    assert torch.equal(make[torch.maximum](x, ps, st)[0], torch.maximum(y, z))
    there, _ = Recurrence(GRUCell(2, 3), return_sequence=True)(x.flip(1), ps["backward_rnn"], {})
    assert torch.equal(z, there.flip(1))


def test_both_directions_continue_from_carries(make_key):
    layer = BidirectionalRNN(LSTMCell(2, 3), GRUCell(2, 3), return_carry=True)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 5, 2))
    (_, (forward, backward)), _ = layer(x, ps, st)
    torch.testing.assert_close(layer((x, None), ps, st), layer(x, ps, st))
    (y, _), _ = layer((x, (forward, backward)), ps, st)
    expected, _ = Recurrence(LSTMCell(2, 3), return_sequence=True)((x, forward), ps["forward_rnn"], {})
    assert torch.equal(y[..., :3], expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LSTMCell(0, 3), "in_features must be at least 1"),
        (lambda: GRUCell(2, 2.5), "hidden_size must be an integer"),
        (lambda: GRUCell(2, 3, init_bias=(zeros, zeros)), "init_bias must be one initializer, or a tuple of 3"),
        (lambda: RNNCell(2, 3, "tan"), "no activation 'tan'"),
        (lambda: Recurrence(lt.Dense(2, 3)), "cell must be an lt.Cell[\\s\\S]*LSTMCell[\\s\\S]*lt.Cell"),
        (lambda: Recurrence(LSTMCell), "cell must be an lt.Cell"),
        (lambda: StackedCell(), "at least one cell"),
        (lambda: StackedCell(GRUCell(2, 3), lt.Dense(3, 3)), "cell must be an lt.Cell"),
        (lambda: StackedCell(GRUCell(2, 3), dropout=1.5), "between 0 and 1"),
        (lambda: StatefulRecurrentCell(Counter()), "in_features"),
        (lambda: BidirectionalRNN(GRUCell(2, 3), merge="add"), '"cat", a function'),
    ],
)
def test_a_wrong_construction_is_explained(make, text):
    with pytest.raises(lt.InputError, match=text):
        make()


ONE = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("layer", "x", "text"),
    [
        (LSTMCell(2, 3), torch.ones(4, 5), "2 features[\\s\\S]*\\(4, 5\\)"),
        (LSTMCell(2, 3), (torch.ones(4, 2), (ONE,)), "\\(h, c\\) of shape \\(4, 3\\)[\\s\\S]*\\(4, 3\\)"),
        (GRUCell(2, 3), (torch.ones(4, 2), ONE), "\\(h,\\) of shape \\(4, 3\\)"),
        (GRUCell(2, 3), (torch.ones(4, 2), (torch.ones(5, 3),)), "of shape \\(4, 3\\)[\\s\\S]*\\(5, 3\\)"),
        (GRUCell(2, 3), 3.0, "model \\(GRUCell"),
        (Recurrence(LSTMCell(2, 3)), torch.ones(4), "must be a sequence[\\s\\S]*call the cell itself"),
        (Recurrence(LSTMCell(2, 3)), [torch.ones(4, 2)], "must be a sequence[\\s\\S]*list"),
        (Recurrence(LSTMCell(2, 3)), torch.ones(4, 5, 6), "2 features[\\s\\S]*\\(5, 4, 6\\)"),
        (Recurrence(GRUCell(2, 3)), (torch.ones(4, 5, 2), (torch.ones(5, 3),)), "\\(h,\\) of shape \\(4, 3\\)"),
        (
            Recurrence(StackedCell(GRUCell(2, 3), GRUCell(4, 3))),
            torch.ones(4, 5, 2),
            "model.layer_2[\\s\\S]*4 features",
        ),
        (StackedCell(GRUCell(2, 3), GRUCell(4, 3)), torch.ones(4, 2), "model.layer_2 \\(GRUCell 4 -> 3\\)"),
        (
            StackedCell(GRUCell(2, 3)),
            (torch.ones(4, 2), ((ONE,), (ONE,))),
            "tuple of length 1[\\s\\S]*tuple of length 2",
        ),
        (StatefulRecurrentCell(GRUCell(2, 3), 4), torch.ones(5, 2), "\\(4, 2\\)[\\s\\S]*\\(5, 2\\)[\\s\\S]*batch_size"),
        (BidirectionalRNN(GRUCell(2, 3)), torch.ones(4, 5, 6), "model.forward_rnn[\\s\\S]*2 features"),
    ],
)
def test_a_wrong_input_is_explained(make_key, layer, x, text):
    ps, st = lt.setup(make_key(), layer)
    with pytest.raises(lt.LuxtorchError, match=text):
        layer(x, ps, st)


@pytest.mark.parametrize("layer", [LSTMCell(2, 3), Recurrence(LSTMCell(2, 3)), Recurrence(StackedCell(GRUCell(2, 3)))])
def test_another_dtype_is_explained(layer):
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.DTypeError, match="float32, as the parameters"):
        layer(torch.ones(4, 5, 2, dtype=torch.float64), ps, st)


def test_parameters_of_other_shapes_do_not_reach_the_kernel(make_key):
    layer = Recurrence(LSTMCell(2, 3))
    ps, st = lt.setup(make_key(), layer)
    others = [{**ps, name: torch.ones(2, *value.shape)} for name, value in ps.items()]
    others.append({name: torch.cat([value, value]) for name, value in ps.items()})
    for other in others:
        with pytest.raises(lt.LuxtorchError):
            layer(torch.ones(4, 5, 2), other, st)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (RNNCell(2, 3), "RNNCell(2 -> 3, tanh)"),
        (RNNCell(2, 3, "relu", bias=False), "RNNCell(2 -> 3, relu, bias=False)"),
        (LSTMCell(2, 3, train_state=True, train_memory=True), "LSTMCell(2 -> 3, train_state=True, train_memory=True)"),
        (GRUCell(2, 3), "GRUCell(2 -> 3)"),
        (Recurrence(GRUCell(2, 3)), "Recurrence()"),
        (
            Recurrence(GRUCell(2, 3), batch_first=False, return_sequence=True, return_carry=True),
            "Recurrence(batch_first=False, return_sequence=True, return_carry=True)",
        ),
        (StatefulRecurrentCell(GRUCell(2, 3), 4), "StatefulRecurrentCell(batch_size=4)"),
        (BidirectionalRNN(GRUCell(2, 3)), "BidirectionalRNN()"),
        (BidirectionalRNN(GRUCell(2, 3), None, torch.add), "BidirectionalRNN(merge=add)"),
    ],
)
def test_layers_print_their_arguments(layer, text):
    assert f"{type(layer).__name__}({layer.extra_repr()})" == text
    assert repr(layer).startswith(type(layer).__name__)


def test_the_orders_of_arguments_are_those_of_lux():
    assert RNNCell(2, 3, torch.relu).activation is torch.relu
    assert LSTMCell(2, 3).init_recurrent_weight is glorot_uniform
    assert BidirectionalRNN(GRUCell(2, 3), LSTMCell(2, 3)).backward_rnn.cell == LSTMCell(2, 3)
