"""The derivatives of normalizations are right however gradients lie in memory; those of torch's kernels are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luxtorch as lt
from luxtorch.core import flatten_names, tree_map

VIEWS = {
    "plain": lambda y: y,
    "tokens": lambda y: y.flatten(2).transpose(1, 2),
    "channels last": lambda y: y.movedim(1, -1),
    "reversed": lambda y: y.permute(*reversed(range(y.ndim))),
}


class Functional(nn.Module):
    """Normalize by a function of torch."""

    def __init__(self, function, training, statistics=True):
        super().__init__()
        self.function, self.statistics = function, statistics
        self.norm = nn.BatchNorm1d(3)
        self.train(training)

    def forward(self, x):
        n = self.norm
        mean, var = (n.running_mean, n.running_var) if self.statistics else (None, None)
        return self.function(x, mean, var, n.weight, n.bias, self.training or not self.statistics)


def layers():
    for training in (True, False):
        mode = "train" if training else "eval"
        for make in (nn.BatchNorm2d, nn.InstanceNorm2d):
            module = make(3, affine=True, track_running_stats=True).train(training)
            yield f"{make.__name__}, {mode}", module
            yield f"{make.__name__} inside, {mode}", nn.ModuleList([module])
        for function in (F.batch_norm, F.instance_norm):
            yield f"F.{function.__name__}, {mode}", Functional(function, training)
            yield f"F.{function.__name__} without statistics, {mode}", Functional(function, training, False)
    yield "InstanceNorm2d, plain", nn.InstanceNorm2d(3, affine=True)
    yield "GroupNorm", nn.GroupNorm(3, 3)


class First(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return self.parts[0](x)


LAYERS = dict(layers())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 2, 2), (1, 3, 1, 4)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_differences(rng, name, shape, view):
    module = LAYERS[name]
    layer, ps, st = lt.from_torch(First(module) if isinstance(module, nn.ModuleList) else module)

    def drawn(leaf):
        real = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.rand(leaf.shape, generator=rng, dtype=torch.float64) + 0.5 if real else leaf

    ps, st = tree_map(drawn, (ps, st))
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    weights = torch.randn(VIEWS[view](x).shape, generator=rng, dtype=torch.float64)
    variables = {"x": x, **flatten_names(ps)}

    def loss(moved, by=0.0):
        def value(name, leaf):
            return leaf + by * moved[name] if moved else leaf

        names = {name: value(name, leaf) for name, leaf in variables.items()}
        own = lt.unflatten_names({name: leaf for name, leaf in names.items() if name != "x"})
        return (VIEWS[view](layer(names["x"], own, st)[0]) * weights).sum()

    directions = {name: torch.randn(leaf.shape, generator=rng, dtype=torch.float64) for name, leaf in variables.items()}
    for leaf in variables.values():
        leaf.requires_grad_()
    slopes = torch.autograd.grad(loss({}), list(variables.values()))
    along = sum((slope * direction).sum() for slope, direction in zip(slopes, directions.values(), strict=True))
    with torch.no_grad():
        expected = (loss(directions, 1e-6) - loss(directions, -1e-6)) / 2e-6
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-6)
