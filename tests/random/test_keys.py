"""Keys: what they are, and that deriving them is a function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import luxtorch.random as lr
from luxtorch import DTypeError, InputError
from luxtorch.random import _philox

integers = st.integers(-(2**63), 2**64 - 1)


def test_a_key_is_what_torch_calls_one():
    key = lr.key(7)
    assert key.dtype == torch.uint64 and key.tolist() == [7, 0]
    assert lr.key(-1).tolist() == [2**64 - 1, 0]
    assert lr.key(np.int64(7)).tolist() == [7, 0]


@pytest.mark.skipif(not _philox.has_kernels("cpu"), reason="this torch has no stateless kernels on the CPU")
@pytest.mark.parametrize("number", [1, 2, 7])
def test_split_and_fold_in_are_those_of_torch(make_key, number):
    import torch.func._random as reference

    key = make_key()
    assert torch.equal(lr.split(key, number), reference.split(key, number))
    for data in (0, 5, -1, 2**63, 2**64 - 1):
        assert torch.equal(lr.fold_in(key, data), reference.fold_in(key, data))


def test_split_gives_distinct_keys_that_vmap_gives_too(make_key):
    keys = lr.split(make_key(), 16)
    assert len({tuple(key.tolist()) for key in keys}) == 16
    got = torch.vmap(lambda key: lr.split(key, 3))(keys)
    assert torch.equal(got, torch.stack([lr.split(key, 3) for key in keys]))
    assert torch.equal(lr.split(keys, 3), got.transpose(0, 1))


@given(integers, integers)
def test_different_data_fold_into_different_keys(first, second):
    key = lr.key(0)
    same = torch.equal(lr.fold_in(key, first), lr.fold_in(key, second))
    assert same == (first % 2**64 == second % 2**64)


@given(st.text(), st.text())
def test_different_names_fold_into_different_keys(first, second):
    key = lr.key(0)
    assert torch.equal(lr.fold_in(key, first), lr.fold_in(key, second)) == (first == second)


@pytest.mark.parametrize("name", ["", "layer_1", "weight", "\u03c3"])
def test_names_fold_in_inside_a_compiled_function(make_key, name):
    key = make_key()
    compiled = torch.compile(lambda key: lr.fold_in(key, name), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key), lr.fold_in(key, name))


def test_a_tensor_folds_in_as_the_integer_does_also_under_vmap(make_key):
    key, steps = make_key(), torch.arange(4)
    expected = torch.stack([lr.fold_in(key, i) for i in range(4)])
    assert torch.equal(torch.stack([lr.fold_in(key, step) for step in steps]), expected)
    assert torch.equal(torch.vmap(lambda step: lr.fold_in(key, step))(steps), expected)
    keys = lr.split(key, 4)
    got = torch.vmap(lr.fold_in)(keys, steps)
    assert torch.equal(got, torch.stack([lr.fold_in(keys[i], i) for i in range(4)]))
    assert torch.equal(torch.vmap(lambda k: lr.fold_in(k, steps[2]))(keys), lr.fold_in(keys, 2))


def test_one_graph_serves_every_step(make_key):
    key, graphs = make_key(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    fold = torch.compile(lambda step: lr.uniform(lr.fold_in(key, step), (3,)), fullgraph=True, backend=backend)
    drawn = [fold(torch.tensor(step)) for step in range(5)]
    assert len(graphs) == 1
    for step, draw in enumerate(drawn):
        assert torch.equal(draw, lr.uniform(lr.fold_in(key, step), (3,)))


def test_replicate_leaves_a_generator_where_it_is(rng):
    drawn = [torch.rand(10, generator=lr.replicate(rng)) for _ in range(3)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
    assert torch.equal(torch.rand(10, generator=rng), drawn[0])
    assert not torch.equal(torch.rand(10, generator=rng), drawn[0])
    key = lr.key(0)
    assert lr.replicate(key) is key and lr.replicate(3) == 3


def test_as_key_takes_a_seed_a_key_or_a_generator_which_moves_on(rng):
    assert torch.equal(lr.as_key(3), lr.key(3))
    key = lr.key(3)
    assert lr.as_key(key) is key
    copy = lr.replicate(rng)
    first, second = lr.as_key(rng), lr.as_key(rng)
    assert not torch.equal(first, second)
    assert torch.equal(lr.as_key(copy), first)


@pytest.mark.parametrize(
    "wrong", [0, torch.zeros(2), torch.zeros(3, dtype=torch.uint64), torch.tensor(1, dtype=torch.uint64), None]
)
@pytest.mark.parametrize("draw", [lr.split, lr.uniform, lr.normal, lr.randint, lambda k: lr.fold_in(k, 1)])
def test_what_is_no_key_is_refused(wrong, draw):
    with pytest.raises(DTypeError, match="A key must be a uint64 tensor[\\s\\S]*lt.random.key"):
        draw(wrong)


def test_senseless_data_is_refused(make_key):
    key = make_key()
    with pytest.raises(InputError, match="data must be an integer of at most 64 bits"):
        lr.fold_in(key, 2**64)
    with pytest.raises(InputError, match="data must be an integer tensor of one element[\\s\\S]*vmap"):
        lr.fold_in(key, torch.arange(2))
    with pytest.raises(InputError, match="number must be at least 1"):
        lr.split(key, 0)
    for seed in (1.5, True, "0"):
        with pytest.raises(DTypeError, match="seed must be an int"):
            lr.key(seed)
