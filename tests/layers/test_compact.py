"""Compact models: the laws, against containers written by hand, and the errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import luxtorch as lt
from luxtorch import StatefulLayer, compact, init_fn, non_trainable
from luxtorch.core import named_leaves, tree_map


@compact(dense=lt.Dense(3, 2), norm=lt.BatchNorm(2), dropout=lt.Dropout(0.5))
def normalized(m, x):
    return m.dropout(m.norm(m.dense(x)))


@compact(norm=lt.BatchNorm(3), dropout=lt.Dropout(0.3), dense=lt.Dense(3, 3, torch.tanh))
def twice(m, x):
    for _ in range(2):
        x = m.dropout(m.dense(m.norm(x)))
    return x


@compact(
    layers=[lt.Dense(3, 3, torch.tanh), lt.Dense(3, 3, torch.tanh), lt.Dropout(0.5)],
    heads={"mean": lt.Dense(3, 1), "rest": [lt.Dense(3, 2)]},
    scale=torch.tensor(2.0),
    n=2,
    activation=torch.tanh,
)
def grouped(m, x):
    for layer in m.layers:
        x = layer(x)
    return m.activation(m.heads["mean"](x) + m.heads["rest"][0](x) * m.scale**m.n)


@compact(
    weights=(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5])),
    shifts={"low": torch.tensor([0.1, 0.2, 0.3]), "high": init_fn(lt.init.normal, 3)},
    matrix=init_fn(lt.init.glorot_uniform, (2, 3)),
)
def parameters_only(m, x):
    return (x * m.weights[0] + m.weights[1] + m.shifts["low"] * m.shifts["high"]) @ m.matrix.T


@compact(
    count=non_trainable(torch.tensor(0)),
    mean=non_trainable(init_fn(lt.init.zeros, (3,))),
    pair=non_trainable([torch.zeros(3), torch.ones(())]),
    rng=non_trainable(init_fn(torch.clone)),
    training=non_trainable(lt.Static(True)),
    scale=torch.ones(3),
)
def with_states(m, x):
    if m.training:
        key, m.rng = lt.random.split(m.rng)
        x = x + lt.random.normal(key, (3,))
        m.count = m.count + 1
        m.mean = 0.9 * m.mean + 0.1 * x.reshape(-1, 3).mean(0) * m.scale
        m.pair = (m.pair[0] + m.mean, m.pair[1] * 2)
    return (x - m.mean) * m.scale


@compact(inner=normalized, outer=lt.Dense(2, 2))
def nested(m, x):
    return m.outer(m.inner(x))


@compact(dense=lt.Dense(3, 2), scale=torch.ones(2))
def raw(m, x, ps):
    return m.dense(x) * ps["scale"] + (ps["dense"]["weight"] ** 2).sum()


@compact(net=lt.Chain(lt.Dense(3, 3, torch.tanh), lt.Dropout(0.5)))
def with_a_derivative(m, x):
    _, slope = torch.func.jvp(m.net, (x,), (torch.ones_like(x),))
    return m.net(x) + slope


def residual(m, x):
    return x + m.inner(x)


def block(width):
    return compact(residual, inner=lt.Dense(width, width, torch.tanh))


FORMS = {
    "layers": (normalized, [(4, 3)]),
    "layers called twice": (twice, [(4, 3)]),
    "groups of layers": (grouped, [(2, 3)]),
    "parameters": (parameters_only, [(2, 3)]),
    "states": (with_states, [(3,)]),
    "nested": (nested, [(4, 3)]),
    "raw parameters": (raw, [(2, 3)]),
    "a derivative inside": (with_a_derivative, [(2, 3)]),
    "in a chain": (lt.Chain(block(3), normalized, lt.Dense(2, 2)), [(4, 3)]),
    "in a container that repeats": (lt.RepeatedLayer(block(3), repeats=2), [(2, 3)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


class ByHand(lt.ContainerLayer):
    norm: lt.BatchNorm
    dropout: lt.Dropout
    dense: lt.Dense

    def __call__(self, x, ps, st):
        for _ in range(2):
            x, norm = self.norm(x, ps["norm"], st["norm"])
            x, dense = self.dense(x, ps["dense"], st["dense"])
            x, dropout = self.dropout(x, ps["dropout"], st["dropout"])
            st = {"norm": norm, "dropout": dropout, "dense": dense}
        return x, st


def stacked(trees):
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def same_leaves(got, expected):
    torch.testing.assert_close(dict(named_leaves(got)), dict(named_leaves(expected)), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [lt.train_mode, lt.test_mode])
def test_states_are_threaded_as_by_hand(make_key, mode):
    key, x = make_key(), lt.random.normal(make_key(), (4, 3))
    by_hand = ByHand(lt.BatchNorm(3), lt.Dropout(0.3), lt.Dense(3, 3, torch.tanh))
    ps, st = lt.setup(key, twice)
    same_leaves((ps, st), lt.setup(key, by_hand))
    st = mode(st)
    expected_st = st
    for _ in range(3):
        y, st = twice(x, ps, st)
        expected, expected_st = by_hand(x, ps, expected_st)
        assert torch.equal(y, expected)
        same_leaves(st, expected_st)


def test_parts_are_nested_under_their_names(make_key):
    ps, st = lt.setup(make_key(), grouped)
    assert list(ps) == ["layers", "heads", "scale"] and list(st) == ["layers", "heads"]
    assert list(ps["layers"]) == ["layer_1", "layer_2", "layer_3"] and list(ps["heads"]["rest"]) == ["layer_1"]
    ps, st = lt.setup(make_key(), parameters_only)
    assert list(ps["weights"]) == ["0", "1"] and list(ps["shifts"]) == ["low", "high"]
    assert st == {"weights": {}, "shifts": {}}
    ps, st = lt.setup(make_key(), with_states)
    assert list(ps) == ["pair", "scale"] and ps["pair"] == {} and list(st["pair"]) == ["0", "1"]


def test_states_are_wrapped_one_by_one_or_together():
    each = compact(body, pair=[non_trainable(torch.zeros(2)), non_trainable(init_fn(lt.init.ones, 3))])
    both = compact(body, pair=non_trainable([torch.zeros(2), init_fn(lt.init.ones, (3,))]))
    again = compact(body, pair=non_trainable(non_trainable([torch.zeros(2), init_fn(lt.init.ones, [3])])))
    assert each == both == again and list(lt.setup(0, each)[1]["pair"]) == ["0", "1"]


def test_adding_a_part_leaves_the_others_as_they_are(make_key):
    key = make_key()
    two = compact(residual, other=lt.Dense(2, 2), inner=lt.Dense(3, 3, torch.tanh))
    assert torch.equal(lt.setup(key, two)[0]["inner"]["weight"], lt.setup(key, block(3))[0]["inner"]["weight"])


def test_assigned_states_are_read_in_the_same_call_and_returned(make_key):
    ps, st = lt.setup(make_key(), with_states)
    before = copy.deepcopy(st)
    x = torch.ones(2, 3)
    _, new = with_states(x, ps, st)
    assert torch.equal(st["count"], before["count"]) and torch.equal(st["rng"], before["rng"])
    assert new["count"].item() == 1 and new["pair"]["1"].item() == 2
    assert torch.equal(new["pair"]["0"], new["mean"]) and not torch.equal(new["rng"], st["rng"])
    _, tested = with_states(x, ps, lt.test_mode(new))
    assert tested["count"].item() == 1 and torch.equal(tested["rng"], new["rng"])


def test_gradients_pass_through_a_state_within_a_call():
    @compact(seen=non_trainable(torch.zeros(())), scale=torch.tensor(3.0))
    def model(m, x):
        m.seen = (x * m.scale).sum()
        return m.seen**2

    ps, st = lt.setup(0, model)
    grads, new = torch.func.grad(lambda ps: model(torch.tensor(2.0), ps, st), has_aux=True)(ps)
    assert grads["scale"].item() == 2 * 6 * 2 and new["seen"].item() == 6 and not new["seen"].requires_grad


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(2.0),
        torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(0, 3),
        torch.nn.Parameter(torch.ones(2)),
    ],
)
def test_a_tensor_is_kept_by_its_values(value):
    model, again = (compact(residual, inner=lt.Dense(1, 1), value=value) for _ in range(2))
    assert model == again and hash(model) == hash(again) and pickle.loads(pickle.dumps(model)) == model
    made = lt.setup(0, model)[0]["value"]
    torch.testing.assert_close(made, value.detach().resolve_conj(), rtol=0, atol=0, equal_nan=True)
    assert not made.requires_grad and made.is_contiguous()
    if value.numel():
        assert compact(residual, inner=lt.Dense(1, 1), value=value.detach() + 1) != model
        made.zero_()  # the model keeps its own
        assert lt.setup(0, model)[0]["value"].abs().nan_to_num().sum() > 0


def test_tensors_of_equal_bytes_are_told_apart():
    values = [torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, dtype=torch.float64), torch.zeros(1).cfloat()]
    assert len({compact(residual, inner=lt.Dense(1, 1), value=value) for value in values}) == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.uint64, torch.float16])
def test_states_are_of_any_dtype(dtype):
    model = compact(residual, inner=lt.Dense(1, 1), value=non_trainable(torch.ones(2, dtype=dtype)))
    assert torch.equal(lt.setup(0, model)[1]["value"], torch.ones(2, dtype=dtype))


def test_tensors_are_made_on_the_keys_device(device):
    ps, st = lt.setup(lt.random.key(0).to(device), with_states)
    assert ps["scale"].device == st["count"].device == st["pair"]["1"].device == device
    assert lt.parameter_length(with_states) == 3 and lt.state_length(with_states) == 10
    assert lt.output_shape(with_states, (5, 3)) == (5, 3)


@pytest.mark.parametrize("model", [parameters_only, with_states])
def test_models_are_set_up_inside_transforms(make_key, model):
    keys = lt.random.split(make_key(), 2)
    same_leaves(
        torch.vmap(lambda key: lt.setup(key, model))(keys)[0], stacked([lt.setup(key, model)[0] for key in keys])
    )
    compiled = torch.compile(lambda key: lt.setup(key, model), fullgraph=True, backend="aot_eager")
    for key in keys:
        same_leaves(compiled(key), lt.setup(key, model))
    made = compiled(keys[0])[0]
    tree_map(lambda leaf: leaf.zero_(), made)
    same_leaves(compiled(keys[0]), lt.setup(keys[0], model))


@pytest.mark.parametrize("model", [twice, nested, block(3), lt.Chain(block(2), twice)])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal(model, copied):
    assert copied(model) == model and hash(copied(model)) == hash(model)


def test_a_pickled_model_keeps_its_own_parts():
    other = dataclasses.replace(twice, parts=(lt.BatchNorm(3), lt.Dropout(0.9), lt.Dense(3, 3)))
    assert pickle.loads(pickle.dumps(other)) == other != twice


def test_models_are_values():
    assert block(3) == block(3) and block(3) != block(4) and len({block(3), block(3), block(4)}) == 2
    assert compact(residual, inner=lt.Dense(3, 3), n=1) != compact(residual, inner=lt.Dense(3, 3), n=2)
    assert compact(residual, inner=lt.Dense(3, 3), n=[1, [2]]) == compact(residual, inner=lt.Dense(3, 3), n=(1, (2,)))


def test_equal_models_share_a_compiled_graph():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda model, x, ps, st: model(x, ps, st), fullgraph=True, backend=counting)
    for model in (block(3), block(3)):
        compiled(model, torch.ones(2, 3), *lt.setup(0, model))
    assert len(graphs) == 1


def test_a_box_in_the_body_gives_access_to_its_parameters():
    @compact(dense=lt.Dense(3, 2), norm=lt.BatchNorm(2))
    def tied(m, x):
        assert m.dense.layer == lt.Dense(3, 2) and list(m.norm.states)
        return m.norm(m.dense(x)) @ m.dense.parameters["weight"]

    ps, st = lt.setup(0, tied)
    assert tied(torch.ones(4, 3), ps, st)[0].shape == (4, 3)


def test_several_inputs_are_a_tuple():
    @compact(dense=lt.Dense(3, 2))
    def model(m, xs):
        a, b = xs
        return m.dense(a) + m.dense(b), b

    ps, st = lt.setup(0, model)
    y, b = model((torch.ones(3), torch.zeros(3)), ps, st)[0]
    assert y.shape == (2,) and torch.equal(b, torch.zeros(3))


def test_the_print_names_the_function_and_its_parts():
    assert str(grouped).splitlines()[0].startswith("Compact(grouped, scale=parameter (), n=2, activation=tanh,")
    assert "layer_(1-2) = Dense(3 -> 3, tanh),    " in str(grouped) and "24 parameters, 2 states" not in str(grouped)
    assert "weights = Group(),    " in str(parameters_only) and "4 parameters: 0 (3,), 1 (1,)" in str(parameters_only)
    assert "mean=state zeros (3,)" in str(with_states) and "training=state Static(True)" in str(with_states)
    assert "inner = Compact(normalized," in str(nested)


# Errors


def call(model, x):
    return model(x, *lt.setup(0, model))


def body(m, x):
    return x


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (normalized, "model.dense (Dense 3 -> 2)"),
        (nested, "model.inner.dense (Dense 3 -> 2)"),
        (grouped, "model.layers.layer_1 (Dense 3 -> 3, tanh)"),
        (lt.Chain(lt.NoOpLayer(), nested), "model.layer_2.inner.dense (Dense 3 -> 2)"),
        (raw, "model.dense (Dense 3 -> 2)"),
    ],
)
def test_an_error_inside_names_the_part(model, where):
    with pytest.raises(lt.InputError) as raised:
        call(model, torch.ones(2, 5))
    assert raised.value.where == where


def test_an_error_in_the_second_of_equal_layers_names_that_one():
    @compact(layers=[lt.Dense(3, 3)] * 3)
    def model(m, x):
        return m.layers[1](m.layers[0](x)[:, :2])

    with pytest.raises(lt.InputError) as raised:
        call(model, torch.ones(2, 3))
    assert raised.value.where == "model.layers.layer_2 (Dense 3 -> 3)"


def test_an_error_of_the_body_names_the_function():
    def wrong(m, x):
        return x + torch.ones(7)

    with pytest.raises(lt.LayerError, match=r"model \(Compact wrong\): RuntimeError in the layer: The size"):
        call(compact(wrong, dense=lt.Dense(1, 1)), torch.ones(3))


def unknown(m, x):
    return m.dence(x)


def reads_ps(m, x):
    return m.dense(x, m.ps)


def reads_a_weight(m, x):
    return x @ m.dense.weight.T


def assigns_unknown(m, x):
    m.cuont = m.count + 1
    return x


def assigns_a_parameter(m, x):
    m.scale = m.scale + 1
    return x


def assigns_a_layer(m, x):
    m.dense = m.dense(x)
    return x


def assigns_a_constant(m, x):
    m.n += 1
    return x


def assigns_another_dtype(m, x):
    m.count = m.count + 0.5
    return x


def assigns_another_shape(m, x):
    m.count = x.sum(0).long()
    return x


def assigns_a_number(m, x):
    m.count = 0
    return x


def assigns_fewer(m, x):
    m.pair = m.pair[:1]
    return x


def assigns_a_list(m, x):
    m.pair = list(m.pair)
    return x


def assigns_inside(m, x):
    m.pair = (m.pair[0], m.pair[1].double())
    return x


def assigns_a_switch(m, x):
    m.training = False
    return x


def assigns_under_a_transform(m, x):
    def count(x):
        m.count = m.count + 1
        return x

    return torch.vmap(count)(x)


def returns_nothing(m, x):
    m.dense(x)


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (unknown, lt.KeyNameError, "unknown has no part 'dence'[\\s\\S]*Did you mean 'dense'"),
        (reads_ps, lt.KeyNameError, "no part 'ps'[\\s\\S]*third argument, ps"),
        (reads_a_weight, lt.LayerError, "no attribute 'weight'. Parameters are read as box.parameters\\['weight'\\]"),
        (assigns_unknown, lt.KeyNameError, "no part 'cuont'[\\s\\S]*Did you mean 'count'"),
        (assigns_a_parameter, lt.InputError, "'scale' of assigns_a_parameter cannot be assigned[\\s\\S]*state: count"),
        (assigns_a_layer, lt.InputError, "'dense' of assigns_a_layer cannot be assigned"),
        (assigns_a_constant, lt.InputError, "'n' of assigns_a_constant cannot be assigned[\\s\\S]*non_trainable"),
        (assigns_another_dtype, lt.InputError, "'count'[\\s\\S]*int64 tensor of shape \\(\\)[\\s\\S]*float32"),
        (assigns_another_shape, lt.InputError, "'count'[\\s\\S]*shape \\(\\)[\\s\\S]*shape \\(3,\\)"),
        (assigns_a_number, lt.InputError, "got:      0 of type int"),
        (assigns_fewer, lt.InputError, "tuple of length 2[\\s\\S]*tuple of length 1"),
        (assigns_a_list, lt.InputError, "tuple of length 2[\\s\\S]*list of length 2"),
        (assigns_inside, lt.InputError, "float32[\\s\\S]*float64"),
        (assigns_a_switch, lt.InputError, "Static\\(True\\), which no call changes[\\s\\S]*False"),
        (assigns_under_a_transform, lt.InputError, "inside a transform[\\s\\S]*has_aux"),
        (returns_nothing, lt.InputError, "returns_nothing must return a value"),
    ],
)
def test_a_mistake_in_the_body_is_explained(function, error, text):
    model = compact(
        function,
        dense=lt.Dense(3, 3),
        count=non_trainable(torch.tensor(0)),
        pair=non_trainable([torch.zeros(2), torch.ones(2)]),
        training=non_trainable(lt.Static(True)),
        scale=torch.ones(3),
        n=3,
    )
    with pytest.raises(error, match=text) as raised:
        call(model, torch.ones(2, 3))
    assert raised.value.where.startswith(f"model (Compact {function.__name__}, ")


DENSE = lt.Dense(1, 1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: compact(body), "body has no parts[\\s\\S]*WrappedFunction"),
        (lambda: compact()(body), "body has no parts"),
        (lambda: compact(DENSE), "must be a function[\\s\\S]*keyword"),
        (lambda: compact(lt.Dense, inner=DENSE), "must be a function"),
        (lambda: compact(lambda x: x, dense=DENSE), "signature[\\s\\S]*\\(m, x\\)[\\s\\S]*got: +\\(x\\)"),
        (lambda: compact(lambda m, x, ps, st: x, dense=DENSE), "behind the scenes"),
        (lambda: compact(lambda m, x, st: x, dense=DENSE), "signature"),
        (lambda: compact(lambda m, x, ps=None: x, dense=DENSE), "signature"),
        (lambda: compact(lambda m, *x: x, dense=DENSE), "signature"),
        (lambda: compact(lambda m, x, *, n: x, dense=DENSE), "signature"),
        (lambda: compact(torch.exp, dense=DENSE), "exp has a signature"),
        (lambda: compact(body, layers=[DENSE, torch.relu]), "'layers' of body mixes[\\s\\S]*relu[\\s\\S]*Wrapped"),
        (lambda: compact(body, layers={"a": [DENSE, 3]}), "'layers' of body mixes"),
        (lambda: compact(body, weights=[torch.ones(2), 3.0]), "'weights' of body mixes[\\s\\S]*3.0"),
        (lambda: compact(body, both=[torch.ones(2), non_trainable(torch.ones(2))]), "a tensor and a state"),
        (lambda: compact(body, layer=lt.Dense), "not a class[\\s\\S]*fix: +Dense\\(...\\)"),
        (lambda: compact(body, module=torch.nn.Linear(1, 1)), "tensors of its own"),
        (lambda: compact(body, box=StatefulLayer(DENSE, {}, {})), "tensors of its own[\\s\\S]*attribute layer"),
        (lambda: compact(body, options={"a": 1}), "'options' of body cannot be hashed"),
        (lambda: compact(body, count=torch.tensor(0)), "floating point[\\s\\S]*int64[\\s\\S]*non_trainable"),
        (lambda: compact(body, weights=[torch.tensor(0)]), "'weights' of body, '0', must be a floating point"),
        (lambda: compact(body, scale=lt.init.ones), "without a shape[\\s\\S]*scale=lt.init_fn\\(ones, \\(3,\\)\\)"),
        (lambda: compact(body, scale=lt.init.normal(std=2.0)), "without a shape"),
        (lambda: compact(body, _x=DENSE), "underscore"),
        (lambda: compact(body, layers={"a.b": DENSE}), "dots"),
        (lambda: compact(body, scale=torch.ones(2, device="meta")), "must have values"),
        (lambda: non_trainable(DENSE), "must be a tensor"),
        (lambda: non_trainable(3), "must be a tensor[\\s\\S]*3[\\s\\S]*torch.tensor"),
        (lambda: init_fn(lt.init.ones), "needs a shape"),
        (lambda: init_fn(torch.ones(2)), "init must be a function[\\s\\S]*to compact directly"),
    ],
)
def test_a_mistake_in_the_parts_is_explained(make, text):
    with pytest.raises(lt.LuxtorchError, match=text):
        make()
