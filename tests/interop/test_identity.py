"""Layers of modules are equal where the modules have the same code and options, and only there."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import luxtorch as lt


def stack_of(factor, activation=torch.relu):
    """Define a class anew, as it happens in a notebook."""

    class Net(nn.Module):
        def __init__(self, width=3, kept=0.0):
            super().__init__()
            self.activation = activation
            self.linear = nn.Linear(2, width)
            self.offset = nn.Parameter(torch.full((width,), kept))

        def forward(self, x):
            return factor * self.activation(self.linear(x)) + self.offset

    return Net


Net = stack_of(1)
Net.__qualname__ = "Net"


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Closing(nn.Module):
    """Have functions that lead back to the module, as a default, a closure, a hook and a reference do."""

    def __init__(self, factor=2, last=torch.tanh):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.step = lambda x: last(self.linear(x)) * factor
        self.linear.register_forward_hook(lambda part, inputs, y, self=self: y * self.linear.bias)
        self.parent = weakref.ref(self)

    def forward(self, x):
        return self.step(x)


def layer(module):
    return lt.from_torch(module).layer


@pytest.mark.parametrize(
    "make", [Net, lambda: nn.LSTM(2, 3), lambda: nn.MultiheadAttention(4, 2), lambda: Tied(True), Closing]
)
def test_equal(make):
    one, other = layer(make()), layer(make())
    assert one == other
    assert hash(one) == hash(other)
    assert copy.deepcopy(one) == one
    if make is not Closing:  # functions without a name cannot be pickled
        assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Net(3), lambda: Net(4)),
        (lambda: Net(kept=0.0), lambda: Net(kept=1.0)),  # what setup starts from
        (lambda: Net().train(), lambda: Net().eval()),
        (lambda: Net(), lambda: stack_of(2)()),  # the same name, other code
        (lambda: Net(), lambda: stack_of(1, torch.tanh)()),
        (lambda: Tied(True), lambda: Tied(False)),
        (lambda: nn.LSTM(2, 3), lambda: nn.GRU(2, 3)),
        (lambda: Closing(2), lambda: Closing(3)),
        (lambda: Closing(last=torch.tanh), lambda: Closing(last=torch.sigmoid)),
    ],
)
def test_different(one, other):
    assert layer(one()) != layer(other())


def test_a_lambda_is_part_of_the_code():
    def make(activation):
        module = Net()
        module.activation = activation
        return layer(module)

    def double(x):
        return 2 * x

    assert make(double) == make(double)
    assert make(double) != make(lambda x: 2 * x)


def test_what_cannot_be_copied_is_an_error():
    module = Net()
    module.numbers = (i for i in range(3))
    with pytest.raises(lt.core.InputError, match="must be copyable(.|\n)*generators"):
        lt.from_torch(module)


class Drawing(nn.Module):
    """Have a parameter that is drawn, and that nothing makes anew."""

    def __init__(self):
        super().__init__()
        self.linear, self.position = nn.Linear(2, 3), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.linear(x) + self.position


def test_parameters_that_nothing_makes_anew_do_not_part_equal_modules():
    models = [lt.from_torch(Drawing()) for _ in range(2)]
    assert models[0].layer == models[1].layer
    both = lt.stack(models)
    assert torch.equal(both.ps["position"][1], models[1].ps["position"])
    traced = []

    def call(layer, x, ps, st):
        traced.append(1)
        return layer(x, ps, st)[0]

    jitted = lt.jit(call, backend="replay")
    for model in models:
        y = jitted(model.layer, torch.ones(4, 2), model.ps, model.st)
        torch.testing.assert_close(y, model.layer(torch.ones(4, 2), model.ps, model.st)[0])
    assert len(traced) <= 3  # two calls, and one trace for both


def test_a_tensor_used_outside_of_a_call_is_an_error():
    module = layer(Drawing()).skeleton.root.module
    for use in (
        lambda: module.linear.weight @ torch.ones(2),
        lambda: torch.ones(3) * module.position,
        lambda: module(torch.ones(2)),
    ):
        with pytest.raises((lt.core.InputError, TypeError), match="inside the call|Placeholder"):
            use()


def test_models_stack_whole():
    both = lt.stack([lt.from_torch(Net()), lt.from_torch(Net())])
    assert both.layer == layer(Net())
    assert both.ps["linear"]["weight"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.Bilinear(2, 2, 3), [(4, 2), (4, 2)]),
        (nn.RNNCell(2, 3), [(4, 2)]),
        (nn.SyncBatchNorm(2, track_running_stats=False), [(4, 2)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_first_call_may_be_inside_a_transform_in_a_trace(module, shapes, rng):
    def gradient(ps, x):
        return lt.gradient(lambda ps: layer(x, ps, st)[0].square().sum(), ps)

    x = lt.Inputs(*(torch.randn(shape, generator=rng) for shape in shapes))
    layer, ps, st = lt.from_torch(module)
    jitted = lt.jit(gradient, backend="replay")(ps, x)
    eager = gradient(ps, x)
    for name in ps:
        torch.testing.assert_close(jitted[name], eager[name])
