"""What the tests of all layers share: inputs by their shapes, and the law checker on forms.

A form, an entry of a file's `FORMS`, is `(layer, inputs)` or `(layer, inputs, exceptions)`. An input is written as its
shape, as a tensor, or as a tuple or dict of these. The exceptions say why the layer does not keep a law, by the law's
name.
"""

from __future__ import annotations

import random
import zlib

import pytest
from torch import Tensor

import luxtorch as lt
from luxtorch.testing._orders import EVERY, WORDS


def some_words(name):
    """Return words of which those of length 3 are drawn by a name: all together check all, and the slow tests each."""
    draw = random.Random(zlib.crc32(name.encode()))
    third = [word for word in EVERY if len(word) == 3]
    return ("R", "F", "RF", "FR", "FF", *draw.sample(WORDS[6:], 1), *draw.sample(third, 1), draw.choice("rfT"))


def later(name):
    """Return laws for the slow tests: one form in four is compiled here, one in two jitted, as that takes longest."""
    number = zlib.crc32(name.encode())
    return ["orders", *["compile"] * (number % 4 > 0), *["jit"] * (number % 2)]


@pytest.fixture
def draw(make_key):
    """Return a function that draws an input of a given shape."""

    def draw(spec, dtype=None):
        if isinstance(spec, Tensor):
            return spec
        if isinstance(spec, dict):
            return {name: draw(part, dtype) for name, part in spec.items()}
        if all(isinstance(size, int) for size in spec):
            return lt.random.normal(make_key(), spec, dtype=dtype)
        return tuple(draw(part, dtype) for part in spec)

    return draw


@pytest.fixture
def check_laws(request, make_key, draw, device):
    """Return a function that checks a form, on each device; what takes long in part, and whole in the slow tests."""

    def check_laws(layer, inputs, exceptions=()):
        inputs = lt.to_device(list(map(draw, inputs)), device)
        key = make_key().to(device)
        lt.testing.check_layer(layer, *inputs, rng=key, skip=[*exceptions, *later(request.node.nodeid)])
        lt.testing.check_layer(
            layer, inputs[0], rng=key, laws=["orders"], skip=exceptions, words=some_words(request.node.nodeid)
        )

    return check_laws
