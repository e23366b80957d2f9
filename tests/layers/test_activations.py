"""Activations by name: their values, and that every transform knows them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import BatchNorm, Dense, InputError, Scale
from luxtorch.layers import ACTIVATIONS
from luxtorch.testing import check_derivatives
from luxtorch.testing._orders import WORDS

X = [-1000.0, -4.0, -2.5, -1.0, -0.3, 0.0, 0.2, 0.9, 1.1, 3.5, 7.0, 1000.0]
CLOSED_FORMS = {
    "hardsigmoid": lambda x: min(max(x / 6 + 0.5, 0), 1),
    "identity": lambda x: x,
    "lisht": lambda x: x * math.tanh(x),
    "logcosh": lambda x: np.logaddexp(x, -x) - math.log(2),
    "sigmoid_fast": lambda x: 1 / (1 + np.exp(-np.float64(min(max(x, -700), 700)))),
    "swish": lambda x: x / (1 + np.exp(-np.float64(min(max(x, -700), 700)))),
    "tanh_fast": math.tanh,
    "thresholdrelu": lambda x: x if x > 1 else 0,
    "trelu": lambda x: x if x > 1 else 0,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_values_are_right(name):
    x = torch.tensor(X, dtype=torch.float64)
    if name in CLOSED_FORMS:
        expected = torch.tensor([float(CLOSED_FORMS[name](value)) for value in X], dtype=torch.float64)
    else:
        expected = getattr(F, {"leakyrelu": "leaky_relu"}.get(name, name))(x)
    got, _ = Scale(len(X), activation=name, bias=False)(x, {"weight": torch.ones_like(x)}, {})
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_transform_knows_them(make_key, name):
    laws = ["gradient", "forward", "vmap_inputs", "vmap_models", "compile", "value"]
    lt.testing.check_layer(Dense(3, 2, name), lt.random.normal(make_key(), (4, 3)), rng=make_key(), laws=laws)


@pytest.mark.parametrize("name", [name for name, activation in ACTIVATIONS.items() if activation])
def test_derivatives_of_every_order(rng, name):
    x = 2 * torch.randn(3, 4, generator=rng, dtype=torch.float64)
    check_derivatives(ACTIVATIONS[name], x, words=(*WORDS, "rf", "RfR"))
    check_derivatives(ACTIVATIONS[name], torch.zeros(2, dtype=torch.float64), words=("R", "F"))


def test_a_name_and_its_function_are_the_same_layer():
    assert Dense(3, 2, "tanh") == Dense(3, 2, torch.tanh) and hash(Dense(3, 2, "tanh")) == hash(Dense(3, 2, torch.tanh))
    assert BatchNorm(3, "relu") == BatchNorm(3, torch.relu) and Dense(3, 2, "identity") == Dense(3, 2)
    assert "Dense(3 -> 2, silu)" in str(Dense(3, 2, "swish"))


@pytest.mark.parametrize(
    "build", [lambda a: Dense(3, 2, a), lambda a: BatchNorm(3, a), lambda a: Scale(3, activation=a)]
)
def test_what_is_no_activation_is_refused(build):
    with pytest.raises(InputError, match="'rellu'[\\s\\S]*Did you mean 'relu'"):
        build("rellu")
    with pytest.raises(InputError, match="must be a function[\\s\\S]*got:      3"):
        build(3)
