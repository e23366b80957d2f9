"""Which modules of torch.nn become which layers of luxtorch, and which do not."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luxtorch as lt
from luxtorch.core import flatten_names
from luxtorch.interop import Inputs, ModuleLayer, from_torch
from luxtorch.interop._native import Unbatched, function

PAIRS = {
    "Linear": (nn.Linear(3, 2, bias=False), lt.Dense(3, 2, bias=False)),
    "Conv2d": (
        nn.Conv2d(4, 6, (3, 2), 2, padding="valid", groups=2, padding_mode="reflect"),
        lt.Conv((3, 2), 4, 6, stride=2, groups=2, padding_mode="reflect"),
    ),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1, ceil_mode=True), lt.MaxPool((3,), stride=2, padding=1, ceil_mode=True)),
    "AvgPool3d": (nn.AvgPool3d(2, divisor_override=3), lt.MeanPool((2, 2, 2), divisor_override=3)),
    "LPPool2d": (nn.LPPool2d(3, (2, 3)), lt.LPPool((2, 3), p=3.0)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((None, 3)), lt.AdaptiveMeanPool((None, 3))),
    "BatchNorm2d": (nn.BatchNorm2d(3, 0.1, 1, bias=False), lt.BatchNorm(3, eps=0.1, momentum=1.0, bias=False)),
    "BatchNorm1d": (nn.BatchNorm1d(3, momentum=None, affine=False), lt.BatchNorm(3, momentum=None, affine=False)),
    "BatchNorm3d": (nn.BatchNorm3d(3, track_running_stats=False), lt.BatchNorm(3, track_running_stats=False)),
    "InstanceNorm1d": (
        nn.InstanceNorm1d(3, momentum=None, affine=True, track_running_stats=True),
        Unbatched(lt.InstanceNorm(3, momentum=0.0, affine=True, track_running_stats=True), 3),
    ),
    "GroupNorm": (nn.GroupNorm(2, 4, eps=0.1), lt.GroupNorm(4, 2, eps=0.1)),
    "LayerNorm": (nn.LayerNorm((3, 4), bias=False), lt.LayerNorm((3, 4), bias=False)),
    "RMSNorm": (nn.RMSNorm(3, elementwise_affine=False), lt.RMSNorm(3, affine=False)),
    "Dropout": (nn.Dropout(0.2, inplace=True), lt.Dropout(0.2)),
    "Dropout2d": (nn.Dropout2d(0.2), lt.FeatureDropout(0.2)),
    "ReLU": (nn.ReLU(inplace=True), lt.WrappedFunction(torch.relu)),
    "ELU": (nn.ELU(0.5), lt.WrappedFunction(function(F.elu, alpha=0.5))),
    "PReLU": (nn.PReLU(3, init=0.1), lt.PReLU(3, 0.1)),
    "Flatten": (nn.Flatten(0, 1), lt.FlattenLayer(0, 1)),
    "ReflectionPad2d": (nn.ReflectionPad2d((1, 2, 3, 4)), lt.Pad(((3, 4), (1, 2)), "reflect")),
    "ConstantPad1d": (nn.ConstantPad1d((1, 2), 3.5), lt.Pad(((1, 2),), "constant", value=3.5)),
    "Upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), lt.Upsample("bilinear", scale_factor=2.0)),
    "Sequential": (
        nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh())),
        lt.Chain(**{"0": lt.Dense(3, 4), "1": lt.Chain(**{"0": lt.WrappedFunction(torch.tanh)})}),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_known_module_becomes_the_layer_of_the_same_options(name):
    module, expected = PAIRS[name]
    layer = from_torch(module).layer
    assert layer == expected == pickle.loads(pickle.dumps(layer)) and hash(layer) == hash(expected)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def changed(change):
    module = nn.Linear(3, 2)
    change(module)
    return module


OTHERS = {
    "a subclass": Doubled(3, 2),
    "hooks": changed(lambda module: module.register_forward_hook(lambda module, x, y: y + 1)),
    "a forward of its own": changed(lambda module: setattr(module, "forward", torch.sin)),
    "one more parameter": changed(lambda module: module.register_parameter("extra", nn.Parameter(torch.ones(1)))),
    "one more buffer": changed(lambda module: module.register_buffer("extra", torch.ones(1))),
    "a module inside": changed(lambda module: module.add_module("extra", nn.Linear(2, 2))),
    "a norm of rows": nn.Embedding(3, 2, max_norm=1.0),
    "indices": nn.MaxPool2d(2, return_indices=True),
    "options that luxtorch refuses": nn.MaxPool1d(2, padding=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_that_may_compute_something_else_keeps_its_forward(name):
    assert isinstance(from_torch(OTHERS[name]).layer, ModuleLayer)


def test_the_forward_of_a_changed_module_runs():
    x = torch.ones(4, 3)
    for name in ("a subclass", "hooks", "a forward of its own", "a module inside"):
        layer, ps, st = from_torch(OTHERS[name])
        assert torch.equal(layer(x, ps, st)[0], OTHERS[name](x))


def test_options_that_luxtorch_refuses_fail_at_the_call_as_in_torch():
    layer, ps, st = from_torch(OTHERS["options that luxtorch refuses"])
    with pytest.raises(lt.LuxtorchError, match="should be at most half"):
        layer(torch.ones(1, 1, 5), ps, st)


def test_a_module_that_stands_twice_stays_one():
    twice = nn.Linear(3, 3)
    module = nn.Sequential(twice, nn.Tanh(), twice)
    layer, ps, st = from_torch(module)
    assert list(flatten_names(ps)) == ["0.weight", "0.bias"]
    x = torch.ones(2, 3)
    assert torch.equal(layer(x, ps, st)[0], module(x))
    activation = nn.Tanh()  # without tensors there is nothing to share
    assert isinstance(from_torch(nn.Sequential(activation, twice, activation)).layer, lt.Chain)


def test_prints():
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ELU(0.5), nn.Flatten(), nn.LayerNorm(4, bias=False)
    )
    assert str(from_torch(module).layer) == (
        """\
