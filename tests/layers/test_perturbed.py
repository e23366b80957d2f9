"""Models that are perturbed inside, against hooks and `retain_grad` of torch."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch import Chain, Dense, InputError, KeyNameError
from luxtorch.core import named_leaves, tree_leaves, tree_map
from luxtorch.core._paths import replace_children
from luxtorch.layers import Ensemble, Perturbed, intermediate_gradients

MODEL = Chain(Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5), Chain(Dense(4, 4), Dense(4, 2)))


@lt.compact(inner=Dense(3, 3), outer=Dense(3, 2))
def twice(m, x):
    return m.outer(torch.tanh(m.inner(x)))


FORMS = {
    "Perturbed": (
        Perturbed(Chain(Dense(3, 4, torch.tanh), lt.Dropout(0.5), Dense(4, 2)), "layer_1", "layer_2"),
        [((5, 3), {"layer_1": (5, 4), "layer_2": (5, 4)})],
    ),
    "Perturbed, one in another": (
        Perturbed(Chain(Dense(3, 2), Chain(Dense(2, 2), torch.tanh)), "layer_2", "layer_2.layer_1"),
        [((5, 3), {"layer_2.layer_1": (2,), "layer_2": (5, 2)})],
    ),
    "Perturbed compact model": (Perturbed(twice, "inner"), [((5, 3), {"inner": (5, 3)})]),
    "Perturbed ensemble": (Perturbed(Chain(Ensemble(Dense(3, 2), 4)), "layer_1"), [((5, 3), {"layer_1": (4, 5, 2)})]),
    "Perturbed members": (
        Perturbed(Ensemble(Chain(Dense(3, 2), Dense(2, 2)), 4), "layer_1"),
        [((5, 3), {"layer_1": (4, 5, 2)})],
    ),
    "Perturbed cell": (
        Perturbed(Chain(lt.Recurrence(lt.GRUCell(3, 2), return_carry=True)), "layer_1"),
        [((2, 5, 3), {"layer_1": ((2, 2), ((2, 2),))})],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def convolutional():
    """A model, a module with the same numbers in float64, and the names of their layers."""
    model = Chain(
        Chain(lt.Conv((3, 3), 2, 4), lt.BatchNorm(4), torch.relu),
        Chain(lt.Conv((3, 3), 4, 4), lt.GroupNorm(4, 2), torch.tanh),
        lt.FlattenLayer(),
        Dense(16, 3),
    )
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    ps, st = lt.f64(lt.setup(0, model))
    leaves, spec = torch.utils._pytree.tree_flatten(ps)
    values = [value.detach().view(leaf.shape) for leaf, value in zip(leaves, module.parameters(), strict=True)]
    places = ["0", "0.0", "0.1", "0.2", "1", "1.0", "1.1", "1.2", "2", "3"]
    paths = [".".join(f"layer_{int(part) + 1}" for part in place.split(".")) for place in places]
    return model, torch.utils._pytree.tree_unflatten(values, spec), st, module, dict(zip(paths, places, strict=True))


def loss(y):
    return (y**2).mean() + y.sin().sum()


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("mode", [lt.train_mode, lt.test_mode])
def test_against_hooks_that_retain_the_gradient(rng, mode, tree):
    model, ps, st, module, places = convolutional()
    module.train(mode is lt.train_mode)
    x, seen = torch.randn(5, 2, 6, 6, generator=rng, dtype=torch.float64), {}
    for path, place in places.items():
        # A clone, since torch.nn returns the outputs of the last layer inside as they are.
        def keep(_module, _args, y, path=path):
            y = y.clone()
            y.retain_grad()
            seen[path] = y
            return y

        module.get_submodule(place).register_forward_hook(keep)
    loss(module(x)).backward()
    outputs, gradients = intermediate_gradients(loss, Perturbed(model, *places), x, tree(ps), mode(st))
    assert outputs.keys() == gradients.keys() == places.keys()
    for path, expected in seen.items():
        torch.testing.assert_close(outputs[path], expected.detach())
        torch.testing.assert_close(gradients[path], expected.grad)


def test_without_perturbations_it_is_the_model(make_key):
    ps, st = lt.setup(make_key(), MODEL)
    x = lt.random.normal(make_key(), (5, 3))
    model = Perturbed(MODEL, "layer_1", "layer_4", "layer_4.layer_1")
    assert [name for name, _ in named_leaves(lt.setup(0, model))] == [name for name, _ in named_leaves((ps, st))]
    (y, inside), new = model((x, {}), ps, st)
    expected, expected_new = MODEL(x, ps, st)
    assert torch.equal(y, expected) and torch.equal(inside["layer_4"], y)
    assert torch.utils._pytree.tree_structure(new) == torch.utils._pytree.tree_structure(st)
    assert all(map(torch.equal, tree_leaves(new), tree_leaves(expected_new)))


def test_derivatives_of_any_kind_are_those_of_what_follows(rng):
    head, tail = Dense(3, 4, torch.tanh), Dense(4, 2, torch.sigmoid)
    ps, st = lt.f64(lt.setup(0, Chain(head, tail)))
    model = Perturbed(Chain(head, tail), "layer_1")
    x = torch.randn(3, generator=rng, dtype=torch.float64)
    hidden, along = head(x, ps["layer_1"], {})[0], torch.randn(4, generator=rng, dtype=torch.float64)

    def of_hidden(hidden):
        return tail(hidden, ps["layer_2"], {})[0].square().sum()

    def of_perturbation(perturbation):
        return model((x, {"layer_1": perturbation}), ps, st)[0][0].square().sum()

    zero = torch.zeros_like(hidden)
    torch.testing.assert_close(of_perturbation(along), of_hidden(hidden + along))
    expected = torch.autograd.functional.hessian(of_hidden, hidden)
    torch.testing.assert_close(torch.func.hessian(of_perturbation)(zero), expected)
    _, slope = torch.func.jvp(of_perturbation, (zero,), (along,))
    torch.testing.assert_close(slope, torch.autograd.functional.jvp(of_hidden, hidden, along)[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_many_models_and_of_many_samples(make_key, compiled):
    x = lt.random.normal(make_key(), (5, 3))
    ps, st = lt.setup(make_key(), Ensemble(MODEL, 3))

    model = Perturbed(MODEL, "layer_1", "layer_4.layer_1")

    def gradients(x, ps, st):
        return intermediate_gradients(loss, model, x[None], ps, lt.test_mode(st))

    many = torch.vmap(torch.vmap(gradients, (0, None, None)), (None, 0, 0))
    got = (torch.compile(many, fullgraph=True, backend="aot_eager") if compiled else many)(x, ps, st)
    for i in range(3):
        for j in range(5):
            expected = gradients(x[j], *tree_map(lambda leaf, i=i: leaf[i], (ps, st)))
            torch.testing.assert_close(tree_map(lambda leaf, i=i, j=j: leaf[i, j], got), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_of_what_is_inside_is_differentiated_too(make_key):
    model, x = Perturbed(MODEL, "layer_1"), lt.random.normal(make_key(), (5, 3))
    ps, st = lt.setup(make_key(), model)
    got = torch.func.grad(lambda ps: model((x, {}), ps, st)[0][1]["layer_1"].square().sum())(ps)
    expected = torch.func.grad(lambda ps: MODEL.layer_1(x, ps, {})[0].square().sum())(ps["layer_1"])
    torch.testing.assert_close(got["layer_1"], expected)
    assert not any(leaf.any() for leaf in tree_leaves(got["layer_4"]))


def test_a_layer_that_is_called_several_times_is_perturbed_each_time():
    model = Perturbed(lt.RepeatedLayer(Chain(lambda x: 2 * x), 3), "layer_1")
    (y, inside), _ = model((torch.ones(2), {"layer_1": torch.ones(2)}), *lt.setup(0, model))
    assert y.tolist() == [15.0, 15.0] and inside["layer_1"].tolist() == [15.0, 15.0]


def test_what_is_checkpointed_is_perturbed(make_key):
    block, x = Chain(Dense(3, 4, torch.tanh), Dense(4, 2)), lt.random.normal(make_key(), (5, 3))
    ps, st = lt.setup(make_key(), Chain(block))
    got, expected = (
        intermediate_gradients(loss, Perturbed(Chain(layer), "layer_1.layer_1"), x, ps, st)
        for layer in (lt.Checkpointed(block), block)
    )
    torch.testing.assert_close(got, expected)


def paths(layer, above=()):
    """Yield the path of each layer inside a layer."""
    for name, child in layer.children().items():
        here = (*above, name) if name else above
        if name:
            yield ".".join(here)
        yield from paths(child, here)


def all_forms():
    """Yield the forms of all layers that have layers inside."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        if "\nFORMS = {" in file.read_text() and file.name != Path(__file__).name:
            for name, (layer, inputs, *_) in runpy.run_path(str(file))["FORMS"].items():
                if layer.children():
                    yield file.stem, name, layer, inputs[0]


# Containers that do more with a layer inside than to call it.
NOT_INSIDE = (
    ("test_attention", "rotary", "rotary"),
    ("test_attention", "cache, rotary, grouped, weights", "rotary"),
    ("test_transformer", "encoder, rotary", "self_attn.rotary"),
    ("test_branch_maxout_repeated", "AlternatePrecision", ""),
    ("test_branch_maxout_repeated", "PairwiseFusion with a layer", "layers"),
    ("test_compact", "groups of layers", "layers"),
    ("test_compact", "groups of layers", "heads"),
    ("test_compact", "groups of layers", "heads.rest"),
    ("test_compact", "parameters", ""),
    ("test_compact", "states", "pair"),
    ("test_recurrent", "Recurrence of a stack", ""),
    ("test_recurrent", "Recurrence of a stack with dropout", "layer"),
    ("test_recurrent", "Recurrence of a stack with dropout, with lengths", "layer"),
    ("test_recurrent", "StatefulRecurrentCell of a stack with dropout", "layer"),
)


def test_every_layer_inside_every_layer_can_be_perturbed(make_key, draw):
    count, failed = 0, []
    for file, name, layer, spec in all_forms():
        assert replace_children(layer, layer.children()) == layer
        x, (ps, st) = draw(spec), lt.setup(make_key(), layer)
        y, new = layer(x, ps, st)
        for path in dict.fromkeys(paths(layer)):
            count += 1
            try:
                (got, inside), got_new = Perturbed(layer, path)((x, {}), ps, st)
            except lt.LuxtorchError:
                failed.append((file, name, path))
                continue
            assert inside.keys() == {path}
            torch.testing.assert_close(tree_leaves((got, got_new)), tree_leaves((y, new)), rtol=1e-5, atol=1e-6)
    assert count > 200
    known = [
        case for case in failed if any(case[:2] == place[:2] and case[2].startswith(place[2]) for place in NOT_INSIDE)
    ]
    assert failed == known


def test_replacing_tells_equal_layers_apart():
    dense = Dense(3, 3)
    got = replace_children(Chain(*[dense] * 3), {"layer_2": lt.Dropout(0.5)})
    assert got == Chain(dense, lt.Dropout(0.5), dense)
    assert got._names == (frozenset({"layer_1", "layer_2", "layer_3"}),) * 2
    assert replace_children(lt.Checkpointed(dense), {"": Dense(3, 2)}) == lt.Checkpointed(Dense(3, 2))
    with pytest.raises(KeyNameError, match="(?s)no layer 'layer_4'.*layer_1, layer_2, layer_3.*Did you mean"):
        replace_children(Chain(*[dense] * 3), {"layer_4": dense})


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((), InputError, "paths must be.*\\(\\)"),
        ((1,), InputError, "paths must be.*1"),
        (("layer_5",), KeyNameError, "the path 'layer_5': There is no layer 'layer_5'.*Did you mean 'layer_4'"),
        (("layer_4.layer_3",), KeyNameError, "the path 'layer_4.layer_3'.*layer_1, layer_2"),
        (("layer_1.weight",), KeyNameError, "There is no layer 'weight'"),
        (("",), KeyNameError, "no layer ''"),
    ],
)
def test_paths_that_lead_nowhere(given, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        Perturbed(MODEL, *given)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(5, 3), InputError, "must be a tuple.*a torch.float32 tensor"),
        ((torch.ones(5, 3), torch.ones(5, 4)), InputError, "must be a tuple"),
        ((torch.ones(5, 3), {"layer_2": torch.ones(4)}), KeyNameError, "no perturbed layer 'layer_2'.*layer_1"),
        ((torch.ones(5, 3), {"layer_1": torch.ones(3)}), InputError, r"model.layer_1.*\(5, 4\).*\(3,\)"),
        (
            (torch.ones(5, 3), {"layer_1": torch.ones(1, 5, 4)}),
            InputError,
            r"must have the shape.*\(5, 4\).*\(1, 5, 4\)",
        ),
        ((torch.ones(5, 3), {"layer_1": {"a": torch.ones(4)}}), InputError, "must have the shape"),
        ((torch.ones(5, 4), {}), InputError, r"model.layer_1 \(Dense 3 -> 4, tanh\)"),
    ],
)
def test_perturbations_that_do_not_fit(x, error, words):
    model = Perturbed(MODEL, "layer_1")
    with pytest.raises(error, match=f"(?s){words}"):
        model(x, *lt.setup(0, model))


class Unused(lt.ContainerLayer):
    """A container that does not call its second layer."""

    used: lt.Layer
    unused: lt.Layer

    def __call__(self, x, ps, st):
        y, st_used = self.used(x, ps["used"], st["used"])
        return y, {**st, "used": st_used}


def test_a_layer_that_is_not_called_says_so():
    model = Perturbed(Unused(Dense(3, 2), Dense(3, 2)), "unused")
    with pytest.raises(InputError, match="(?s)'unused' must be called by its container.*Perturb the container"):
        model((torch.ones(5, 3), {}), *lt.setup(0, model))


def test_the_gradients_are_of_a_perturbed_model():
    with pytest.raises(InputError, match="(?s)must be an lt.Perturbed.*a Chain.*lt.Perturbed"):
        intermediate_gradients(loss, MODEL, torch.ones(5, 3), *lt.setup(0, MODEL))
