"""Convolution, pooling, normalization and dropout at the edges: layouts, empty batches, single samples, every dtype."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import (
    AdaptiveLPPool,
    AdaptiveMaxPool,
    AdaptiveMeanPool,
    AlphaDropout,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dropout,
    FeatureDropout,
    GlobalLPPool,
    GlobalMaxPool,
    GlobalMeanPool,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    LPPool,
    MaxPool,
    MeanPool,
    Pad,
    RMSNorm,
    Upsample,
    VariationalHiddenDropout,
)

# What treats each sample by itself, in images of four channels.
BY_SAMPLE = {
    f"{type(layer).__name__} {layer.extra_repr()}": layer
    for layer in (
        Conv((3, 2), 4, 6, torch.tanh),
        *(Conv((3, 3), 4, 2, padding=1, padding_mode=mode) for mode in ("zeros", "reflect", "replicate", "circular")),
        Conv((2, 2), 4, 4, padding="same", stride=2, groups=2),
        ConvTranspose((3, 2), 4, 6, stride=2),
        ConvTranspose((2, 2), 4, 6, padding=((0, 1), (1, 0))),
        MaxPool((2, 2), ceil_mode=True),
        MaxPool((2, 3), stride=1, padding="same"),
        MeanPool((2, 2), ceil_mode=True),
        MeanPool((3, 2), padding="same", count_include_pad=False),
        MeanPool((2, 2), padding=1, divisor_override=3),
        LPPool((2, 2), p=4),
        GlobalMaxPool(),
        GlobalMeanPool(),
        GlobalLPPool(),
        AdaptiveMaxPool((2, 3)),
        AdaptiveMeanPool((2, 3)),
        AdaptiveLPPool((2, 3)),
        Pad(1, "symmetric"),
        Upsample("bilinear", size=(3, 2), antialias=True),
        Upsample("nearest-exact", scale_factor=1.5),
        GroupNorm(4, 2, torch.tanh),
        InstanceNorm(4, affine=True),
        LayerNorm(5),
        RMSNorm((5, 5)),
        Dropout(0.0),
        Dropout(1.0),
    )
}
# What draws a mask or statistics for the batch.
BY_BATCH = {
    f"{type(layer).__name__} {layer.extra_repr()}": layer
    for layer in (
        BatchNorm(4, torch.tanh),
        BatchNorm(4, momentum=None),
        BatchNorm(4, track_running_stats=False),
        InstanceNorm(4, track_running_stats=True),
        Dropout(0.4),
        Dropout(0.4, dims=(0, 1)),
        FeatureDropout(0.4),
        AlphaDropout(0.4),
        AlphaDropout(0.0),
        AlphaDropout(1.0),
        VariationalHiddenDropout(0.4),
    )
}
ALL = {**BY_SAMPLE, **BY_BATCH}
MODES = {"train": lt.train_mode, "test": lt.test_mode}


def run(layer, x, ps, st):
    """Return output, state and gradients."""
    y, pullback, new = torch.func.vjp(lambda x, ps: layer(x, ps, st), x, ps, has_aux=True)
    return y, new, pullback(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype))


def plain(layer, x, ps, st):
    """Return output and state: outside transforms, some layers take other kernels."""
    return layer(x, ps, st)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["channels last", "transposed", "every other", "expanded"])
@pytest.mark.parametrize("name", ALL)
def test_the_layout_in_memory_makes_no_difference(make_key, name, layout, mode):
    layer = ALL[name]
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (3, 4, 5, 5))
    x = x[:1].expand(3, 4, 5, 5).contiguous() if layout == "expanded" else x
    other = {
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(0, 3).contiguous().transpose(0, 3),
        "every other": lambda: torch.stack([x, x + 1], -1)[..., 0],
        "expanded": lambda: x[:1].expand(3, 4, 5, 5),
    }[layout]()
    assert torch.equal(other, x) and other.stride() != x.stride()
    st = MODES[mode](st)
    for call in (run, plain):
        got, expected = (lt.core.tree_leaves(call(layer, value, ps, st)) for value in (other, x))
        torch.testing.assert_close(got, expected)


IN_TORCH = {
    "Conv": (Conv((3, 3), 4, 6), torch.nn.Conv2d(4, 6, 3)),
    "Conv, padded": (Conv((3, 3), 4, 6, padding=1), torch.nn.Conv2d(4, 6, 3, padding=1)),
    "Conv, sides": (Conv((2, 2), 4, 6, padding=((0, 1), (0, 1))), torch.nn.Conv2d(4, 6, 2)),
    "Conv, reflect": (
        Conv((3, 3), 4, 6, padding=1, padding_mode="reflect"),
        torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ),
    "Conv in three dimensions": (Conv((3, 3, 3), 4, 6), torch.nn.Conv3d(4, 6, 3)),
    "ConvTranspose": (ConvTranspose((3, 3), 4, 6), torch.nn.ConvTranspose2d(4, 6, 3)),
    "MaxPool": (MaxPool((2, 2)), torch.nn.MaxPool2d(2)),
    "MeanPool": (MeanPool((2, 2)), torch.nn.AvgPool2d(2)),
    "AdaptiveMaxPool": (AdaptiveMaxPool((2, 2)), torch.nn.AdaptiveMaxPool2d(2)),
    "AdaptiveMeanPool": (AdaptiveMeanPool((2, 2)), torch.nn.AdaptiveAvgPool2d(2)),
    "Upsample": (Upsample(scale_factor=2), torch.nn.Upsample(scale_factor=2)),
    "BatchNorm": (BatchNorm(4), torch.nn.BatchNorm2d(4)),
    "GroupNorm": (GroupNorm(4, 2), torch.nn.GroupNorm(2, 4)),
    "FeatureDropout": (FeatureDropout(1.0), torch.nn.Dropout2d(1.0)),
}


@pytest.mark.parametrize("name", IN_TORCH)
def test_channels_last_stay_so_where_torch_keeps_them(make_key, name):
    layer, module = IN_TORCH[name]
    last = torch.channels_last_3d if "three" in name else torch.channels_last
    x = lt.random.normal(make_key(), (2, 4, *(5,) * (3 if "three" in name else 2))).to(memory_format=last)
    y, _ = layer(x, *lt.setup(make_key(), layer))
    assert y.is_contiguous(memory_format=last) and module(x).is_contiguous(memory_format=last)
    assert not y.is_contiguous() or y.numel() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_a_sample_alone_gives_what_it_gives_among_others(make_key, name, mode):
    layer = BY_SAMPLE[name]
    ps, st = lt.setup(make_key(), layer)
    x, st = lt.random.normal(make_key(), (3, 4, 5, 5)), MODES[mode](st)
    y, _ = layer(x, ps, st)
    for i in range(3):
        torch.testing.assert_close(layer(x[i : i + 1], ps, st)[0], y[i : i + 1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_has_an_output_and_gradients_of_zero(make_key, name, mode):
    layer = ALL[name]
    ps, st = lt.setup(make_key(), layer)
    x, st = torch.ones(0, 4, 5, 5), MODES[mode](st)
    shape = lt.output_shape(layer, (1, 4, 5, 5))
    y, new, (to_x, to_ps) = run(layer, x, ps, st)
    assert y.shape == (0, *shape[1:]) and to_x.shape == x.shape
    assert all((leaf == 0).all() for leaf in lt.core.tree_leaves(to_ps))
    assert all(leaf.isfinite().all() for leaf in lt.core.tree_leaves(new) if leaf.is_floating_point())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_every_dtype_is_kept_and_close(make_key, name, mode, dtype):
    layer = ALL[name]
    cast = {torch.float16: lt.f16, torch.bfloat16: lt.bf16, torch.float64: lt.f64}[dtype]
    ps, st = lt.setup(make_key(), layer)
    ps, st = cast(ps), MODES[mode](st)
    st_of_dtype = cast(st) if dtype == torch.float64 else st  # statistics stay in single precision
    x = lt.random.normal(make_key(), (3, 4, 5, 5)).to(dtype)
    y, new, (to_x, _) = run(layer, x, ps, st_of_dtype)
    assert y.dtype == to_x.dtype == dtype
    dtypes = [[leaf.dtype for leaf in lt.core.tree_leaves(tree)] for tree in (new, st_of_dtype)]
    assert dtypes[0] == dtypes[1]
    expected, expected_new, _ = run(layer, x.float(), lt.f32(ps), st)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    got, expected = lt.core.tree_leaves(lt.f32(new)), lt.core.tree_leaves(expected_new)
    torch.testing.assert_close(got, expected, **tolerance)
    assert y.isfinite().all() and to_x.isfinite().all()
