"""Upsampling: every law, and the numbers of torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import PixelShuffle, PixelUnshuffle, Upsample

FORMS = {
    "Upsample": (Upsample(scale_factor=2), [(2, 1, 2), (1, 1, 2, 1)]),
    "Upsample, linear": (Upsample("linear", size=5), [(2, 1, 3)]),
    "Upsample, bilinear": (Upsample("bilinear", scale_factor=(2, 1.5), align_corners=True), [(1, 1, 2, 3)]),
    "Upsample, bicubic": (Upsample("bicubic", size=(3, 2)), [(1, 1, 2, 2)]),
    "Upsample, trilinear": (Upsample("trilinear", scale_factor=2), [(1, 1, 2, 1, 2)]),
    "Upsample, area": (Upsample("area", size=3), [(1, 1, 4)]),
    "Upsample, nearest-exact": (
        Upsample("nearest-exact", scale_factor=1.5),
        [(2, 1, 2), (1, 1, 2, 1), (1, 1, 1, 2, 2)],
    ),
    **{
        f"Upsample, {mode}, antialias, {corners}": (
            Upsample(mode, size=(2, 3), align_corners=corners, antialias=True),
            [(1, 1, 4, 2)],
        )
        for mode in ("bilinear", "bicubic")
        for corners in (False, True)
    },
    "PixelUnshuffle": (PixelUnshuffle(2), [(2, 1, 2, 4), (2, 2, 2)]),
    "PixelShuffle": (PixelShuffle(2), [(2, 4, 1, 2), (2, 2, 2)]),
}
SIZES = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def as_in_torch(make_key, layer, reference, shape, dtype):
    """Compare outputs and gradients."""
    x = lt.random.normal(make_key(), shape, dtype=dtype)
    y, pullback = torch.func.vjp(lambda x: layer(x, {}, {})[0], x)
    given = x.clone().requires_grad_()
    expected = reference(given)
    torch.testing.assert_close(y, expected)
    cotangent = torch.cos(torch.arange(y.numel(), dtype=dtype)).reshape(y.shape)
    expected.backward(cotangent)
    torch.testing.assert_close(pullback(cotangent)[0], given.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mode", "dims"),
    [
        *((mode, dims) for mode in ("nearest", "nearest-exact", "area") for dims in (1, 2, 3)),
        *(("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3)),
    ],
)
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("options", [{"scale_factor": 2}, {"scale_factor": 1.7}, {"size": 4}, {"size": 1}], ids=str)
def test_upsample_is_that_of_torch(make_key, dtype, mode, dims, align, options):
    if mode in ("nearest", "nearest-exact", "area"):
        if align:
            with pytest.raises(lt.InputError, match="align_corners must be False"):
                Upsample(mode, align_corners=True, **options)
            return
        corners = None
    else:
        corners = align
    reference = torch.nn.Upsample(mode=mode, align_corners=corners, **options)
    for batch in (2, 1):
        as_in_torch(
            make_key, Upsample(mode, align_corners=align, **options), reference, (batch, 2, *SIZES[dims]), dtype
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(
    "options", [{"scale_factor": 0.5}, {"scale_factor": (0.4, 1.7)}, {"size": 3}, {"size": (1, 6)}], ids=str
)
def test_antialiasing_is_that_of_torch(make_key, dtype, mode, align, options):
    layer = Upsample(mode, align_corners=align, antialias=True, **options)
    for batch in (2, 1):
        as_in_torch(
            make_key,
            layer,
            lambda x: F.interpolate(x, mode=mode, align_corners=align, antialias=True, **options),
            (batch, 2, 5, 7),
            dtype,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [*({"scale_factor": s} for s in (0.3, 0.7, 1.1, 2.5, (3, 0.9))), {"size": (7, 20)}], ids=str
)
def test_nearest_exact_is_the_same_under_a_transform(dtype, options):
    x = torch.arange(143.0).reshape(1, 1, 11, 13).to(dtype)
    layer = Upsample("nearest-exact", **options)
    expected = F.interpolate(x, mode="nearest-exact", **options)
    assert torch.equal(layer(x, {}, {})[0], expected)
    assert torch.equal(torch.vmap(lambda x: layer(x, {}, {})[0])(x[None])[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_is_that_of_torch(make_key, dtype, factor):
    as_in_torch(make_key, PixelShuffle(factor), torch.nn.PixelShuffle(factor), (2, 2 * factor**2, 3, 2), dtype)
    shape = (2, 2, 3 * factor, 2 * factor)
    as_in_torch(make_key, PixelUnshuffle(factor), torch.nn.PixelUnshuffle(factor), shape, dtype)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_unshuffling_undoes_shuffling(make_key, dims, factor):
    x = lt.random.normal(make_key(), (2, 2 * factor**dims, *(3, 1, 2)[:dims]))
    y, _ = PixelShuffle(factor)(x, {}, {})
    assert torch.equal(PixelUnshuffle(factor)(y, {}, {})[0], x)


def test_pixel_shuffle_in_one_and_three_dimensions():
    y, _ = PixelShuffle(2)(torch.tensor([[[1.0, 3.0], [2.0, 4.0]]]), {}, {})
    assert y.tolist() == [[[1, 2, 3, 4]]]
    y, _ = PixelShuffle(2)(torch.arange(8.0).view(1, 8, 1, 1, 1), {}, {})
    assert torch.equal(y, torch.arange(8.0).view(1, 1, 2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_half_precision_strides_and_empty_batches(make_key, name, dtype):
    layer, (shape, *_) = FORMS[name]
    x = lt.random.normal(make_key(), shape)
    y, _ = layer(x, {}, {})
    half, _ = layer(x.to(dtype), {}, {})
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(layer(strided, {}, {})[0], y)
    if x.ndim == 4:
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last), {}, {})[0], y)
    assert layer(x[:0], {}, {})[0].shape == (0, *y.shape[1:])
    assert torch.func.grad(lambda x: layer(x, {}, {})[0].sum())(x[:0]).shape == x[:0].shape


def test_equal_arguments_make_equal_layers():
    assert hash(Upsample("bilinear", size=[2, 3])) == hash(Upsample("bilinear", size=(2, 3)))
    assert Upsample("bilinear", size=[2, 3]).extra_repr() == "'bilinear', size=(2, 3)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Upsample("biliner", size=2), "Did you mean 'bilinear'"),
        (lambda: Upsample("nearest"), "neither"),
        (lambda: Upsample("nearest", size=2, scale_factor=2), "both"),
        (lambda: Upsample("nearest", size=(2, 0)), "size must be above 0"),
        (lambda: Upsample("nearest", scale_factor=-1.0), "scale_factor must be above 0"),
        (lambda: Upsample("nearest", size=2, align_corners=True), "align_corners must be False[\\s\\S]*bilinear"),
        (
            lambda: Upsample("trilinear", size=2, antialias=True),
            "antialias must be False[\\s\\S]*the mode one of bilinear, bicubic",
        ),
        (lambda: PixelShuffle(0), "factor must be at least 1"),
        (lambda: PixelUnshuffle(-1), "downscale_factor must be at least 1"),
        (lambda: PixelUnshuffle(2)(torch.ones(1, 3, 2, 3), {}, {}), "multiples of 2[\\s\\S]*\\(1, 3, 2, 3\\)"),
        (lambda: PixelUnshuffle(2)(torch.ones(1, 4), {}, {}), "multiples of 2"),
        (lambda: PixelShuffle(2)(torch.ones(1, 3, 2, 2), {}, {}), "multiple of 2"),
        (lambda: PixelShuffle(2)(torch.ones(1, 4), {}, {}), "multiple of 2"),
        (lambda: Upsample("bilinear", size=2)(torch.ones(1, 3, 2), {}, {}), "of 4 dimensions"),
        (lambda: Upsample("nearest", size=(2, 2))(torch.ones(1, 3, 2), {}, {}), "does not fit the layer"),
    ],
)
def test_wrong_arguments_are_explained(make, message):
    with pytest.raises(lt.InputError, match=message):
        make()
