"""Code that reaches a module's tensors by whatever way, and leaves things behind: layers are functions all the same."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import types
import weakref
from dataclasses import dataclass
from typing import Optional

import pytest
import torch
import torch.fx
import torch.utils.module_tracker
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import luxtorch as lt
from luxtorch.core import InputError, flatten_names, tree_map
from luxtorch.interop import from_torch

from .test_left_behind import kept_in, nothing


class Base(nn.Module):
    """Multiply by a weight that `self.step` finds in a way of its own, then by a matrix and a buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.register_buffer("scale", torch.rand(3, dtype=torch.float64) + 0.5)
        self.step = lambda x: x

    def forward(self, x):
        return torch.tanh(self.linear(self.step(x))) * self.scale


Pair = collections.namedtuple("Pair", ["left", "right"])


class Holder:
    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return x @ self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Stubborn(Holder):
    """Be shared by copies."""

    def __deepcopy__(self, memo):
        return self


class OfOne(Holder):
    """Be the one object of its class, also when a copy is asked for."""

    one = None

    def __new__(cls, *value):
        if cls.one is None:
            cls.one = super().__new__(cls)
        return cls.one


class SlottedOfOne:
    __slots__ = ("__value", "__weakref__")
    one = None

    def __new__(cls, *value):
        if cls.one is None:
            cls.one = super().__new__(cls)
        return cls.one

    def __init__(self, value):
        self.__value = value

    def __call__(self, x):
        return x @ self.__value


class ByName(Holder):
    """Be pickled by the name under which it is found."""

    def __reduce__(self):
        return "BY_NAME"


BY_NAME = ByName(None)


class Kept(Holder):
    """Be found in a registry, also when a copy is asked for."""

    registry: dict = {}

    def __init__(self, value):
        super().__init__(value)
        self.registry["kept"] = self

    def __reduce__(self):
        return self.registry.get, ("kept",)


class Registered(Holder):
    """Enter each of its objects into a list, so that a new one is referenced from the start."""

    registry: list = []

    def __new__(cls, *value):
        cls.registry.append(super().__new__(cls))
        return cls.registry[-1]


@dataclass
class Record:
    value: Tensor


def default(module, weight):
    def step(x, weight=weight):
        return x @ weight

    return step


def keyword_default(module, weight):
    def step(x, *, weight=weight):
        return x @ weight

    return step


def counting(module, weight):
    """A function that closes over itself, by way of another one."""

    def step(x, times=1):
        return x @ weight if not times else step(x, times - 1)

    return step


def cached(module, weight):
    double = functools.lru_cache(None)(lambda times: weight * times)
    return lambda x: x @ double(2)


# How code may come by a tensor of its module: each takes the module and the tensor to a function.
WAYS = {
    "closure": lambda module, weight: lambda x: x @ weight,
    "closure on the module": lambda module, weight: lambda x: x @ module.weight * module.scale,
    "closure on a part": lambda module, weight: (lambda part: lambda x: part(x) @ weight)(module.other),
    "default": default,
    "keyword default": keyword_default,
    "recursion": counting,
    "list": lambda module, weight: (lambda each: lambda x: x @ each[0])([weight]),
    "nested": lambda module, weight: (lambda each: lambda x: x @ each["a"][1][0])({"a": (1, [weight])}),
    "tuple": lambda module, weight: (lambda each: lambda x: x @ each[1][0])((1, (weight, 2))),
    "named tuple": lambda module, weight: (lambda each: lambda x: x @ each.left)(Pair(weight, None)),
    "deque": lambda module, weight: (lambda each: lambda x: x @ each[0])(collections.deque([weight], maxlen=2)),
    "default dict": lambda module, weight: (lambda each: lambda x: x @ each["w"])(
        collections.defaultdict(list, w=weight)
    ),
    "object": lambda module, weight: Holder(weight),
    "slots": lambda module, weight: (lambda each: lambda x: x @ each.value)(Slotted(weight)),
    "dataclass": lambda module, weight: (lambda each: lambda x: x @ each.value)(Record(weight)),
    "namespace": lambda module, weight: (lambda each: lambda x: x @ each.w)(types.SimpleNamespace(w=weight)),
    "stubborn object": lambda module, weight: Stubborn(weight),
    "one object of its class": lambda module, weight: OfOne(weight),
    "one object of its class, slots": lambda module, weight: SlottedOfOne(weight),
    "object found by its name": lambda module, weight: ByName(weight),
    "object found in a registry": lambda module, weight: Kept(weight),
    "registered object": lambda module, weight: Registered(weight),
    "partial": lambda module, weight: functools.partial(torch.matmul, other=weight),
    "partial, positional": lambda module, weight: functools.partial(lambda w, x: x @ w, weight),
    "method of an object": lambda module, weight: Holder(weight).__call__,
    "method of the tensor": lambda module, weight: (lambda times: lambda x: times(x.mT).mT)(weight.matmul),
    "bound function": lambda module, weight: types.MethodType(lambda own, x: x @ own.weight, module),
    "reference": lambda module, weight: (lambda ref: lambda x: x @ ref())(weakref.ref(weight)),
    "reference to the module": lambda module, weight: (lambda ref: lambda x: x @ ref().weight)(weakref.ref(module)),
    "proxy": lambda module, weight: (lambda ref: lambda x: x @ ref.weight)(weakref.proxy(module)),
    "cache": cached,
    "part in a list": lambda module, weight: (lambda parts: lambda x: parts[0](x) @ weight)([module.other]),
    "inner vmap": lambda module, weight: (lambda each: lambda x: vmap(lambda row: x @ row)(each[0]).mT)([weight]),
    "inner grad": lambda module, weight: (
        lambda each: lambda x: x * grad(lambda w: (x @ w).sin().sum())(each[0]).sum()
    )([weight]),
}


