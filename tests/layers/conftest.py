"""What the tests of all layers share: inputs by their shapes, and the law checker on forms.

A form, an entry of a file's `FORMS`, is `(layer, inputs)` or `(layer, inputs, exceptions)`. An input is written as its
shape, as a tensor, or as a tuple or dict of these. The exceptions say why the layer does not keep a law, by the law's
name.
"""

from __future__ import annotations

import pytest
from torch import Tensor

import luxtorch as lt


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
def check_laws(make_key, draw, device):
    """Return a function that checks a form, on each device."""

    def check_laws(layer, inputs, exceptions=()):
        inputs = lt.to_device(list(map(draw, inputs)), device)
        lt.testing.check_layer(layer, *inputs, rng=make_key().to(device), skip=exceptions)

    return check_laws
