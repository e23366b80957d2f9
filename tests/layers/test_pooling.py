"""Poolings: every law, and the numbers of torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import (
    AdaptiveLPPool,
    AdaptiveMaxPool,
    AdaptiveMeanPool,
    GlobalLPPool,
    GlobalMaxPool,
    GlobalMeanPool,
    LPPool,
    MaxPool,
    MeanPool,
)

FORMS = {
    "MaxPool": (MaxPool((2, 2)), [(2, 1, 4, 5)]),
    "MaxPool in one dimension, padded": (MaxPool((3,), stride=2, padding=((0, 1),), dilation=2), [(2, 1, 7), (2, 7)]),
    "MaxPool in three dimensions": (MaxPool((2, 2, 2), stride=1, padding=1), [(1, 1, 2, 3, 2)]),
    "MaxPool, ceil": (MaxPool((2, 2), ceil_mode=True), [(1, 1, 3, 4)]),
    "MaxPool, ceil, padded": (MaxPool((3,), stride=2, padding=((1, 0),), ceil_mode=True), [(2, 1, 5)]),
    "MeanPool": (MeanPool((2, 2)), [(2, 1, 4, 5)]),
    "MeanPool in one dimension, same": (MeanPool((2,), stride=1, padding="same"), [(2, 1, 5), (2, 5)]),
    "MeanPool in three dimensions": (MeanPool((2, 2, 2), stride=1, padding=1), [(1, 1, 2, 3, 2)]),
    "MeanPool, ceil": (MeanPool((2, 2), ceil_mode=True), [(1, 1, 3, 4)]),
    "MeanPool without padding": (MeanPool((3,), padding=1, count_include_pad=False), [(2, 1, 5)]),
    "MeanPool without sides": (MeanPool((2, 2), stride=1, padding="same", count_include_pad=False), [(1, 1, 2, 3)]),
    "MeanPool with a divisor": (MeanPool((2,), padding=((1, 0),), divisor_override=3), [(2, 1, 5)]),
    "LPPool, ceil": (LPPool((2, 2), ceil_mode=True), [(1, 1, 3, 4)]),
    "LPPool": (LPPool((2, 2)), [(2, 1, 4, 4)]),
    "LPPool in one dimension, padded": (LPPool((3,), stride=2, padding=1, p=4), [(2, 1, 5), (2, 5)]),
    "LPPool in three dimensions": (LPPool((2, 2, 2)), [(1, 1, 2, 4, 2)]),
    "GlobalMaxPool": (GlobalMaxPool(), [(2, 2, 3), (2, 2, 2, 3)]),
    "GlobalMeanPool": (GlobalMeanPool(), [(2, 2, 3), (2, 2, 2, 3)]),
    "GlobalLPPool": (GlobalLPPool(p=2), [(2, 2, 3), (2, 2, 2, 3)]),
    "AdaptiveMaxPool": (AdaptiveMaxPool((2,)), [(2, 2, 5), (2, 5)]),
    "AdaptiveMaxPool in two dimensions": (AdaptiveMaxPool((2, None)), [(2, 2, 3, 2)]),
    "AdaptiveMaxPool in three dimensions": (AdaptiveMaxPool((2, 1, 1)), [(1, 2, 3, 2, 2)]),
    "AdaptiveMeanPool": (AdaptiveMeanPool((2,)), [(2, 2, 5), (2, 5)]),
    "AdaptiveMeanPool in two dimensions": (AdaptiveMeanPool((2, None)), [(2, 2, 3, 2)]),
    "AdaptiveMeanPool in three dimensions": (AdaptiveMeanPool((2, 1, 1)), [(1, 2, 3, 2, 2)]),
    "AdaptiveLPPool": (AdaptiveLPPool((2,)), [(2, 2, 5), (2, 5)]),
    "AdaptiveLPPool in two dimensions": (AdaptiveLPPool((2, None), p=4), [(2, 2, 3, 2)]),
    "AdaptiveLPPool in three dimensions": (AdaptiveLPPool((2, 1, 1)), [(1, 2, 3, 2, 2)]),
}
SIZES = {1: (9,), 2: (6, 7), 3: (5, 4, 6)}


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
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        *((MaxPool, "MaxPool", o) for o in ({}, {"stride": 1}, {"padding": 1}, {"dilation": 2, "stride": 1})),
        *((MaxPool, "MaxPool", {**o, "ceil_mode": True}) for o in ({}, {"stride": 3, "padding": 1}, {"dilation": 2})),
        *((MeanPool, "AvgPool", o) for o in ({}, {"stride": 1}, {"padding": 1}, {"stride": 2, "padding": 1})),
        *(
            (MeanPool, "AvgPool", {"ceil_mode": ceil, "count_include_pad": count, "stride": 3, "padding": 1})
            for ceil in (True, False)
            for count in (True, False)
        ),
        *((LPPool, "LPPool", o) for o in ({}, {"stride": 1}, {"p": 4.0}, {"ceil_mode": True})),
    ],
    ids=str,
)
def test_pools_are_those_of_torch(make_key, dtype, dims, ours, theirs, options):
    kernel = (3, 2, 2)[:dims] if ours is not LPPool or dims > 1 else 3
    powers = {"norm_type": options.get("p", 2.0)} if ours is LPPool else {}
    reference = getattr(torch.nn, f"{theirs}{dims}d")(
        kernel_size=kernel, **powers, **{name: value for name, value in options.items() if name != "p"}
    )
    layer = ours((3, 2, 2)[:dims], **options)
    for batch in ((2,), (1,), ()):
        as_in_torch(make_key, layer, reference, (*batch, 2, *SIZES[dims]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_divisor_is_that_of_torch(make_key, dtype, dims, ceil_mode):
    options = {"ceil_mode": ceil_mode, "divisor_override": 5, "padding": 1, "stride": 2}
    reference = getattr(torch.nn, f"AvgPool{dims}d")((3, 2, 2)[:dims], **options)
    as_in_torch(make_key, MeanPool((3, 2, 2)[:dims], **options), reference, (2, 2, *SIZES[dims]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(AdaptiveMaxPool, "AdaptiveMaxPool"), (AdaptiveMeanPool, "AdaptiveAvgPool")]
)
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 3, 2), (2, None, None), (12, 1, 3)], ids=str)
def test_adaptive_pools_are_those_of_torch(make_key, dtype, dims, ours, theirs, size):
    reference = getattr(torch.nn, f"{theirs}{dims}d")(size[:dims])
    for batch in ((2,), (1,), ()):
        as_in_torch(make_key, ours(size[:dims]), reference, (*batch, 2, *SIZES[dims]), dtype)


@pytest.mark.parametrize("size", [5, 6, 7])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("low", [0, 1])
@pytest.mark.parametrize("high", [0, 1])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_windows_are_those_of_a_loop(make_key, size, kernel, stride, low, high, ceil_mode):
    x = lt.random.normal(make_key(), (size,), dtype=torch.float64) - 3
    count = (size + low + high - kernel + (stride - 1) * ceil_mode) // stride + 1
    starts = [i * stride - low for i in range(count) if not ceil_mode or i * stride < size + low]
    windows = [x[max(start, 0) : start + kernel] for start in starts]
    lengths = [min(start + kernel, size + high) - start for start in starts]
    pairs = list(zip(windows, lengths, strict=True))
    shape = {"stride": stride, "padding": ((low, high),), "ceil_mode": ceil_mode}
    for layer, expected in (
        (MaxPool((kernel,), **shape), [window.amax() for window in windows]),
        (MeanPool((kernel,), **shape), [window.sum() / length for window, length in pairs]),
        (MeanPool((kernel,), count_include_pad=False, **shape), [window.mean() for window in windows]),
        (MeanPool((kernel,), divisor_override=-5, **shape), [window.sum() / -5 for window in windows]),
        (LPPool((kernel,), **shape), [(window.square().sum() * kernel / length).sqrt() for window, length in pairs]),
    ):
        torch.testing.assert_close(layer(x[None, None], {}, {})[0], torch.stack(expected)[None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("p", [1, 2.0, 3.0])
def test_adaptive_lp_windows_are_those_of_a_loop(make_key, dtype, size, p):
    def loop(x):
        parts = [x[..., i * 6 // size : -((i + 1) * 6 // -size)] for i in range(size)]
        powers = torch.stack([part.pow(p).sum(-1) for part in parts], -1)
        parts = [powers[:, :, j * 5 // 2 : -((j + 1) * 5 // -2)] for j in range(2)]
        return torch.stack([part.sum(2) for part in parts], 2).pow(1 / p)

    layer = AdaptiveLPPool((2, size), p=p)
    as_in_torch(make_key, lambda x, *_: layer(x.exp(), {}, {}), lambda x: loop(x.exp()), (2, 3, 5, 6), dtype)


def test_none_keeps_the_size_in_one_dimension_too(make_key):
    x = lt.random.normal(make_key(), (2, 3, 5))
    assert torch.equal(AdaptiveMeanPool((None,))(x, {}, {})[0], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_global_pools_are_pools_over_everything(make_key, dtype, dims):
    size = SIZES[dims]
    window = size if dims > 1 else size[0]
    lp = getattr(F, f"lp_pool{dims}d")
    for ours, theirs in (
        (GlobalMaxPool(), getattr(torch.nn, f"AdaptiveMaxPool{dims}d")(1)),
        (GlobalMeanPool(), getattr(torch.nn, f"AdaptiveAvgPool{dims}d")(1)),
        (GlobalLPPool(), lambda x: lp(x, 2.0, window)),
        (GlobalLPPool(p=4), lambda x: lp(x, 4.0, window)),
    ):
        as_in_torch(make_key, ours, theirs, (2, 3, *size), dtype)


@pytest.mark.parametrize("sides", [((1, 0), (0, 1)), ((0, 1), (1, 1)), "same"])
def test_each_side_is_padded_by_its_own_number(make_key, sides):
    x = lt.random.normal(make_key(), (2, 3, 5, 6)) - 5.0  # a padding of zeros would be the maximum
    pad = {"same": (0, 1, 1, 1)}.get(sides) if sides == "same" else (*sides[1], *sides[0])
    kernel = (3, 2)
    for layer, reference, value in (
        (MaxPool, F.max_pool2d, -torch.inf),
        (MeanPool, F.avg_pool2d, 0.0),
        (LPPool, lambda x, k: F.lp_pool2d(x, 2.0, k), 0.0),
    ):
        y, _ = layer(kernel, padding=sides)(x, {}, {})
        torch.testing.assert_close(y, reference(F.pad(x, pad, value=value), kernel))


@pytest.mark.parametrize("layer", [MaxPool, MeanPool, LPPool])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [5, 6, 7])
def test_same_divides_the_size_and_rounds_up(layer, stride, kernel, size):
    assert lt.output_shape(layer((kernel,), stride=stride, padding="same"), (1, 1, size)) == (1, 1, -(-size // stride))


ONE_OF_EACH = [
    MaxPool((3, 2), padding=((0, 1), 1), ceil_mode=True),
    MeanPool((3,), padding=((1, 0),), count_include_pad=False, ceil_mode=True),
    MeanPool((2, 2, 2), padding=1, divisor_override=3),
    LPPool((3, 2), padding="same", ceil_mode=True),
    *(kind((2,) * dims) for kind in (MaxPool, MeanPool, LPPool) for dims in (1, 2, 3)),
    *(kind((2,) * dims) for kind in (AdaptiveMaxPool, AdaptiveMeanPool, AdaptiveLPPool) for dims in (1, 2, 3)),
    GlobalMaxPool(),
    GlobalMeanPool(),
    GlobalLPPool(),
]


def shape_for(layer, batch=2):
    sizes = getattr(layer, "kernel_size", None) or getattr(layer, "output_size", (2, 2))
    return (batch, 3, *(4 for _ in sizes))


@pytest.mark.parametrize("layer", ONE_OF_EACH, ids=str)
def test_an_empty_batch_has_an_output_and_a_gradient(layer):
    x = torch.ones(shape_for(layer, batch=0))
    assert layer(x, {}, {})[0].shape[:2] == (0, 3)
    assert torch.func.grad(lambda x: layer(x, {}, {})[0].sum())(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", ONE_OF_EACH, ids=str)
def test_half_precision_stays(make_key, layer, dtype):
    x = lt.random.normal(make_key(), shape_for(layer))
    y, _ = layer(x.to(dtype), {}, {})
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x, {}, {})[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", ONE_OF_EACH, ids=str)
def test_strided_memory_makes_no_difference(make_key, layer):
    x = lt.random.normal(make_key(), shape_for(layer)).transpose(0, -1)
    torch.testing.assert_close(layer(x, {}, {})[0], layer(x.contiguous(), {}, {})[0])


@pytest.mark.parametrize("layer", [layer for layer in ONE_OF_EACH if len(shape_for(layer)) > 3], ids=str)
def test_channels_may_be_last_in_memory(make_key, layer):
    x = lt.random.normal(make_key(), shape_for(layer))
    last = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    torch.testing.assert_close(layer(last, {}, {})[0], layer(x, {}, {})[0])


def test_equal_arguments_make_equal_layers():
    assert MaxPool([2, 2], stride=[2, 2], padding=1) == MaxPool((2, 2), padding=((1, 1), (1, 1)))
    assert hash(AdaptiveMaxPool([2, None])) == hash(AdaptiveMaxPool((2, None)))
    assert LPPool((2,), p=3.0) != LPPool((2,))


def test_prints_show_what_is_not_the_default():
    assert MaxPool((2, 2)).extra_repr() == "(2, 2)"
    assert MaxPool((3, 2), stride=1, padding="same", dilation=2).extra_repr() == (
        "(3, 2), stride=1, padding=(2, 1), dilation=2"
    )
    assert LPPool((2,), p=3).extra_repr() == "(2,), p=3"
    assert MaxPool((2,), stride=1, ceil_mode=True).extra_repr() == "(2,), stride=1, ceil_mode=True"
    assert MeanPool((2,), count_include_pad=False, divisor_override=3).extra_repr() == (
        "(2,), count_include_pad=False, divisor_override=3"
    )
    assert AdaptiveLPPool((2, None), p=3).extra_repr() == "(2, None), p=3"
    assert GlobalLPPool(p=3.0).extra_repr() == "p=3.0"
    assert AdaptiveMeanPool((2, None)).extra_repr() == "(2, None)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxPool(2), "kernel_size=\\(2, 2\\)"),
        (lambda: MeanPool((2, 0)), "at least 1"),
        (lambda: MaxPool((2, 2), padding=2), "at most half"),
        (lambda: MeanPool((2, 2), padding=((0, 2), 0)), "at most half"),
        (lambda: MaxPool((2, 2), stride=0), "stride"),
        (lambda: MaxPool((2, 2), dilation=(1, 1, 1)), "dilation[\\s\\S]*tuple of 2"),
        (lambda: LPPool((2,), p=0), "p must be positive"),
        (lambda: MeanPool((2,), divisor_override=0), "must be other than 0"),
        (lambda: AdaptiveLPPool((2,), p=-1), "p must be positive"),
        (lambda: GlobalLPPool(p=float("inf")), "p must be positive"),
        (lambda: AdaptiveMaxPool(2), "output_size=\\(2, 2\\)"),
        (lambda: AdaptiveMeanPool((None, -1)), "at least 1"),
    ],
)
def test_wrong_arguments_are_explained(make, message):
    with pytest.raises(lt.InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (MaxPool((2, 2)), (3, 4), "height, width"),
        (MaxPool((5,)), (2, 3, 4), "no smaller than the window"),
        (MeanPool((2,)), (2, 3, 4, 4), "length"),
        (LPPool((2, 2)), (2, 2, 3, 4, 4), "height, width"),
        (GlobalMaxPool(), (2, 3), "must have dimensions after[\\s\\S]*batch and channels"),
        (GlobalMeanPool(), (3,), "must have dimensions after"),
        (AdaptiveMeanPool((2, 2)), (4,), "height, width"),
        (AdaptiveLPPool((2,)), (1, 2, 3, 4), "length"),
    ],
    ids=str,
)
def test_wrong_inputs_are_explained(layer, shape, message):
    with pytest.raises(lt.InputError, match=message):
        layer(torch.ones(shape), {}, {})