def as_step(module, function):
    module.step = function


def as_hook(module, function):
    module.linear.register_forward_pre_hook(lambda part, inputs: function(inputs[0]))


def as_hook_after(module, function):
    module.linear.register_forward_hook(lambda part, inputs, y: function(y))


def as_forward(module, function):
    old = module.forward
    module.forward = lambda x: old(function(x))


def in_a_list(module, function):
    steps = [function, torch.sin]
    module.step = lambda x: steps[1](steps[0](x))


PLACES = {"step": as_step, "pre-hook": as_hook, "hook": as_hook_after, "forward": as_forward, "list": in_a_list}


@pytest.fixture
def build(rng):
    """Return a function that makes a module, always with the same values."""
    seed = int(torch.randint(2**31, (), generator=rng))

    def build(way, place, nested=False):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)  # noqa: TID251
            module = Base()
        PLACES[place](module, WAYS[way](module, module.weight))
        return nn.Sequential(nn.Tanh(), module) if nested else module

    return build


def filled(module, ps):
    """Return a module with other parameters."""
    with torch.no_grad():
        for name, value in flatten_names(ps).items():
            module.get_parameter(name).copy_(value)
    return module


def slopes_of(module, x):
    y = module(x)
    y.sin().sum().backward()
    return y.detach(), {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in module.named_parameters()
    }


def check(layer, ps, st, x, expected):
    """Compare what a layer does with what the module did, by the tape and by each transform."""
    y, slopes = expected

    def loss(ps):
        y, new = layer(x, ps, st)
        return y.sin().sum(), (y, new)

    leaves = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), ps)
    own = loss(leaves)[0]
    own.backward()
    found, (again, _) = grad(loss, has_aux=True)(ps)
    torch.testing.assert_close(again.detach(), y)
    torch.testing.assert_close(flatten_names(found), slopes)
    for name, leaf in flatten_names(leaves).items():
        torch.testing.assert_close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, slopes[name])
    _, change = jvp(lambda ps: loss(ps)[0], (ps,), (tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(change, sum(slope.sum() for slope in slopes.values()))
    both = tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), ps)
    of_both = vmap(lambda ps: grad(loss, has_aux=True)(ps)[0])(both)
    doubled = grad(loss, has_aux=True)(tree_map(lambda leaf: 2 * leaf, ps))[0]
    torch.testing.assert_close(of_both, tree_map(lambda a, b: torch.stack([a, b]), found, doubled))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_whichever_way_code_comes_by_a_tensor(build, rng, way, place):
    x = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    module = build(way, place, nested=place == "hook")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layer, ps, st = from_torch(module)
    other = tree_map(lambda leaf: 0.5 * leaf + 0.1, ps)
    for each in (ps, other, ps):  # whatever was called before
        expected = slopes_of(filled(build(way, place, nested=place == "hook"), each), x)
        check(layer, each, st, x, expected)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module(x)
    again = from_torch(module)  # one that was called before
    torch.testing.assert_close(again.layer(x, ps, again.st)[0], layer(x, ps, st)[0])


@pytest.mark.parametrize("way", ["closure", "list", "object", "tuple", "reference", "partial", "cache"])
def test_under_jit(build, rng, way):
    x = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    layer, ps, st = from_torch(build(way, "step"))
    gradient = lt.jit(lambda ps: lt.gradient(lambda ps: layer(x, ps, st)[0].sum(), ps), backend="replay")
    for each in (ps, tree_map(lambda leaf: leaf + 1, ps)):
        wanted = lt.gradient(lambda ps: layer(x, ps, st)[0].sum(), each)
        torch.testing.assert_close(flatten_names(gradient(each)), flatten_names(wanted))


