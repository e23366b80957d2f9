"""What Lux users rely on and a port gets wrong easily: states, modes and randomness. One behavior a test.

What containers mean is in test_branch_maxout_repeated.py, and what attention returns in test_attention.py.
"""

from __future__ import annotations

import copy

import torch

import luxtorch as lt
from luxtorch.core import TRAINING, named_leaves

MODEL = lt.Chain(lt.Dense(3, 8, torch.tanh), lt.BatchNorm(8), lt.Dropout(0.5), lt.Dense(8, 2))


def equal(a, b):
    pairs = zip(named_leaves(a), named_leaves(b), strict=True)
    return all(name == other and torch.equal(left, right) for (name, left), (other, right) in pairs)


def test_1_a_call_returns_a_new_state_and_whoever_drops_it_gets_the_old_mask_again(make_key):
    ps, st = lt.setup(make_key(), MODEL)
    x, before = lt.random.normal(make_key(), (16, 3)), copy.deepcopy(st)
    y, new = MODEL(x, ps, st)
    assert equal(st, before) and list(new) == list(st)
    assert not torch.equal(new["layer_2"]["running_mean"], st["layer_2"]["running_mean"])
    assert torch.equal(MODEL(x, ps, st)[0], y)  # the old state: the old mask
    assert not torch.equal(MODEL(x, ps, new)[0], y)  # the new state: a new one


def test_2_models_train_from_the_start_and_the_mode_is_in_the_state(make_key):
    ps, st = lt.setup(make_key(), MODEL)
    tested = lt.test_mode(st)
    assert st["layer_2"][TRAINING] and not tested["layer_2"][TRAINING]
    x = lt.random.normal(make_key(), (16, 3))
    y, after = MODEL(x, ps, tested)
    assert equal(after, tested) and torch.equal(MODEL(x, ps, after)[0], y)
    assert not torch.equal(MODEL(x, ps, st)[0], y)  # the original is still in train mode


def test_3_each_dropout_has_a_stream_of_its_own_in_the_state(make_key):
    model = lt.Parallel(None, lt.Dropout(0.5), lt.Dropout(0.5))
    ps, st = lt.setup(make_key(), model)
    x = torch.ones(64)
    (first, second), new = model(x, ps, st)
    assert not torch.equal(first, second)
    (third, fourth), _ = model(x, ps, new)
    assert not any(torch.equal(a, b) for a in (first, second) for b in (third, fourth))
    _, again = lt.setup(make_key(), model)
    assert not torch.equal(model(x, ps, again)[0][0], first)  # another key at setup: another stream


def test_4_dropout_keeps_everything_at_0_nothing_at_1_and_is_still_in_test_mode(make_key):
    x = lt.random.normal(make_key(), (4, 3)).requires_grad_()
    assert lt.setup(make_key(), lt.Dropout(0.0)) == ({}, {})
    assert lt.Dropout(0.0)(x, {}, {})[0] is x
    nothing = lt.Dropout(1.0)
    _, st = lt.setup(make_key(), nothing)
    y, _ = nothing(x, {}, st)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and not gradient.any() and y.isfinite().all()
    half = lt.Dropout(0.5)
    _, st = lt.setup(make_key(), half)
    tested = lt.test_mode(st)
    y, after = half(x, {}, tested)
    assert torch.equal(y, x) and equal(after, tested)


def test_4_the_dims_of_a_dropout_are_those_whose_masks_are_independent(make_key):
    rows = lt.Dropout(0.5, dims=0)
    _, st = lt.setup(make_key(), rows)
    y, _ = rows(torch.ones(64, 5), {}, st)
    assert set(y.unique().tolist()) == {0.0, 2.0} and torch.equal(y, y[:, :1].expand(64, 5))