Chain(
    0 = Conv((3, 3), 1 -> 4),               # 40 parameters: weight (4, 1, 3, 3), bias (4,)
    1 = BatchNorm(4),                       # 8 parameters: weight (4,), bias (4,); 9 states
    2 = WrappedFunction(elu(alpha=0.5)),
    3 = FlattenLayer(),
    4 = LayerNorm(4, bias=False),           # 4 parameters: weight (4,)
)                                           # total: 52 parameters, 9 states"""
    )


def test_an_error_inside_a_native_layer_is_located():
    layer, ps, st = from_torch(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(5)))
    with pytest.raises(lt.InputError, match=r"model\.1 \(LayerNorm 5\)"):
        layer(torch.ones(2, 3), ps, st)


@pytest.mark.parametrize("size", [(8,), (9,), torch.Size((2, 4, 9))])
def test_a_transposed_convolution_takes_the_size_of_its_output(size):
    module = nn.ConvTranspose1d(3, 4, 2, stride=2)
    layer, ps, st = from_torch(module)
    x = torch.ones(2, 3, 4)
    torch.testing.assert_close(layer(Inputs(x, output_size=size), ps, st)[0], module(x, output_size=size))
    with pytest.raises(lt.InputError, match="output_size must be at least"):
        layer(Inputs(x, (7,)), ps, st)


def test_an_empty_batch_is_counted_and_leaves_the_statistics_alone():
    module = nn.BatchNorm1d(3)
    layer, ps, st = from_torch(module)
    y, new = layer(torch.ones(0, 3), ps, st)
    assert y.shape == (0, 3) and int(new["num_batches_tracked"]) == 1
    assert torch.equal(new["running_var"], st["running_var"])


def test_a_parametric_relu_takes_a_batch_of_numbers():
    layer, ps, st = from_torch(nn.PReLU())
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(torch.vmap(lambda x: layer(x, ps, st)[0])(x), layer(x, ps, st)[0])


RANDOM = {
    "Dropout": (nn.Dropout(0.3), (200, 50)),
    "AlphaDropout": (nn.AlphaDropout(0.3), (200, 50)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.3), (200, 50, 3)),
    "Dropout1d": (nn.Dropout1d(0.3), (200, 50, 3)),
    "Dropout1d of a sample": (nn.Dropout1d(0.3), (5000, 3)),
    "Dropout2d": (nn.Dropout2d(0.3), (200, 50, 3, 2)),
    "Dropout3d": (nn.Dropout3d(0.3), (200, 50, 3, 1, 2)),
    "Dropout3d of a sample": (nn.Dropout3d(0.3), (5000, 3, 1, 2)),
    "RReLU": (nn.RReLU(0.2, 0.8), (200, 50)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_have_the_distribution_of_torch(make_key, rng, name):
    module, shape = RANDOM[name]
    x = -torch.ones(shape)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng.get_state())
        expected = module(x)
    layer, ps, st = from_torch(module, make_key())
    y, new = layer(x, ps, st)
    assert not torch.equal(layer(x, ps, new)[0], y)
    for dim in range(y.ndim):  # along which dimensions do the numbers vary?
        assert bool((y == y.narrow(dim, 0, 1)).all()) == bool((expected == expected.narrow(dim, 0, 1)).all())
    alike = min(len(y.unique()), len(expected.unique())) < 3
    assert not alike or torch.allclose(y.unique(), expected.unique())
    independent = 5000
    assert abs(y.mean() - expected.mean()) < 5 * expected.std() * (2 / independent) ** 0.5
    assert abs(y.std() / expected.std() - 1) < 0.1
