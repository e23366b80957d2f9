"""Some rows of a draw are those of the whole draw."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.jit import jit
from luxtorch.random._draws import bernoulli_rows


@pytest.mark.parametrize("shape", [(8,), (7, 3), (9, 5, 2), (4, 1), (3, 0)])
def test_rows_are_those_of_the_whole_draw(shape, make_key):
    key = make_key()
    whole = lt.random.bernoulli(key, 0.4, shape)
    for first in range(shape[0]):
        for rows in range(shape[0] - first + 1):
            assert torch.equal(bernoulli_rows(key, 0.4, shape, first, rows), whole[first : first + rows])


def test_rows_are_drawn_inside_of_jit(make_key):
    key, shape = make_key(), (9, 7)
    draw = jit(lambda key: bernoulli_rows(key, 0.4, shape, 5, 3), backend="replay")
    for one in lt.random.split(key, 3):
        assert torch.equal(draw(one), lt.random.bernoulli(one, 0.4, shape)[5:8])
