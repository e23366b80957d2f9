"""A module of torch.nn is not a layer: what holds one is refused, wherever in a model, and told of `from_torch`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luxtorch as lt

LINEAR = nn.Linear(4, 4)
WEIGHT = torch.ones(4, requires_grad=True)


class Held:
    """Call a module from an object that is none."""

    def __init__(self) -> None:
        self.inside = nn.Linear(4, 4)

    def __call__(self, x):
        return self.inside(x)


class Attribute(nn.Module):
    """Hold a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(4)

    def forward(self, x):
        return x * self.table


def with_cell(value: Any) -> Any:
    return lambda x: value(x)


def with_default(x, layer=LINEAR):
    return layer(x)


def with_global(x):
    return LINEAR(x)


def with_global_tensor(x):
    return x * WEIGHT


FUNCTIONS = {
    "Linear": lambda: nn.Linear(4, 4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "buffers alone": lambda: nn.BatchNorm1d(4, affine=False),
    "PReLU": lambda: nn.PReLU(),
    "Sequential": lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 4)),
    "frozen": lambda: nn.Linear(4, 4).requires_grad_(False),
    "a plain attribute": Attribute,
    "Dropout": lambda: nn.Dropout(0.5),
    "RReLU": lambda: nn.RReLU(),
    "in place": lambda: nn.ReLU(inplace=True),
    "bound method": lambda: nn.Linear(4, 4).forward,
    "partial": lambda: partial(nn.Linear(4, 4)),
    "partial of an argument": lambda: partial(lambda layer, x: layer(x), nn.Linear(4, 4)),
    "partial of a tensor": lambda: partial(F.linear, weight=torch.ones(4, 4, requires_grad=True)),
    "closure": lambda: with_cell(nn.Linear(4, 4)),
    "closure in a closure": lambda: with_cell(with_cell(nn.Linear(4, 4))),
    "default": lambda: with_default,
    "global": lambda: with_global,
    "global tensor": lambda: with_global_tensor,
    "object": Held,
    "method of an object": lambda: Held().__call__,
    "box": lambda: lt.StatefulLayer(lt.Dense(4, 4), *lt.setup(0, lt.Dense(4, 4))),
}
ALLOWED = {
    "ReLU": lambda: nn.ReLU(),
    "Flatten": lambda: nn.Flatten(0),
    "Sequential": lambda: nn.Sequential(nn.Tanh(), nn.ReLU()),
    "function": lambda: torch.tanh,
    "partial": lambda: partial(F.leaky_relu, negative_slope=0.1),
    "closure": lambda: with_cell(torch.tanh),
    "closure over a constant": lambda: with_cell(torch.ones(4).mul),
    "closure over a frozen module": lambda: with_cell(nn.Linear(4, 4).requires_grad_(False).eval()),
    "method of a tensor": lambda: torch.ones(4).add,
}


class Custom(lt.ContainerLayer):
    inner: Any

    def __call__(self, x, ps, st):
        return self.inner(x), st


class CustomWrapper(lt.WrapperLayer):
    layer: lt.Layer
    also: Any

    def __call__(self, x, ps, st):
        y, st = self.layer(x, ps, st)
        return self.also(y), st


class Several(lt.Layer):
    functions: tuple[Any, ...]

    def __call__(self, x, ps, st):
        for function in self.functions:
            x = function(x)
        return x, st


class Cell(lt.Cell):
    function: Any

    def initial_carry(self, x, ps, st):
        return torch.zeros_like(x), st

    def step(self, x, carry, ps, st):
        return (self.function(x), carry), st


def first(x, *_):
    return x


