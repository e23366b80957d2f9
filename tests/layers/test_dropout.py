"""AlphaDropout, FeatureDropout and VariationalHiddenDropout: the laws, and torch's values and frequencies."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import AlphaDropout, FeatureDropout, VariationalHiddenDropout

FORMS = {
    "AlphaDropout": (AlphaDropout(0.3), [(4, 3), (3,)]),
    "AlphaDropout of nothing": (AlphaDropout(0.0), [(4, 3)]),
    "AlphaDropout of everything": (AlphaDropout(1.0), [(4, 3)]),
    "FeatureDropout": (FeatureDropout(0.3), [(4, 3), (2, 3, 2), (1, 3, 2, 2)]),
    "FeatureDropout of nothing": (FeatureDropout(0.0), [(2, 3, 2)]),
    "FeatureDropout of everything": (FeatureDropout(1.0), [(2, 3, 2)]),
    "VariationalHiddenDropout": (VariationalHiddenDropout(0.5), [(4, 3), (3,)]),
    "VariationalHiddenDropout of columns": (VariationalHiddenDropout(0.5, dims=-1), [(4, 3)]),
    "VariationalHiddenDropout of nothing": (VariationalHiddenDropout(0.0), [(4, 3)]),
    "VariationalHiddenDropout of everything": (VariationalHiddenDropout(1.0), [(4, 3)]),
}
KINDS = [AlphaDropout, FeatureDropout, VariationalHiddenDropout]
TORCH = {AlphaDropout: torch.nn.AlphaDropout, FeatureDropout: torch.nn.Dropout1d}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", TORCH)
def test_kept_and_dropped_values_are_those_of_torch(make_key, kind, p):
    x = 3 * torch.ones(200, 100, 1)
    ps, st = lt.setup(make_key(), kind(p))
    y, _ = kind(p)(x, ps, st)
    with torch.random.fork_rng():
        expected = TORCH[kind](p)(x)
    torch.testing.assert_close(y.unique(), expected.unique())
    assert p == 1 or abs(float((y == y.max()).float().mean()) - (1 - p)) < 0.02


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_and_variance(make_key, p):
    ps, st = lt.setup(make_key(), AlphaDropout(p))
    y, _ = AlphaDropout(p)(lt.random.normal(make_key(), (100_000,)), ps, st)
    assert abs(float(y.mean())) < 0.02 and abs(float(y.var()) - 1) < 0.03


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 4), (20, 30, 2, 3), (20, 30, 2, 1, 3)])
def test_feature_dropout_drops_whole_channels_of_each_sample(make_key, shape):
    ps, st = lt.setup(make_key(), FeatureDropout(0.5))
    y, _ = FeatureDropout(0.5)(torch.ones(shape), ps, st)
    channels = y.reshape(20, 30, -1)
    assert torch.equal(channels, channels[:, :, :1].expand_as(channels))
    assert len(channels[:, :, 0].unique(dim=0)) == 20
    assert sorted(y.unique().tolist()) == [0, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (0, 3)])
def test_dtype_and_shape_are_kept(make_key, kind, dtype, shape):
    ps, st = lt.setup(make_key(), kind(0.5))
    x = torch.ones(shape[::-1], dtype=dtype).T
    y, _ = kind(0.5)(x, ps, st)
    assert y.dtype == dtype and y.shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_stays_as_it_is_in_test_mode_and_for_p_0(make_key, kind):
    x = lt.random.normal(make_key(), (4, 3))
    ps, st = lt.setup(make_key(), kind(0.5))
    y, new = kind(0.5)(x, ps, lt.test_mode(st))
    assert y is x and torch.equal(new["rng"], st["rng"])
    assert lt.setup(0, kind(0.0)) == ({}, {})
    assert kind(0.0)(x, {}, {}) == (x, {})


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_everything_drops_infinities_and_nans_too(make_key, kind):
    ps, st = lt.setup(make_key(), kind(1.0))
    assert kind(1.0)(torch.tensor([[torch.inf, torch.nan]]), ps, st)[0].tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", [AlphaDropout, FeatureDropout])
def test_the_returned_state_gives_another_mask(make_key, kind):
    x = torch.ones(10, 50)
    ps, st = lt.setup(make_key(), kind(0.5))
    y, new = kind(0.5)(x, ps, st)
    assert torch.equal(kind(0.5)(x, ps, st)[0], y)
    assert not torch.equal(kind(0.5)(x, ps, new)[0], y)


@pytest.mark.parametrize("request_value", [torch.tensor(True), lt.Static(True)], ids=["tensor", "static"])
def test_variational_dropout_repeats_its_mask_until_asked_for_another(make_key, request_value):
    layer, x = VariationalHiddenDropout(0.5), torch.ones(10, 50)
    ps, st = lt.setup(make_key(), layer)
    assert st["update_mask"].item() is True
    first, st = layer(x, ps, st)
    assert st["update_mask"].item() is False
    assert sorted(first.unique().tolist()) == [0, 2]
    for _ in range(3):
        again, st = layer(x, ps, st)
        assert torch.equal(again, first)
    for _ in range(2):
        previous, st = layer(x, ps, lt.update_state(st, "update_mask", request_value))
        assert not torch.equal(previous, first)
        assert st["update_mask"].item() is False
        first, st = layer(x, ps, st)
        assert torch.equal(previous, first)


def test_variational_dropout_leaves_a_mask_alone_that_is_declined(make_key):
    layer, x = VariationalHiddenDropout(0.5), torch.ones(10, 50)
    ps, st = lt.setup(make_key(), layer)
    first, st = layer(x, ps, st)
    again, st = layer(x, ps, lt.update_state(st, "update_mask", lt.Static(False)))
    assert torch.equal(first, again) and st["update_mask"].item() is False


def test_variational_dropout_keeps_its_mask_through_test_mode_and_other_shapes(make_key):
    layer, x = VariationalHiddenDropout(0.5), torch.ones(10, 50)
    ps, st = lt.setup(make_key(), layer)
    first, st = layer(x, ps, st)
    _, st = layer(x, ps, lt.test_mode(st))
    _, st = layer(torch.ones(3, 7), ps, lt.train_mode(st))
    assert torch.equal(layer(x, ps, st)[0], first)


def test_variational_dropout_varies_along_dims_alone(make_key):
    layer = VariationalHiddenDropout(0.5, dims=1)
    ps, st = lt.setup(make_key(), layer)
    y, _ = layer(torch.ones(10, 50), ps, st)
    assert torch.equal(y, y[:1].expand(10, 50)) and len(y.unique()) == 2


def test_each_of_many_models_updates_its_mask_when_its_own_flag_says_so(make_key):
    layer, x = VariationalHiddenDropout(0.5), torch.ones(50)
    ps, st = lt.setup(make_key(), layer)
    old, st = layer(x, ps, st)
    many = {**st, "update_mask": torch.tensor([True, False])}
    axes = {"rng": None, "update_mask": 0, "training": None}
    y, _ = torch.vmap(layer, in_dims=(None, None, axes))(x, ps, many)
    assert torch.equal(y[1], old) and not torch.equal(y[0], old)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_a_probability_is_taken(kind, p):
    with pytest.raises(lt.InputError, match="between 0 and 1"):
        kind(p)


def test_feature_dropout_wants_channels():
    ps, st = lt.setup(0, FeatureDropout(0.5))
    with pytest.raises(lt.InputError, match="a batch and channels[\\s\\S]*\\(batch, channels, ...\\)"):
        FeatureDropout(0.5)(torch.ones(3), ps, st)
