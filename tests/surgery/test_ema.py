"""Averages of parameters, against the definition, a filter of SciPy and torch's own average."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch.optim import swa_utils
from torch.utils._pytree import tree_leaves, tree_structure

import luxtorch as lt
from luxtorch.core import InputError
from luxtorch.surgery._ema import EMA

DECAYS = [0.0, 0.5, 0.9, 0.9999]


def average_of(ema, trees):
    st = ema.init(trees[0])
    for tree in trees[1:]:
        st = ema.update(st, tree)
    return ema.parameters(st)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_it_is_a_filter_with_its_bias_corrected(make_key, decay, steps):
    values = lt.random.normal(make_key(), (steps, 4), dtype=torch.float64)
    filtered = lfilter([1 - decay], [1, -decay], values.numpy(), axis=0)[-1] / (1 - decay**steps)
    average = average_of(EMA(decay), [{"a": row} for row in values])["a"]
    np.testing.assert_allclose(average.numpy(), filtered, rtol=1e-9)
    weights = decay ** np.arange(steps)[::-1].astype(float)
    np.testing.assert_allclose(average.numpy(), np.average(values.numpy(), axis=0, weights=weights), rtol=1e-9)


def test_it_agrees_with_torch_once_the_first_values_are_forgotten(make_key):
    module = torch.nn.Linear(3, 2)
    reference = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    ema = EMA(0.5)
    with torch.no_grad():
        start, st = (ema.init(dict(module.named_parameters())) for _ in range(2))
    first = module.weight.detach().clone()
    for _ in range(40):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(lt.random.normal(make_key(), parameter.shape))
            st = ema.update(st, {name: leaf.clone() for name, leaf in module.named_parameters()})
        reference.update_parameters(module)
    assert torch.equal(start["average"]["weight"], first)
    for name, leaf in ema.parameters(st).items():
        torch.testing.assert_close(leaf, dict(reference.module.named_parameters())[name].detach())
        assert not leaf.requires_grad


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_it_is_pure_and_keeps_the_structure(make_key, tree):
    model = lt.Chain(lt.Dense(3, 4), lt.NoOpLayer(), lt.Dense(4, 2))
    first, second = (tree(lt.setup(make_key(), model)[0]) for _ in range(2))
    ema = EMA(0.9)
    st = ema.init(first)
    before = copy.deepcopy((st, first, second))
    new = ema.update(st, second)
    assert tree_structure(new) == tree_structure(st) and tree_structure(ema.parameters(new)) == tree_structure(first)
    assert all(map(torch.equal, tree_leaves((st, first, second)), tree_leaves(before)))
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(new))


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
def test_it_is_compiled_once_and_vmapped(make_key, tree):
    ema, graphs = EMA(0.9), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    trees = [
        tree({"a": lt.random.normal(make_key(), (3, 2)), "b": lt.random.normal(make_key(), (2,))}) for _ in "12345"
    ]
    update = torch.compile(ema.update, fullgraph=True, backend=counted)
    st, expected = ema.init(trees[0]), ema.init(trees[0])
    for values in trees[1:]:
        st, expected = update(st, values), ema.update(expected, values)
    torch.testing.assert_close(tree_leaves(st), tree_leaves(expected))
    assert len(graphs) == 1

    many = torch.vmap(ema.update)(torch.vmap(ema.init)(lt.stack(trees)), lt.stack(trees[::-1]))
    for i, one in enumerate(lt.unstack(many)):
        expected = ema.update(ema.init(trees[i]), trees[-1 - i])
        torch.testing.assert_close(tree_leaves(one), tree_leaves(expected))


def test_a_small_dtype_is_averaged_in_a_larger_one():
    trees = [{"a": torch.tensor([1.0 + step], dtype=torch.bfloat16)} for step in range(2)]
    fine, coarse = EMA(0.9999, torch.float32), EMA(0.9999)
    states = [ema.init(trees[0]) for ema in (fine, coarse)]
    for _ in range(1000):
        states = [ema.update(st, trees[1]) for ema, st in zip((fine, coarse), states, strict=True)]
    average, stuck = (st["average"]["a"] for st in states)
    assert average.dtype == torch.float32 and stuck.dtype == torch.bfloat16
    ratio = (1 - 0.9999**1000) * 0.9999 / 0.9999 / (1 - 0.9999**1001)
    assert average.item() == pytest.approx(1 + ratio, abs=1e-4) and abs(stuck.item() - 1 - ratio) > 0.005


def test_integers_and_modes_are_those_of_the_last_step():
    model = lt.BatchNorm(2)
    _, st = lt.setup(0, model)
    states = [{**st, "steps": torch.tensor(step), "z": torch.tensor(1j * step)} for step in range(3)]
    average = average_of(EMA(0.5, torch.float64), states)
    assert average["steps"] == 2 and average["training"] == lt.Static(True)
    assert average["running_var"].dtype == torch.float64 and average["z"].dtype == torch.complex64
    torch.testing.assert_close(average["z"], torch.tensor(1j * (0.25 * 0 + 0.5 * 1 + 1 * 2) / 1.75))


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5, "0.9", True, float("nan")])
def test_a_decay_is_in_its_range(decay):
    with pytest.raises(InputError, match="at least 0 and below 1"):
        EMA(decay)


def test_errors_say_what_differs():
    with pytest.raises(InputError, match="dtype must be a floating point dtype"):
        EMA(0.9, torch.int64)
    ema = EMA(0.9)
    st = ema.init({"a": torch.ones(2), "b": torch.ones(2)})
    for other in ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(())}, {"a": torch.ones(2), "c": None}):
        with pytest.raises(InputError, match="do not match those that the average began with") as caught:
            ema.update(st, other)
        assert "a dict of a, b" in str(caught.value)
    vector = lt.ComponentVector({"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(InputError, match="a ComponentVector of"):
        ema.update(st, vector)
