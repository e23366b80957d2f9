"""Every layer under `jit(dynamic=...)`: the plain numbers at each batch size, by one graph or with a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils import _pytree as pytree

import luxtorch as lt

from .test_higher_order_derivatives import FORMS_OF_ALL

pytestmark = pytest.mark.slow

SIZES = (2, 3, 5)


def repeated(x, number):
    return pytree.tree_map(lambda leaf: torch.cat([leaf] * number), x)


@pytest.mark.parametrize("name", FORMS_OF_ALL)
def test_one_graph_for_all_batch_sizes(make_key, draw, name):
    layer, (spec, *_), *_ = FORMS_OF_ALL[name]
    x = draw(spec)
    if any(leaf.ndim < 2 for leaf in pytree.tree_leaves(x)) or len({len(leaf) for leaf in pytree.tree_leaves(x)}) > 1:
        pytest.skip("not all that it takes has a batch in front")
    ps, st = lt.setup(make_key(), layer)
    try:
        expected = [layer(repeated(x, number), ps, st) for number in SIZES]
    except lt.LuxtorchError:
        pytest.skip("it takes one batch size")
    jitted = lt.jit(lambda x, ps, st: layer(x, ps, st), backend="replay", dynamic={"x": 0})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = [jitted(repeated(x, number), ps, st) for number in SIZES]
    torch.testing.assert_close(got, expected)
    specialized = any("compiled for each size" in str(word.message) for word in said)
    assert jitted.cache_info().misses == (len(SIZES) if specialized else 1)