class Canonical:
    """Give copies one object of all."""

    def __deepcopy__(self, memo):
        return CANONICAL


CANONICAL = Canonical()


class Alone(OfOne):
    one = None


SHARED = {
    "type": Optional[Tensor],  # noqa: UP045
    "object found by its name": BY_NAME,
    "one object of its class": Alone(1.0),
    "object whose copies are one": Canonical(),
}


@pytest.mark.parametrize("kind", SHARED)
def test_under_jit_while_others_let_go_of_what_they_share(rng, kind):
    """Python collects garbage whenever it likes: here other references to the object go while the module runs."""

    class Sharing(nn.Linear):
        def forward(self, x):
            gc.collect()
            return super().forward(x)

    module = Sharing(3, 3)
    module.shared = SHARED[kind]
    layer, ps, st = from_torch(module)
    x = torch.randn(4, 3, generator=rng)

    def loss(ps):
        for _ in range(3):
            cycle = [copy.deepcopy(SHARED[kind])]  # the same object each time
            cycle.append(cycle)
        del cycle
        return layer(x, ps, st)[0].sum()

    gc.disable()
    try:
        slopes = lt.jit(lambda ps: lt.gradient(loss, ps), backend="replay")(ps)
    finally:
        gc.enable()
    torch.testing.assert_close(slopes["bias"], torch.full((3,), 4.0))
    assert layer.skeleton._in_use == []


GLOBAL = []


