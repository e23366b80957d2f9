"""Padding: every law, the numbers of torch.nn, and those of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import Pad

MODES = {"zeros": "Zero", "reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}
FORMS = {
    **{f"Pad, {mode}": (Pad(1, mode), [(2, 1, 3), (1, 1, 2, 3)]) for mode in (*MODES, "symmetric")},
    **{f"Pad, {mode}, cut": (Pad(((2, -1), (0, 1)), mode), [(1, 4, 2), (4, 2)]) for mode in ("zeros", "symmetric")},
    "Pad, constant": (Pad(((1, 0), 1, (0, 2)), "constant", value=-3.0), [(1, 1, 1, 2, 1)]),
    "Pad, circular, in three dimensions": (Pad(((1, 0), 1, (0, -1)), "circular"), [(1, 1, 1, 2, 2)]),
    "Pad, reflect, cut": (Pad(((-1, 2),), "reflect"), [(1, 1, 4)]),
    "Pad, replicate, cut": (Pad(((-1, 2),), "replicate"), [(1, 1, 4)]),
}
SIZES = {1: (5,), 2: (4, 5), 3: (4, 3, 5)}
SIDES = [1, 2, ((1, 2), (2, 0), (0, 1)), ((-1, 2), (2, -1), (-1, -1)), (2, 0, (1, 0))]


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def in_torch(padding, dims):
    """Return what torch.nn takes: the last dimension first, all numbers in a row."""
    pairs = [(n, n) if isinstance(n, int) else n for n in ((padding,) * dims if isinstance(padding, int) else padding)]
    return tuple(number for pair in reversed(pairs) for number in pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [*MODES, "constant"])
@pytest.mark.parametrize("padding", SIDES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pad_is_that_of_torch(make_key, dtype, mode, padding, dims):
    padding = padding if isinstance(padding, int) else padding[:dims]
    numbers = in_torch(padding, dims)
    if mode == "constant":
        layer, reference = Pad(padding, mode, value=2.5), getattr(torch.nn, f"ConstantPad{dims}d")(numbers, 2.5)
    else:
        layer, reference = Pad(padding, mode), getattr(torch.nn, f"{MODES[mode]}Pad{dims}d")(numbers)
    shapes = [(2, 3, *SIZES[dims]), (1, 1, *SIZES[dims]), (3, *SIZES[dims])]
    for shape in shapes[: 2 if isinstance(padding, int) else 3]:
        x = lt.random.normal(make_key(), shape, dtype=dtype)
        y, pullback = torch.func.vjp(lambda x: layer(x, {}, {})[0], x)
        given = x.clone().requires_grad_()
        expected = reference(given)
        assert torch.equal(y, expected)
        cotangent = torch.cos(torch.arange(y.numel(), dtype=dtype)).reshape(y.shape)
        expected.backward(cotangent)
        torch.testing.assert_close(pullback(cotangent)[0], given.grad)


@pytest.mark.parametrize("mode", ["symmetric", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [*SIDES[:3], (4, 3, 5)], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pad_is_that_of_numpy(make_key, mode, padding, dims):
    x = lt.random.normal(make_key(), (2, 3, *SIZES[dims]), dtype=torch.float64)
    padding = padding if isinstance(padding, int) else padding[:dims]
    if mode != "symmetric" and padding == (4, 3, 5)[:dims]:
        padding = tuple(number - 1 for number in padding)
    name = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
    numbers = in_torch(padding, dims)
    pairs = [(0, 0), (0, 0), *reversed(list(zip(numbers[::2], numbers[1::2], strict=True)))]
    torch.testing.assert_close(Pad(padding, mode)(x, {}, {})[0], torch.from_numpy(np.pad(x.numpy(), pairs, mode=name)))


def test_symmetric_padding_cuts_first():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert Pad(((-2, 2),), "symmetric")(x, {}, {})[0].tolist() == [[[3, 4, 4, 3]]]
    assert Pad(((1, -3),), "symmetric")(x, {}, {})[0].tolist() == [[[1, 1]]]
    assert Pad(-1, "symmetric")(x, {}, {})[0].tolist() == [[[2, 3]]]


def test_conv_pads_with_the_same_modes(make_key):
    x = lt.random.normal(make_key(), (2, 2, 4, 5))
    sides = ((0, 2), (1, 0))
    for mode in MODES:
        conv = lt.Conv((2, 2), 2, 3, padding=sides, padding_mode=mode)
        ps, st = lt.setup(make_key(), conv)
        y, _ = Pad(sides, mode)(x, {}, {})
        torch.testing.assert_close(conv(x, ps, st)[0], F.conv2d(y, ps["weight"], ps["bias"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("mode", [*MODES, "constant", "symmetric"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_dtype_every_layout_and_an_empty_batch(make_key, mode, dtype, dims):
    x = (8 * lt.random.normal(make_key(), (2, 3, *SIZES[dims]))).to(dtype)
    layer = Pad(((1, 2), 0, (0, 1))[:dims], mode)
    y, _ = layer(x, {}, {})
    assert y.dtype == dtype
    assert torch.equal(y.double(), layer(x.double(), {}, {})[0])
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(layer(strided, {}, {})[0], y)
    if dims > 1:
        last = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
        assert torch.equal(layer(last, {}, {})[0], y)
    assert layer(x[:0], {}, {})[0].shape == (0, *y.shape[1:])
    if dtype.is_floating_point:
        assert torch.func.grad(lambda x: layer(x, {}, {})[0].sum())(x[:0]).shape == x[:0].shape


def test_a_dimension_of_one_or_none():
    for mode in ("replicate", "circular", "symmetric"):
        assert Pad(1, mode)(torch.ones(1, 1, 1), {}, {})[0].tolist() == [[[1, 1, 1]]]
    assert Pad(1)(torch.ones(1, 1, 0), {}, {})[0].tolist() == [[[0, 0]]]
    assert Pad(0, "symmetric")(torch.ones(1, 1, 0), {}, {})[0].shape == (1, 1, 0)


def test_equal_arguments_make_equal_layers():
    assert Pad([[1, 2], 1]) == Pad(((1, 2), (1, 1))) and hash(Pad([1, 1])) == hash(Pad((1, 1)))
    assert Pad(1) != Pad((1,)) and Pad(1) != Pad(1, "reflect")


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Pad(1), "1"),
        (Pad(((1, 2),), "reflect"), "((1, 2),), 'reflect'"),
        (Pad(2, "constant", value=0.5), "2, 'constant', value=0.5"),
    ],
)
def test_prints_show_what_is_not_the_default(layer, text):
    assert layer.extra_repr() == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pad(1, "reflection"), "Did you mean 'reflect'"),
        (lambda: Pad(1, value=2.0), "value must be 0 unless mode is 'constant'"),
        (lambda: Pad((1, 1, 1, 1)), "1, 2 or 3 numbers or pairs"),
        (lambda: Pad(()), "1, 2 or 3 numbers or pairs"),
        (lambda: Pad("same"), "1, 2 or 3 numbers or pairs"),
        (lambda: Pad(((1, 2, 3),)), "pairs \\(before, after\\)"),
        (lambda: Pad((1.5,)), "pairs \\(before, after\\)"),
        (lambda: Pad(1)(torch.ones(2, 3), {}, {}), "\\(batch, channels, ...\\)[\\s\\S]*\\(2, 3\\)"),
        (lambda: Pad(1)(torch.ones(1, 1, 1, 1, 1, 1), {}, {}), "one to three"),
        (lambda: Pad((1, 1))(torch.ones(3), {}, {}), "last 2 dimensions"),
        (lambda: Pad(3, "reflect")(torch.ones(1, 1, 3), {}, {}), "large enough for the padding[\\s\\S]*\\(1, 1, 3\\)"),
        (lambda: Pad(4, "circular")(torch.ones(1, 1, 3), {}, {}), "large enough for the padding[\\s\\S]*\\(1, 1, 3\\)"),
        (lambda: Pad(4, "symmetric")(torch.ones(1, 1, 3), {}, {}), "at least 4 elements[\\s\\S]*got:      3"),
        (lambda: Pad(((-3, 1),), "symmetric")(torch.ones(1, 1, 3), {}, {}), "at least 1 elements"),
        (lambda: Pad(((-2, -2),))(torch.ones(1, 1, 3), {}, {}), "large enough for the padding"),
    ],
)
def test_wrong_arguments_are_explained(make, message):
    with pytest.raises(lt.InputError, match=message):
        make()
