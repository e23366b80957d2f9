"""The box that keeps a layer's states, alone and under transforms."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import luxtorch as lt
from luxtorch import StatefulLayer
from luxtorch.core import named_leaves, tree_map

MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5))


@pytest.fixture
def box(make_key):
    return StatefulLayer(MODEL, *lt.setup(make_key(), MODEL))


@pytest.fixture
def x(make_key):
    return lt.random.normal(make_key(), (5, 3))


def same(a, b):
    a, b = dict(named_leaves(a)), dict(named_leaves(b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_calls_are_those_of_the_layer_with_its_states_threaded(box, x):
    ps, st = box.parameters, box.states
    for _ in range(3):
        y, st = MODEL(x, ps, st)
        assert torch.equal(box(x), y) and same(box.states, st)


def test_parameters_of_a_call_are_used_and_not_kept(box, x):
    ps, st = box.parameters, box.states
    doubled = tree_map(lambda leaf: 2 * leaf, ps)
    assert torch.equal(box(x, doubled), MODEL(x, doubled, st)[0]) and box.parameters is ps
    empty = StatefulLayer(MODEL, None, st)
    assert torch.equal(empty(x, doubled), MODEL(x, doubled, st)[0])
    with pytest.raises(lt.InputError, match="must be called with its parameters"):
        empty(x)


def test_modes_and_states_are_set_in_the_box(box, x):
    before = box.states
    assert box.test_mode() is box and not box.states["layer_3"]["training"]
    assert before["layer_3"]["training"]
    kept = box.states
    assert torch.equal(box(x), box(x)) and same(box.states, kept)
    assert box.train_mode() is box and box.states["layer_3"]["training"]
    assert box.update_state("running_mean", torch.ones(4)) is box
    assert torch.equal(box.states["layer_2"]["running_mean"], torch.ones(4))
    with pytest.raises(lt.KeyNameError, match="running_mean"):
        box.update_state("runing_mean", torch.ones(4))


def functions(layer_or_box, x):
    """The same function of parameters and of inputs, under each transform."""
    loss = lambda ps: (layer_or_box(x, ps) ** 2).sum()  # noqa: E731
    ones = lambda tree: tree_map(torch.ones_like, tree)  # noqa: E731
    return {
        "grad": torch.func.grad(loss),
        "vjp": lambda ps: torch.func.vjp(loss, ps)[1](torch.tensor(1.0)),
        "jvp": lambda ps: torch.func.jvp(loss, (ps,), (ones(ps),)),
        "jvp of grad": lambda ps: torch.func.jvp(torch.func.grad(loss), (ps,), (ones(ps),)),
        "hessian": torch.func.hessian(loss),
        "gradient of a derivative by x": torch.func.grad(
            lambda ps: (torch.func.jvp(lambda x: layer_or_box(x, ps), (x,), (torch.ones_like(x),))[1] ** 2).sum()
        ),
        "vmap over inputs": lambda ps: torch.vmap(lambda scale: layer_or_box(scale * x, ps))(torch.tensor([1.0, 2.0])),
        "vmap over models": lambda ps: torch.vmap(loss)(tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), ps)),
    }


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", functions(None, torch.ones(1)))
def test_inside_a_transform_the_output_is_right_and_the_box_as_it_was(box, x, name, compiled):
    box(x)
    st = box.states
    got = functions(box, x)[name]
    expected = functions(lambda x, ps: MODEL(x, ps, st)[0], x)[name](box.parameters)
    if compiled:
        got = torch.compile(got, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(got(box.parameters), expected, rtol=1e-4, atol=1e-5)
    assert box.states is st
    box(x)
    assert not same(box.states, st)


def test_a_compiled_call_keeps_its_states_in_one_graph(box, x):
    other = StatefulLayer(MODEL, box.parameters, box.states)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: box(x), fullgraph=True, backend=counting)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), other(x))
        assert same(box.states["layer_3"], other.states["layer_3"])
        torch.testing.assert_close(box.states["layer_2"]["running_mean"], other.states["layer_2"]["running_mean"])
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_box_made_inside_a_transform_keeps_states_there(make_key, x, compiled):
    ps, st = lt.setup(make_key(), MODEL)

    def loss(ps):
        box = StatefulLayer(MODEL, ps, st)
        _, slope = torch.func.jvp(box, (x,), (torch.ones_like(x),))
        return (box(x) + slope).sum(), box.states

    gradient = torch.func.grad(loss, has_aux=True)
    if compiled:
        gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    _, new = gradient(ps)
    _, expected = MODEL(x, ps, st)  # one call kept its states, the one inside jvp did not
    torch.testing.assert_close(new["layer_2"]["running_mean"], expected["layer_2"]["running_mean"])
    assert torch.equal(new["layer_3"]["rng"], expected["layer_3"]["rng"])


def test_an_ordinary_backward_reaches_the_parameters_and_the_states_stay_detached(box, x):
    box.parameters = tree_map(lambda leaf: leaf.clone().requires_grad_(), box.parameters)
    box(x).sum().backward()
    assert all(leaf.grad is not None for _, leaf in named_leaves(box.parameters))
    assert not any(leaf.requires_grad for _, leaf in named_leaves(box.states))


def test_a_box_takes_a_component_vector(box, x):
    ps = lt.ComponentVector(box.parameters)
    plain = StatefulLayer(MODEL, box.parameters, box.states)
    box.parameters = ps
    torch.testing.assert_close(box(x), plain(x))
    assert isinstance(torch.func.grad(lambda ps: box(x, ps).sum())(ps), lt.ComponentVector)


def test_a_box_is_compared_by_identity_and_copied_with_its_states(box, x):
    twin = StatefulLayer(MODEL, box.parameters, box.states)
    assert box != twin and len({box, twin, box}) == 2 and not isinstance(box, lt.Layer)
    file = io.BytesIO()
    torch.save(box, file)
    file.seek(0)
    for copied in (copy.copy(box), copy.deepcopy(box), torch.load(file, weights_only=False)):
        assert copied.layer == MODEL and same(copied.states, box.states)
        assert torch.equal(copied(x), twin(x))
        twin.states = box.states


def test_an_attribute_that_is_not_there_is_explained(box):
    with pytest.raises(AttributeError, match="Did you mean 'states'"):
        box.state  # noqa: B018
    assert not hasattr(box, "__fspath__")


def test_the_print_is_that_of_the_layer(box):
    assert repr(box) == f"StatefulLayer of {MODEL!r}"


def test_a_box_is_for_layers_and_errors_name_the_place(box):
    with pytest.raises(
        lt.InputError, match="A StatefulLayer must hold a layer[\\s\\S]*StatefulLayer\\(layer, ps, st\\)"
    ):
        StatefulLayer(box.parameters, MODEL, box.states)
    with pytest.raises(lt.InputError) as raised:
        box(torch.ones(2, 7))
    assert raised.value.where == "model.layer_1 (Dense 3 -> 4, tanh)"
