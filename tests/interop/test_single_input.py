"""Layers that `from_torch` makes take their one input as torch's modules do: by position, or by its name."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch.core import TRAINING, tree_leaves
from luxtorch.interop import Inputs, ModuleLayer, from_torch
from luxtorch.interop._native import CONVERTERS

from .forms import FORMS


def native_forms():
    """Yield a form or two of every module that has a layer of its own, with a plain input."""
    seen = Counter()
    for form in FORMS:
        kind = getattr(nn, form.call.name)
        plain = [i for i, x in enumerate(form.inputs) if not isinstance(x, Inputs)]
        if kind not in CONVERTERS or not plain or form.prepare is not None or seen[kind] == 2:
            continue
        if not isinstance(from_torch(form.call.make()).layer, ModuleLayer):
            seen[kind] += 1
            yield form, plain[-1]


NATIVE = list(native_forms())


def test_every_module_with_a_layer_is_there():
    assert {getattr(nn, form.call.name) for form, _ in NATIVE} == set(CONVERTERS)


def name_of_input(module):
    """Return what torch calls the first argument."""
    return next(iter(inspect.signature(module.forward).parameters))


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True))


def calls(layer, ps, st, x, name, *, takes_two=False):
    """Check all ways to write a call."""
    expected = layer(x, ps, st)
    for given in (Inputs(x), Inputs(**{name: x})):
        y, new = layer(given, ps, st)
        assert type(y) is type(expected[0]) and same((y, new), expected), given
    for given in (Inputs(wrong=x), Inputs(x, wrong=x), Inputs(x, **{name: x}), Inputs(), Inputs(x, x, x)):
        with pytest.raises(lt.InputError, match=rf"lt.Inputs\({name}=x") as caught:
            layer(given, ps, st)
        assert "does not take these arguments" in str(caught.value) and caught.value.where.startswith("model")
        assert caught.value.__context__ is None or caught.value.__suppress_context__  # nothing confusing is shown above
    if not takes_two:
        with pytest.raises(lt.InputError, match="lt.Inputs"):
            layer(Inputs(x, x), ps, st)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", range(len(NATIVE)), ids=[f"{i}-{form}" for i, (form, _) in enumerate(NATIVE)])
def test_a_module_and_a_chain_of_it(make_key, which, training):
    form, first = NATIVE[which]
    module = form.module(make_key()).train(training)
    layer, ps, st = from_torch(module)
    x = form.draw(first, make_key())
    name = name_of_input(module)
    two = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    calls(layer, ps, st, x, name, takes_two=two)
    for chain in (nn.Sequential(module), nn.Sequential(nn.Sequential(module), nn.Identity())):
        layer, ps, st = from_torch(chain.train(training))
        expected = layer(x, ps, st)
        for given in (Inputs(x), Inputs(input=x)):
            y, new = layer(given, ps, st)
            assert type(y) is type(expected[0]) and same((y, new), expected)
        with pytest.raises(lt.InputError, match=rf"Inputs\({name}=x"):
            layer(Inputs(wrong=x), ps, st)


class Shifted(nn.Module):
    """Call the input `x`."""

    def forward(self, x, by=1.0):
        return x + by


class Swapped(nn.Module):
    """Take an `input` in the second place."""

    def forward(self, other=None, input=None):
        return ("other", other) if input is None else ("input", input)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_chain_that_begins_with_a_module_of_ones_own(compiled):
    def call(module, given):
        layer, ps, st = from_torch(module)
        f = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        return f(given, ps, st)[0]

    x = torch.ones(2, 3)
    module = nn.Sequential(nn.Sequential(Shifted()), nn.Tanh())
    assert torch.equal(call(module, Inputs(input=x)), module(input=x))
    assert torch.equal(call(module, Inputs(x)), module(x))
    assert torch.equal(call(Shifted(), Inputs(x, by=x)), x + x)
    assert call(nn.Sequential(Swapped()), Inputs(input=x))[0] == "input"  # a chain passes arguments on
    assert call(nn.Sequential(Swapped()), x)[0] == "other"


@pytest.mark.slow
def test_in_a_compiled_function(make_key):
    for which in range(0, len(NATIVE), 7):
        form, first = NATIVE[which]
        layer, ps, st = from_torch(form.module(make_key()).eval())
        x = form.draw(first, make_key())
        name = name_of_input(form.module(make_key()))
        expected = layer(x, ps, st)[0]
        for given in (Inputs(x), Inputs(**{name: x})):
            got = torch.compile(layer, fullgraph=True, backend="aot_eager")(given, ps, st)[0]
            torch.testing.assert_close(got, expected)
        torch.compiler.reset()


def test_under_transforms_and_in_a_module_again(make_key):
    layer, ps, st = from_torch(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    x = lt.random.normal(make_key(), (5, 3))
    expected = layer(x, ps, st)[0]
    for given in (Inputs(x), Inputs(input=x)):
        assert torch.equal(
            torch.vmap(lambda one: layer(one, ps, st)[0])(given), torch.vmap(lambda x: layer(x, ps, st)[0])(x)
        )
        gradient = torch.func.grad(lambda given: layer(given, ps, st)[0].sum())(given)
        assert torch.equal(tree_leaves(gradient)[0], torch.func.grad(lambda x: layer(x, ps, st)[0].sum())(x))
        assert torch.equal(lt.jit(lambda given, ps: layer(given, ps, st)[0], backend="replay")(given, ps), expected)
    module = lt.to_torch(layer, ps, st)
    assert torch.equal(module(input=x), expected)


def test_layers_that_take_arguments_themselves_are_left_alone():
    class Two(lt.Dense):
        def __call__(self, x, ps, st):
            return sum(x.args) if len(x.args) > 1 else "one", st

    x = torch.ones(2, 3)
    layer = Two(3, 4)
    ps, st = lt.setup(0, layer)
    assert torch.equal(layer(Inputs(x, x), ps, st)[0], x + x) and layer(Inputs(x), ps, st)[0] == "one"
    chain = lt.Chain(lt.NoOpLayer(), lambda given: given.args[0] - given.kwargs["input"])
    assert not chain(Inputs(x, input=x), *lt.setup(0, chain))[0].any()
    failing = lt.WrappedFunction(lambda given: given.args[7])
    with pytest.raises(lt.LayerError, match="tuple index out of range"):
        failing(Inputs(x), {}, {})


def test_a_failure_of_another_kind_is_told_of_the_input_itself():
    layer, ps, st = from_torch(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    for given in (torch.ones(2, 7), Inputs(torch.ones(2, 7)), Inputs(input=torch.ones(2, 7))):
        with pytest.raises(lt.InputError, match=r"^model\.0 \(Dense 3 -> 4\): The input does not fit") as caught:
            layer(given, ps, st)
        assert "got:      a torch.float32 tensor of shape (2, 7)" in str(caught.value)
    with pytest.raises(lt.KeyNameError, match="lacks the parameter 'bias'"):
        layer(Inputs(torch.ones(2, 3)), {**ps, "0": {"weight": ps["0"]["weight"]}}, st)
    assert TRAINING not in st["0"]