PLACES = {
    "setup": lambda f: f,
    "WrappedFunction": lambda f: lt.WrappedFunction(f),
    "Chain": lambda f: lt.Chain(lt.Dense(4, 4), f),
    "named": lambda f: lt.Chain(a=lt.Dense(4, 4), b=f),
    "spliced": lambda f: lt.Chain([lt.Dense(4, 4), (f,)]),
    "Parallel": lambda f: lt.Parallel(torch.add, f, lt.Dense(4, 4)),
    "BranchLayer": lambda f: lt.BranchLayer(lt.Dense(4, 4), f),
    "PairwiseFusion": lambda f: lt.PairwiseFusion(torch.add, f),
    "SkipConnection": lambda f: lt.SkipConnection(f, torch.add),
    "connection": lambda f: lt.SkipConnection(lt.Dense(4, 4), f),
    "connection of Parallel": lambda f: lt.Parallel(f, lt.Dense(4, 4)),
    "fusion": lambda f: lt.BranchLayer(lt.Dense(4, 4), fusion=f),
    "RepeatedLayer": lambda f: lt.RepeatedLayer(f, 2),
    "Maxout": lambda f: lt.Maxout(f, lt.Dense(4, 4)),
    "Ensemble": lambda f: lt.Ensemble(f, 3),
    "Checkpointed": lambda f: lt.Checkpointed(f),
    "activation": lambda f: lt.Dense(4, 4, f),
    "activation of Conv": lambda f: lt.Conv(3, 4, 3, activation=f),
    "activation of a norm": lambda f: lt.BatchNorm(4, f),
    "feedforward": lambda f: lt.TransformerEncoderLayer(4, 2, 8, activation=f),
    "init": lambda f: lt.Dense(4, 4, init_weight=f),
    "part": lambda f: lt.compact(lambda m, x: m.f(x), f=f),
    "part in a list": lambda f: lt.compact(lambda m, x: m.f[0](x), f=[f]),
    "field": lambda f: Custom(f),
    "field of a wrapper": lambda f: lt.Chain(CustomWrapper(lt.Dense(4, 4), f)),
    "field in a tuple": lambda f: Several((torch.tanh, f)),
    "cell": lambda f: lt.Recurrence(Cell(f)),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_holds_tensors_is_refused(make, place):
    """Where the model is made, or where it is set up; never in silence."""
    with pytest.raises((lt.InputError, lt.DTypeError)):
        lt.setup(0, place(make()))


@pytest.mark.parametrize("place", ["setup", "WrappedFunction", "Chain", "SkipConnection", "activation", "field"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.BatchNorm1d(4), lambda: nn.Linear(4, 4).forward])
def test_the_error_names_the_way_out(make, place):
    if place == "setup" and not isinstance(make(), nn.Module):
        return
    with pytest.raises(lt.InputError, match=r"lt\.from_torch\(module\)") as error:
        lt.setup(0, PLACES[place](make()))
    assert type(make()).__name__ in error.value.got


def test_a_body_that_calls_a_module():
    layer = nn.Linear(4, 4)
    model = lt.compact(lambda m, x: layer(m.dense(x)), dense=lt.Dense(4, 4))
    with pytest.raises(lt.InputError, match="function"):
        lt.setup(0, model)


def test_the_place_of_a_field():
    model = lt.Chain(a=lt.Dense(4, 4), b=lt.Chain(lt.Dense(4, 4, nn.PReLU())))
    with pytest.raises(lt.InputError, match=r"model\.b\.layer_1 \(Dense\): The field 'activation'"):
        lt.setup(0, model)


@pytest.mark.parametrize(
    "place", ["WrappedFunction", "Chain", "Parallel", "SkipConnection", "RepeatedLayer", "activation", "field"]
)
@pytest.mark.parametrize("make", ALLOWED.values(), ids=ALLOWED)
def test_pure_functions_are_taken(make, place):
    model = PLACES[place](make())
    ps, st = lt.setup(0, model)
    x = torch.linspace(-1, 1, 4)
    y, new = model(x, ps, st)
    assert torch.equal(y, model(x, ps, st)[0]) and torch.equal(x, torch.linspace(-1, 1, 4))


def test_converted_modules_are_taken():
    for module in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), Wrapped()):
        layer, _, _ = lt.from_torch(module)
        model = lt.Chain(layer, lt.Dense(4, 4))
        ps, st = lt.setup(0, model)
        assert lt.parameter_length(model) == 20 + 20
        model(torch.ones(2, 4), ps, st)


class Wrapped(nn.Module):
    """A module that keeps its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x):
        return self.inside(x).sin()
