"""Convolutions: every law, and the numbers of torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import Conv, ConvTranspose

FORMS = {
    "Conv": (Conv((2, 2), 2, 3, torch.tanh), [(2, 2, 3, 3)]),
    "Conv in one dimension, without bias": (Conv((3,), 2, 2, bias=False, stride=2), [(2, 2, 5), (2, 5)]),
    "Conv in three dimensions": (Conv((2, 1, 2), 2, 2), [(1, 2, 2, 2, 3)]),
    "Conv in groups, dilated, padded": (
        Conv((2,), 2, 4, groups=2, dilation=2, padding=((2, 1),), padding_mode="reflect"),
        [(2, 2, 4)],
    ),
    "Conv, same": (Conv((2, 3), 1, 2, padding="same", stride=2), [(1, 1, 3, 4)]),
    "Conv, circular": (Conv((3,), 1, 2, padding=1, padding_mode="circular"), [(2, 1, 4)]),
    "Conv, replicate": (Conv((3,), 1, 2, padding=1, padding_mode="replicate"), [(2, 1, 4)]),
    "ConvTranspose": (ConvTranspose((2, 2), 2, 3, torch.tanh), [(2, 2, 2, 2)]),
    "ConvTranspose in one dimension, without bias": (
        ConvTranspose((3,), 2, 4, stride=2, padding=1, output_padding=1, groups=2, bias=False),
        [(2, 2, 3), (2, 3)],
    ),
    "ConvTranspose in three dimensions": (ConvTranspose((2, 1, 2), 2, 2), [(1, 2, 2, 1, 2)]),
    "ConvTranspose, same": (ConvTranspose((2, 3), 1, 2, padding="same", stride=2), [(2, 1, 2, 2), (1, 2, 2)]),
}
SIZES = {1: (7,), 2: (6, 5), 3: (4, 5, 4)}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def as_in_torch(make_key, layer, reference, shape, dtype):
    """Compare outputs and gradients by everything."""
    reference = reference.to(dtype)
    ps = {name: value.detach() for name, value in reference.named_parameters()}
    x = lt.random.normal(make_key(), shape, dtype=dtype)
    y, pullback = torch.func.vjp(lambda x, ps: layer(x, ps, {})[0], x, ps)
    reference.zero_grad()
    given = x.clone().requires_grad_()
    expected = reference(given)
    torch.testing.assert_close(y, expected)
    cotangent = torch.cos(torch.arange(y.numel(), dtype=dtype)).reshape(y.shape)
    expected.backward(cotangent)
    to_x, to_ps = pullback(cotangent)
    torch.testing.assert_close(to_x, given.grad)
    torch.testing.assert_close(to_ps, {name: value.grad for name, value in reference.named_parameters()})


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "groups": 2},
        {"padding": "same", "dilation": 3},
        {"padding": "valid", "bias": False},
        *({"padding": 2, "padding_mode": mode, "stride": 2} for mode in ("zeros", "reflect", "replicate", "circular")),
        *({"padding": "same", "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
    ],
    ids=str,
)
def test_conv_is_that_of_torch(make_key, dtype, dims, options):
    kernel = (2, 3, 2)[:dims] if options.get("dilation") != 3 else (2,) * dims
    reference = getattr(torch.nn, f"Conv{dims}d")(2, 4, kernel, **options)
    layer = Conv(kernel, 2, 4, **options)
    ps, _ = lt.setup(make_key(), layer)
    assert {n: p.shape for n, p in ps.items()} == {n: p.shape for n, p in reference.named_parameters()}
    for batch in ((3,), (1,), ()):
        as_in_torch(make_key, layer, reference, (*batch, 2, *SIZES[dims]), dtype)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, (2, 1)])
def test_conv_pads_each_side_by_its_own_number(make_key, mode, stride):
    layer = Conv((3, 2), 2, 3, stride=stride, padding=[(0, 2), [1, 0]], padding_mode=mode)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 2, 5, 4))
    padded = F.pad(x, (1, 0, 0, 2), "constant" if mode == "zeros" else mode)
    torch.testing.assert_close(layer(x, ps, st)[0], F.conv2d(padded, ps["weight"], ps["bias"], stride))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [5, 6, 7])
def test_same_divides_the_size_and_rounds_up(stride, kernel, dilation, size):
    layer = Conv((kernel,), 1, 1, stride=stride, dilation=dilation, padding="same")
    assert lt.output_shape(layer, (1, 1, size)) == (1, 1, -(-size // stride))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2, "groups": 2, "bias": False},
        {"dilation": 3, "output_padding": 2, "padding": 2},
    ],
    ids=str,
)
def test_conv_transpose_is_that_of_torch(make_key, dtype, dims, options):
    kernel = (2, 3, 2)[:dims]
    reference = getattr(torch.nn, f"ConvTranspose{dims}d")(4, 2, kernel, **options)
    layer = ConvTranspose(kernel, 4, 2, **options)
    ps, _ = lt.setup(make_key(), layer)
    assert {n: p.shape for n, p in ps.items()} == {n: p.shape for n, p in reference.named_parameters()}
    for batch in ((3,), (1,), ()):
        as_in_torch(make_key, layer, reference, (*batch, 4, *(3, 2, 3)[:dims]), dtype)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", ["same", 1, ((0, 1),), ((2, 0),)])
def test_conv_transpose_is_the_transpose_of_conv(make_key, kernel, stride, dilation, padding):
    extent = dilation * (kernel - 1)
    low, high = {"same": (extent // 2, extent - extent // 2), 1: (1, 1)}.get(padding) or padding[0]
    size = 4 * stride if padding == "same" else (4 - 1) * stride + extent + 1 - low - high
    options = {"stride": stride, "dilation": dilation, "padding": padding, "bias": False}
    conv, transpose = Conv((kernel,), 2, 3, **options), ConvTranspose((kernel,), 3, 2, **options)
    ps, st = lt.setup(make_key(), conv)
    _, pullback = torch.func.vjp(lambda x: conv(x, ps, st)[0], torch.zeros(1, 2, size))
    x = lt.random.normal(make_key(), (1, 3, 4))
    y, _ = transpose(x, ps, st)
    assert y.shape == (1, 2, size)
    torch.testing.assert_close(y, pullback(x)[0])


def test_conv_transpose_cuts_and_lengthens_each_side_by_its_own_number(make_key):
    ps, st = lt.setup(make_key(), ConvTranspose((3, 3), 2, 3))
    ps = {**ps, "bias": torch.tensor([1.0, 2.0, 3.0])}
    x = lt.random.normal(make_key(), (2, 2, 4, 3))
    layer = ConvTranspose((3, 3), 2, 3, stride=2, padding=((1, 0), (0, 2)), output_padding=(1, 0))
    longest = F.conv_transpose2d(x, ps["weight"], ps["bias"], 2, 0, 1)
    torch.testing.assert_close(layer(x, ps, st)[0], longest[:, :, 1:, : 7 - 2])


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 5, 5)])
@pytest.mark.parametrize("padding", [0, "same", ((1, 0), (0, 0))])
@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
def test_an_empty_batch_has_an_output_and_gradients(make_key, kind, shape, padding):
    layer = kind((2, 2), 2, 3, padding=padding)
    ps, st = lt.setup(make_key(), layer)
    x = torch.ones(shape)
    gradient = torch.func.grad(lambda ps: layer(x, ps, st)[0].sum())(ps)
    assert layer(x, ps, st)[0].shape[:2] == (shape[0], 3)
    assert bool((gradient["weight"] == 0).all()) == (shape[0] == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_stays(make_key, kind, stride, dtype):
    layer = kind((3, 3), 2, 3, torch.relu, padding="same", stride=stride)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 2, 4, 4))
    y, _ = layer(x.to(dtype), {name: value.to(dtype) for name, value in ps.items()}, st)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x, ps, st)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_strided_memory_makes_no_difference(make_key, padding_mode):
    layer = Conv((3, 2), 2, 3, padding="same", padding_mode=padding_mode)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 4, 4, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x, ps, st)[0], layer(x.contiguous(), ps, st)[0])


def test_equal_arguments_make_equal_layers():
    assert Conv([3, 3], 1, 2, stride=[2, 2], padding=1) == Conv((3, 3), 1, 2, stride=2, padding=((1, 1), (1, 1)))
    assert hash(Conv([3], 1, 2, padding=[[0, 1]])) == hash(Conv((3,), 1, 2, padding=((0, 1),)))
    assert Conv((3,), 1, 2) != Conv((3,), 1, 2, padding=1)


def test_prints_show_what_is_not_the_default():
    assert Conv((3, 3), 1, 2).extra_repr() == "(3, 3), 1 -> 2"
    layer = Conv((2, 3), 2, 4, torch.relu, stride=2, padding="same", padding_mode="circular", groups=2, bias=False)
    assert layer.extra_repr() == (
        "(2, 3), 2 -> 4, relu, stride=2, padding=((0, 1), 1), groups=2, bias=False, padding_mode='circular'"
    )
    assert Conv((2, 2), 1, 2, padding="same", dilation=(2, 1)).extra_repr() == (
        "(2, 2), 1 -> 2, padding=(1, (0, 1)), dilation=(2, 1)"
    )
    assert Conv((2, 2), 1, 2, padding="same").extra_repr() == "(2, 2), 1 -> 2, padding=((0, 1), (0, 1))"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 3}, "kernel_size must be a tuple[\\s\\S]*kernel_size=\\(3, 3\\)"),
        ({"kernel_size": (1, 1, 1, 1)}, "1, 2 or 3"),
        ({"kernel_size": (0, 3)}, "at least 1"),
        ({"stride": 0}, "stride[\\s\\S]*none below 1"),
        ({"stride": (1, 1, 1)}, "tuple of 2"),
        ({"dilation": "2"}, "dilation must be"),
        ({"padding": "Same"}, "'same' or 'valid'"),
        ({"padding": -1}, "pairs \\(before, after\\)"),
        ({"padding": ((1, 2, 3), 1)}, "pairs \\(before, after\\)"),
        ({"padding": (1, 1, 1)}, "tuple of 2"),
        ({"groups": 2, "out_channels": 3}, "groups must be a divisor"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"padding_mode": "reflection"}, "Did you mean 'reflect'"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(lt.InputError, match=message):
        Conv(**{"kernel_size": (3, 3), "in_channels": 2, "out_channels": 4, **arguments})


def test_wrong_inputs_are_explained(make_key):
    layer = Conv((3, 3), 2, 3)
    ps, st = lt.setup(make_key(), layer)
    with pytest.raises(lt.InputError, match="Conv \\(3, 3\\), 2 -> 3[\\s\\S]*\\(batch, 2, height, width\\)"):
        layer(torch.ones(1, 3, 8, 8), ps, st)
    with pytest.raises(lt.DTypeError, match="float64"):
        layer(torch.ones(1, 2, 8, 8, dtype=torch.float64), ps, st)
    layer = ConvTranspose((3,), 2, 3, output_padding=1, stride=2)
    with pytest.raises(lt.InputError, match="ConvTranspose \\(3,\\), 2 -> 3[\\s\\S]*\\(batch, 2, length\\)"):
        layer(torch.ones(1, 3, 8), lt.setup(make_key(), layer)[0], st)


@pytest.mark.parametrize("padding", [1, ((0, 1),)])
def test_conv_transpose_checks_the_output_padding(padding):
    with pytest.raises(lt.InputError, match="must be less than"):
        ConvTranspose((3,), 1, 1, stride=2, padding=padding, output_padding=2)
