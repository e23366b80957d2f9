"""GroupNorm, LayerNorm, RMSNorm and InstanceNorm: the laws, and torch's numbers."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from functools import partial

import pytest
import torch

import luxtorch as lt
from luxtorch import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

FORMS = {
    "GroupNorm": (GroupNorm(4, 2, torch.tanh), [(2, 4), (1, 4, 2, 2)]),
    "GroupNorm, not affine": (GroupNorm(4, 1, affine=False), [(2, 4, 3)]),
    "GroupNorm without bias": (GroupNorm(4, 2, bias=False), [(2, 4, 3)]),
    "BatchNorm without bias": (BatchNorm(4, bias=False), [(3, 4)]),
    "LayerNorm": (LayerNorm(3, torch.tanh), [(3,), (2, 4, 3)]),
    "LayerNorm of two dimensions": (LayerNorm((2, 3)), [(4, 2, 3)]),
    "LayerNorm without bias": (LayerNorm(3, bias=False), [(2, 3)]),
    "LayerNorm, not affine": (LayerNorm(3, affine=False), [(2, 3)]),
    "RMSNorm": (RMSNorm(3), [(2, 3), (3,)]),
    "RMSNorm of two dimensions, not affine": (RMSNorm([2, 3], eps=1e-3, affine=False), [(4, 2, 3)]),
    "InstanceNorm": (InstanceNorm(2, torch.tanh), [(3, 2, 4), (1, 2, 2, 3), (1, 2, 2, 1, 2)]),
    "InstanceNorm, affine, with statistics": (InstanceNorm(2, affine=True, track_running_stats=True), [(3, 2, 4)]),
    "InstanceNorm without bias": (InstanceNorm(2, affine=True, bias=False), [(3, 2, 4)]),
    "InstanceNorm with statistics": (InstanceNorm(2, track_running_stats=True), [(3, 2, 2, 2)]),
}
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def parameters_of(key, reference):
    """Draw parameters, and give them to a module of torch."""
    ps = {
        name: lt.random.normal(lt.random.fold_in(key, name), value.shape, mean=1.0, dtype=value.dtype)
        for name, value in reference.named_parameters()
    }
    reference.load_state_dict(ps, strict=False)
    return ps


def inputs(key, shape, dtype, contiguous):
    if contiguous:
        return 2 * lt.random.normal(key, shape, dtype=dtype) + 1
    x = 2 * lt.random.normal(key, shape[::-1], dtype=dtype) + 1
    return x.permute(*reversed(range(x.ndim)))


PAIRS = {
    "GroupNorm": (GroupNorm(4, 2), torch.nn.GroupNorm(2, 4), [(3, 4, 5), (1, 4), (2, 4, 2, 3), (0, 4, 5)]),
    "GroupNorm, eps": (GroupNorm(4, 4, eps=0.1), torch.nn.GroupNorm(4, 4, eps=0.1), [(3, 4, 5)]),
    "GroupNorm, not affine": (GroupNorm(4, 1, affine=False), torch.nn.GroupNorm(1, 4, affine=False), [(3, 4, 5)]),
    "LayerNorm": (LayerNorm(4), torch.nn.LayerNorm(4), [(3, 4), (4,), (1, 4), (2, 3, 4), (0, 4)]),
    "LayerNorm, eps": (LayerNorm((3, 4), eps=0.1), torch.nn.LayerNorm((3, 4), eps=0.1), [(2, 3, 4), (3, 4)]),
    "LayerNorm without bias": (LayerNorm(4, bias=False), torch.nn.LayerNorm(4, bias=False), [(3, 4)]),
    "LayerNorm, not affine": (LayerNorm(4, affine=False), torch.nn.LayerNorm(4, elementwise_affine=False), [(3, 4)]),
    "RMSNorm": (RMSNorm(4), torch.nn.RMSNorm(4), [(3, 4), (4,), (1, 4), (2, 3, 4), (0, 4)]),
    "RMSNorm, eps": (RMSNorm((3, 4), eps=0.1), torch.nn.RMSNorm((3, 4), eps=0.1), [(2, 3, 4)]),
    "RMSNorm, not affine": (RMSNorm(4, affine=False), torch.nn.RMSNorm(4, elementwise_affine=False), [(3, 4)]),
    "InstanceNorm": (InstanceNorm(4), torch.nn.InstanceNorm1d(4), [(3, 4, 5), (1, 4, 2), (0, 4, 5)]),
    "InstanceNorm of images": (InstanceNorm(4, eps=0.1), torch.nn.InstanceNorm2d(4, eps=0.1), [(2, 4, 2, 3)]),
    "InstanceNorm of volumes": (
        InstanceNorm(4, affine=True),
        torch.nn.InstanceNorm3d(4, affine=True),
        [(2, 4, 2, 1, 3)],
    ),
}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("name", PAIRS)
def test_the_numbers_and_gradients_are_those_of_torch(make_key, name, dtype, contiguous):
    layer, reference, shapes = PAIRS[name]
    reference = reference.to(dtype)
    ps = parameters_of(make_key(), reference)
    assert {n: tuple(p.shape) for n, p in ps.items()} == {n: tuple(p.shape) for n, p in lt.setup(0, layer)[0].items()}
    st = lt.setup(0, layer)[1]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {"rtol": 1e-4, "atol": 1e-5}
    for shape in shapes:
        x = inputs(make_key(), shape, dtype, contiguous)
        y, new = layer(x, ps, st)
        assert y.dtype == dtype and new == st
        torch.testing.assert_close(y, reference(x), **tolerance)
        got = torch.func.grad(lambda ps, x=x: (layer(x, ps, st)[0] ** 2).sum())(ps)
        reference.zero_grad()
        if ps:
            (reference(x) ** 2).sum().backward()
            expected = {name: value.grad for name, value in reference.named_parameters()}
            torch.testing.assert_close(got, expected, rtol=10 * tolerance["rtol"], atol=0.1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layer", [GroupNorm(2, 1), LayerNorm(2), RMSNorm(2), InstanceNorm(1, affine=True)])
def test_the_gradient_of_close_half_precision_values_is_that_of_double_precision(layer, dtype):
    shape = (1, 1, 2) if isinstance(layer, InstanceNorm) else (1, 2)
    x = torch.tensor([2.6875, 2.703125 if dtype == torch.float16 else 2.71875], dtype=dtype).reshape(shape)
    weights = torch.tensor([0.7, 1.3])
    ps, st = lt.setup(0, layer)

    def gradient(x, dtype):
        cast = {name: value.to(dtype) for name, value in ps.items()}
        return torch.func.grad(lambda ps: (layer(x, ps, st)[0] * weights.to(dtype)).sum())(cast)["weight"]

    torch.testing.assert_close(gradient(x, dtype), gradient(x.double(), torch.float64).to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layer", [GroupNorm(4, 2, torch.relu), LayerNorm(4, torch.relu), InstanceNorm(4, torch.relu)])
def test_the_activation_comes_last(make_key, layer):
    plain = type(layer)(4, 2) if isinstance(layer, GroupNorm) else type(layer)(4)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (4, 4, 4))
    assert torch.equal(layer(x, ps, st)[0], plain(x, ps, st)[0].relu())


def test_parameters_start_as_ones_and_zeros():
    for layer in (GroupNorm(4, 2), LayerNorm(4), RMSNorm(4), InstanceNorm(4, affine=True)):
        ps, _ = lt.setup(0, layer)
        assert ps["weight"].tolist() == [1] * 4
        assert ps.get("bias", torch.zeros(4)).tolist() == [0] * 4


def test_rms_norm_adds_the_smallest_step_of_the_dtype_by_default():
    x = torch.full((1, 2), 1e-4)
    y, _ = RMSNorm(2, affine=False)(x, {}, {})
    torch.testing.assert_close(y, x / (x**2 + torch.finfo(x.dtype).eps).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("path", ["eager", "vjp", "compiled"])
@pytest.mark.parametrize("momentum", [0.1, 0.9])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 4, 2, 3), (1, 4, 2, 1, 2)])
def test_instance_norm_keeps_the_statistics_of_torch(make_key, shape, momentum, path, dtype):
    kind = {3: torch.nn.InstanceNorm1d, 4: torch.nn.InstanceNorm2d, 5: torch.nn.InstanceNorm3d}[len(shape)]
    reference = kind(4, momentum=momentum, affine=True, track_running_stats=True).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    layer = InstanceNorm(4, momentum=momentum, affine=True, track_running_stats=True)
    ps, (_, st) = parameters_of(make_key(), reference), lt.setup(0, layer)
    st = lt.f64(st) if dtype == torch.float64 else st
    run = {
        "eager": layer,
        "vjp": lambda x, ps, st: torch.func.vjp(lambda x: layer(x, ps, st), x, has_aux=True)[::2],
        "compiled": torch.compile(lambda x, ps, st: layer(x, ps, st), fullgraph=True, backend="aot_eager"),
    }[path]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {"rtol": 1e-4, "atol": 1e-5}
    for step in range(3):
        x = inputs(lt.random.fold_in(make_key(), step), shape, dtype, contiguous=True)
        y, st = run(x, ps, st)
        torch.testing.assert_close(y, reference(x), **tolerance)
    assert st["running_mean"].dtype == reference.running_mean.dtype
    torch.testing.assert_close(st["running_mean"], reference.running_mean, **tolerance)
    torch.testing.assert_close(st["running_var"], reference.running_var, **tolerance)
    y, new = layer(x, ps, lt.test_mode(st))
    torch.testing.assert_close(y, reference.eval()(x), **tolerance)
    assert torch.equal(new["running_mean"], st["running_mean"])


def test_an_empty_batch_leaves_the_statistics_of_instance_norm_alone(make_key):
    layer = InstanceNorm(4, affine=True, track_running_stats=True)
    ps, st = lt.setup(make_key(), layer)
    y, new = layer(torch.ones(0, 4, 5), ps, st)
    assert y.shape == (0, 4, 5)
    assert torch.equal(new["running_mean"], torch.zeros(4)) and torch.equal(new["running_var"], torch.ones(4))


@pytest.mark.parametrize(("channels", "groups"), [(4, 3), (2, 4), (4, 0), (0, 1), (4, -2)])
def test_groups_divide_channels(channels, groups):
    with pytest.raises(lt.InputError, match="at least 1|multiple[\\s\\S]*channels come first"):
        GroupNorm(channels, groups)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("shape", [(), 0, (3, 0)])
def test_something_is_normalized_over(kind, shape):
    with pytest.raises(lt.InputError, match="shape must be a size"):
        kind(shape)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_a_list_of_sizes_is_the_tuple_of_them(kind):
    assert kind([2, 3]) == kind((2, 3)) and hash(kind([2, 3])) == hash(kind((2, 3)))
    assert kind(3) == kind((3,))


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (GroupNorm(4, 2), (2, 3, 4), "\\(batch, 4, ...\\)[\\s\\S]*second"),
        (GroupNorm(4, 2, affine=False), (2, 6), "\\(batch, 4, ...\\)"),
        (GroupNorm(4, 2), (4,), "\\(batch, 4, ...\\)"),
        (LayerNorm((2, 3)), (2, 4), "\\(..., 2, 3\\)"),
        (LayerNorm(3, affine=False), (2, 4), "\\(..., 3\\)"),
        (RMSNorm(3), (2, 4), "\\(..., 3\\)"),
        (RMSNorm(3, affine=False), (2, 4), "\\(..., 3\\)"),
        (InstanceNorm(4), (2, 3, 4), "\\(batch, 4, length, ...\\)"),
        (InstanceNorm(4), (2, 4), "\\(batch, 4, length, ...\\)"),
        (BatchNorm(4), (1, 4), "more than one value[\\s\\S]*test_mode"),
        (InstanceNorm(4), (2, 4, 1), "more than one value[\\s\\S]*test_mode"),
        (InstanceNorm(4, track_running_stats=True), (2, 4, 1, 1), "more than one value[\\s\\S]*test_mode"),
    ],
)
def test_a_wrong_input_is_explained(make_key, layer, shape, expected):
    ps, st = lt.setup(make_key(), layer)
    with pytest.raises(lt.InputError, match=expected):
        layer(torch.ones(shape), ps, st)


def test_batch_norm_without_statistics_needs_values_in_test_mode_too():
    layer = BatchNorm(4, track_running_stats=False)
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.InputError, match="more than one value"):
        layer(torch.ones(1, 4), ps, lt.test_mode(st))
    with pytest.raises(ValueError, match="more than 1 value"):
        torch.nn.BatchNorm1d(4, track_running_stats=False).eval()(torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 2, 3)])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_the_gradients_of_batch_norm_are_those_of_torch(make_key, shape, dtype, mode):
    reference = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)](4).to(dtype)
    reference.train(mode == "train")
    layer = BatchNorm(4)
    ps, st = parameters_of(make_key(), reference), lt.setup(0, layer)[1]
    st = lt.f64(st) if dtype == torch.float64 else st
    x = inputs(make_key(), shape, dtype, contiguous=False)
    st = st if mode == "train" else lt.test_mode(st)
    y, pullback, _ = torch.func.vjp(lambda x, ps: layer(x, ps, st), x, ps, has_aux=True)
    cotangent = torch.cos(torch.arange(y.numel(), dtype=dtype)).reshape(y.shape)
    given = x.clone().requires_grad_()
    reference(given).backward(cotangent)
    to_x, to_ps = pullback(cotangent)
    torch.testing.assert_close(to_x, given.grad, rtol=1e-4, atol=1e-5)
    expected = {"weight": reference.weight.grad, "bias": reference.bias.grad}
    torch.testing.assert_close(to_ps, expected, rtol=1e-4, atol=1e-5)


def test_instance_norm_takes_single_values_where_it_has_statistics():
    layer = InstanceNorm(4, track_running_stats=True, eps=0.0)
    ps, st = lt.setup(0, layer)
    y, _ = layer(torch.ones(2, 4, 1), ps, lt.test_mode(st))
    assert torch.equal(y, torch.ones(2, 4, 1))


@pytest.mark.parametrize("layer", [GroupNorm(4, 2), LayerNorm(4), InstanceNorm(4, affine=True)])
def test_another_dtype_is_explained(layer):
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.DTypeError, match="float32, as the parameters"):
        layer(torch.ones(4, 4, 4, dtype=torch.float64), ps, st)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (GroupNorm(4, 2, torch.relu, affine=False), "GroupNorm(4, 2, relu, affine=False)"),
        (LayerNorm((4, 2), torch.relu, bias=False), "LayerNorm(4, 2, relu, bias=False)"),
        (RMSNorm(4), "RMSNorm(4)"),
        (
            InstanceNorm(4, affine=True, track_running_stats=True),
            "InstanceNorm(4, affine=True, track_running_stats=True)",
        ),
    ],
)
def test_layers_print_their_arguments(layer, text):
    assert f"{type(layer).__name__}({layer.extra_repr()})" == text


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm, partial(GroupNorm, 4, 2), LayerNorm, RMSNorm])
def test_the_former_name_of_an_option_is_deprecated(layer):
    make = layer if isinstance(layer, partial) else partial(layer, 4)
    twos = lt.init.constant(value=2.0)
    with pytest.warns(DeprecationWarning, match="`init_scale` of .*Norm is deprecated, .* `init_weight`") as caught:
        former = make(affine=True, init_scale=twos)
    assert caught[0].filename == __file__
    assert former == make(affine=True, init_weight=twos) and hash(former) == hash(make(affine=True, init_weight=twos))
    assert lt.setup(0, former)[0]["weight"].tolist() == [2.0] * 4
    with pytest.warns(DeprecationWarning, match="init_weight"):
        assert former.init_scale == twos
    with pytest.raises(lt.InputError, match="must not both be given"):
        make(affine=True, init_scale=twos, init_weight=twos)
    assert dataclasses.replace(former, affine=False).init_weight == twos
    assert (
        pickle.loads(pickle.dumps(former)) == former and "init_scale" not in inspect.signature(type(former)).parameters
    )