class ByGlobal(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        GLOBAL[:] = [self.weight]

    def forward(self, x):
        return x * helper()


def helper():
    return GLOBAL[0]


def test_what_cannot_be_followed_is_refused_by_name():
    with pytest.raises(InputError, match="GLOBAL"):
        from_torch(ByGlobal())
    outer = Base()

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = outer

        def forward(self, x):
            return outer(x)

    with pytest.raises(InputError, match="outer"):
        from_torch(Inner())
    module = Base()
    module.kept = {module.weight}
    with pytest.raises(InputError, match="module.kept"):
        from_torch(module)
    module = Base()
    module.kept = [1, {"it": (i for i in range(3))}]
    with pytest.raises(InputError, match=r"module.kept\[1\].it"):
        from_torch(module)


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        y = x * 2 if isinstance(self.weight, nn.Parameter) else x
        y = y * 3 if self.weight.requires_grad else y
        return (y if self.frozen.requires_grad else y * 5) * self.weight * self.frozen


def test_what_a_forward_asks_of_its_parameters(rng):
    layer, ps, st = from_torch(Asking())
    x = torch.randn(4, 3, generator=rng)
    wanted = Asking()(x).detach()
    torch.testing.assert_close(layer(x, ps, st)[0], wanted)
    torch.testing.assert_close(vmap(lambda ps: layer(x, ps, st)[0])(tree_map(lambda leaf: leaf[None], ps))[0], wanted)
    torch.testing.assert_close(grad(lambda ps: layer(x, ps, st)[0].sum())(ps)["weight"], wanted.sum(0))
    assert not isinstance(ps["weight"], nn.Parameter)


class Handing(nn.Module):
    """Hand a parameter to a module, as torch's parametrizations do."""

    def __init__(self):
        super().__init__()
        self.weight, self.part = nn.Parameter(torch.ones(3)), nn.Identity()

    def forward(self, x):
        return x * self.part(self.weight)


def test_code_of_torch_that_relies_on_a_flag_gets_the_true_one():
    """Torch's tracker of modules, as in its counter of FLOPs, puts hooks on what requires a gradient."""
    layer, ps, st = from_torch(Handing())
    for tree in (ps, {**ps, "weight": torch.ones(3, requires_grad=True)}):
        with torch.utils.module_tracker.ModuleTracker(), torch.no_grad():
            assert torch.equal(layer(torch.ones(2, 3), tree, st)[0], torch.ones(2, 3))


class Making(nn.Module):
    """Hand a parameter to a module that is made in the forward."""

    def __init__(self):
        super().__init__()
        self.core = nn.Parameter(torch.ones(3))

    def forward(self, x):
        inner = nn.Module()
        inner.core = self.core if isinstance(self.core, nn.Parameter) else None
        return x * inner.core


def test_a_parameter_is_registered_on_a_module_that_a_forward_makes():
    layer, ps, st = from_torch(Making())
    slope = grad(lambda ps: layer(torch.full((2, 3), 2.0), ps, st)[0].sum())(ps)
    assert torch.equal(slope["core"], torch.full((3,), 4.0))


def test_one_input_given_twice_stays_one(rng):
    class Same(nn.Module):
        def forward(self, q, k):
            return q if q is k else q + k

    layer, ps, st = from_torch(Same())
    x = torch.randn(3, generator=rng)
    assert torch.equal(layer(lt.Inputs(x, x), ps, st)[0], x)
    assert torch.equal(layer(lt.Inputs(x, k=x), ps, st)[0], x)


class Logging(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        self.attention = self.linear(x).softmax(-1)
        self._log(x)
        return self.attention

    def _log(self, x):
        self.perplexity = x.exp().mean()


def test_what_an_earlier_call_has_left_is_no_state(rng):
    module = Logging()
    module(torch.ones(5, 3))
    layer, ps, st = from_torch(module)
    assert not [name for name, leaf in flatten_names(st).items() if isinstance(leaf, Tensor) and name != "rng"]
    x = torch.randn(2, 3, generator=rng)
    torch.testing.assert_close(layer(x, ps, st)[0], module(x).detach())


class Copying(Base):
    """Have a copy of its own making, as modules of torch.fx do."""

    def __deepcopy__(self, memo):
        raise NotImplementedError


@pytest.mark.parametrize("make", [Copying, lambda: torch.fx.symbolic_trace(Traced())], ids=["own copy", "torch.fx"])
def test_modules_that_copy_themselves(rng, make):
    x = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    module = make()
    layer, ps, st = from_torch(module)
    other = tree_map(lambda leaf: 0.5 * leaf + 0.1, ps)
    for each in (ps, other, ps):
        torch.testing.assert_close(layer(x, each, st)[0], filled(module, each)(x).detach())
    module.zero_grad()
    check(layer, ps, st, x, slopes_of(module, x))


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.weight = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x):
        return self.norm(self.linear(x)) * self.weight


def into_slices(x, y):
    out = torch.empty(2, 3, dtype=y.dtype)
    out[0], out[1] = y, 2 * y
    return out


def into_columns(x, y):
    out = torch.empty_like(x)
    out[..., torch.tensor([2, 0, 1])] = y
    return out


def into_a_sum(x, y):
    total = x.new_zeros(3)
    total += y
    return total.mul_(y)


def into_a_view(x, y):
    out = torch.zeros(2, 3, dtype=y.dtype)
    out[1].copy_(y)
    return out


def beside_a_mask(x, y):
    mask = torch.ones(3)
    return (y if mask.all() else x) + torch.zeros(3)


def into_the_identity(x, y):
    out = torch.eye(3, dtype=y.dtype).repeat(2, 1)
    out += y
    return out


def beside_what_is_no_batch(x, y):
    own, kept = torch.zeros(3, dtype=y.dtype), torch.tensor([1.0, 2.0, 3.0], dtype=y.dtype)
    own[0] = 2.0
    kept *= own
    return y * kept


def into_a_spectrum(x, y):
    out = torch.zeros(4, dtype=torch.complex128)
    out[:2] = torch.fft.rfft(y)
    return torch.fft.irfft(out, n=6)


RESULTS = [
    into_the_identity,
    beside_what_is_no_batch,
    into_a_spectrum,
    into_slices,
    into_columns,
    into_a_sum,
    into_a_view,
    beside_a_mask,
]


@pytest.mark.parametrize("write", RESULTS, ids=lambda function: function.__name__)
def test_results_may_be_written_into_new_tensors_under_every_vmap(rng, write):
    def call(self, x):
        return write(x, x * self.weight)

    layer, ps, st = from_torch(kept_in(nothing, call)().double())
    x = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    weights = torch.randn(2, 3, generator=rng, dtype=torch.float64)

    def loss(weight, x):
        return layer(x, {**ps, "weight": weight}, st)[0].sin().sum()

    for function in (loss, grad(loss), lambda w, x: jvp(loss, (w, x), (w, x))[1], grad(loss, 1)):
        by_weight, by_x = vmap(function, (0, None)), vmap(function, (None, 0))
        torch.testing.assert_close(by_weight(weights, x[0]), torch.stack([function(w, x[0]) for w in weights]))
        torch.testing.assert_close(by_x(weights[0], x), torch.stack([function(weights[0], row) for row in x]))
        both = torch.stack([by_x(w, x) for w in weights])
        torch.testing.assert_close(vmap(by_x, (0, None))(weights, x), both)
        torch.testing.assert_close(vmap(by_weight, (None, 0))(weights, x), both.transpose(0, 1))
    total = grad(lambda weights: vmap(loss, (0, None))(weights, x[0]).sum())(weights)
    torch.testing.assert_close(total, torch.stack([grad(loss)(w, x[0]) for w in weights]))
