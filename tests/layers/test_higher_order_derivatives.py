"""Derivatives of every order by every nesting of transforms: of all layers, and by all words of those with kernels."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch.testing import check_derivatives
from luxtorch.testing._orders import EVERY, QUICK

FORMS_OF_ALL = {
    f"{file.stem[5:]}: {name}": form
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if "\nFORMS = {" in file.read_text()
    for name, form in runpy.run_path(str(file))["FORMS"].items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS_OF_ALL)
def test_what_takes_long_of_every_layer(make_key, draw, name):
    layer, inputs, *exceptions = FORMS_OF_ALL[name]
    skip, (x, *others) = exceptions[0] if exceptions else (), map(draw, inputs)
    check = partial(lt.testing.check_layer, layer, x, rng=make_key(), skip=skip)
    check(laws=["orders"], words=QUICK)
    check(*others, laws=["jit", "compile"])


# Layers with a kernel of torch, or with a path of their own inside transforms.
KERNELS = {
    "LayerNorm": (lt.LayerNorm(4), (2, 4)),
    "LayerNorm of two dimensions, without bias": (lt.LayerNorm((2, 3), bias=False), (2, 2, 3)),
    "LayerNorm, not affine": (lt.LayerNorm(4, affine=False), (2, 4)),
    "RMSNorm": (lt.RMSNorm(4), (2, 4)),
    "GroupNorm": (lt.GroupNorm(4, 2), (2, 4, 2)),
    "InstanceNorm": (lt.InstanceNorm(2, affine=False), (2, 2, 3)),
    "BatchNorm": (lt.BatchNorm(3), (4, 3)),
    "GLU": (lt.GLU(), (2, 4)),
    "PReLU": (lt.PReLU(3), (2, 3)),
    "WeightNorm": (lt.WeightNorm(lt.Dense(3, 2)), (2, 3)),
    "ConvTranspose": (lt.ConvTranspose((2,), 1, 2, stride=2, output_padding=1), (2, 1, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_word(make_key, draw, name):
    layer, shape = KERNELS[name]
    lt.testing.check_layer(layer, draw(shape), rng=make_key(), laws=["orders"], words=EVERY, modes=[lt.train_mode])


@pytest.mark.parametrize("transform", ["nothing", "grad", "vmap of grad"])
def test_layer_norm_keeps_its_kernel_for_first_derivatives(transform):
    layer, x = lt.LayerNorm(4), torch.arange(12.0).reshape(3, 4)
    ps, st = lt.setup(0, layer)
    run = {
        "nothing": lambda: layer(x, ps, st),
        "grad": lambda: torch.func.grad(lambda ps: layer(x, ps, st)[0].sum())(ps),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(lambda ps, x: layer(x, ps, st)[0].sum()), (None, 0))(ps, x),
    }[transform]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert "aten::native_layer_norm" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("around", ["torch.func", "a tape", "a checkpoint"])
@pytest.mark.parametrize("layer, shape", [(lt.LayerNorm(4), (3, 4)), (lt.BatchNorm(4), (3, 4))], ids=["layer", "batch"])
def test_third_derivatives_are_those_of_the_formula(rng, around, layer, shape):
    ps, st = lt.f64(lt.setup(0, layer))
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    dims, eps = (0, 1)[isinstance(layer, lt.LayerNorm)], layer.eps

    def formula(x):
        return (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + eps).sqrt()

    def normalized(x):
        if around == "a checkpoint":
            return torch.utils.checkpoint.checkpoint(lambda x: layer(x, ps, st)[0], x, use_reentrant=False)
        return layer(x, ps, st)[0]

    def third(f):
        y, x_ = x, x.clone().requires_grad_()
        if around == "torch.func":
            g = torch.func.grad(lambda x: f(x).sin().sum())
            h = torch.func.grad(lambda x: g(x).sin().sum())
            return torch.func.grad(lambda x: h(x).sin().sum())(x)
        y = f(x_).sin().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(y, x_, create_graph=True)
            y = slope.sin().sum()
        return slope.detach()

    torch.testing.assert_close(third(normalized), third(formula))


def test_a_formula_that_torch_gets_wrong_is_caught():
    x = torch.tensor([[0.1, -0.4, 0.7], [1.0, 0.2, -0.3]], dtype=torch.float64)
    with pytest.raises(lt.testing.LawError, match="RF is wrong"):
        check_derivatives(lambda x: F.layer_norm(x, (3,)), x)


# Layers that take as many features as they return, with a derivative of their own on a tape.
TWICE = {
    "RNN": (lt.Recurrence(lt.RNNCell(3, 3), return_sequence=True), (2, 3, 3)),
    "GRU": (lt.Recurrence(lt.GRUCell(3, 3), return_sequence=True), (2, 3, 3)),
    "LSTM": (lt.Recurrence(lt.LSTMCell(3, 3), return_sequence=True), (2, 3, 3)),
    "attention": (lt.MultiHeadAttention(4, 2), (2, 3, 4)),
    "LayerNorm": (lt.LayerNorm(3), (2, 3)),
    "BatchNorm": (lt.BatchNorm(3), (4, 3)),
    "WeightNorm": (lt.WeightNorm(lt.Dense(3, 3)), (2, 3)),
    "Checkpointed": (lt.Checkpointed(lt.Dense(3, 3, torch.tanh)), (2, 3)),
}


@pytest.mark.parametrize("name", TWICE)
def test_parameters_of_two_calls_in_a_row(make_key, draw, name):
    """Where an input depends on the parameters too, its part of the derivative is not that of the call."""
    layer, shape = TWICE[name]
    ps, st = lt.f64(lt.setup(make_key(), layer))

    def twice(x, ps):
        y, new = layer(x, ps, st)
        y = y[0] if isinstance(y, tuple) else y
        y, _ = layer(y.sin(), ps, new)
        return y

    check_derivatives(twice, lt.f64(draw(shape)), ps, rng=make_key(), words=("R", "T", "F", "RR", "TR", "TT"))
