"""What goes into a jitted function and what comes out: right for each call, or refused with its place."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import re
import threading
import types
from typing import Any

import numpy as np
import optree
import pytest
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch.core import DTypeError, InputError
from luxtorch.jit import TracingError, jit

HERE = re.escape(__file__)


@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: Any
    more: Any = ()


@dataclasses.dataclass
class Mutable:
    rate: Any
    more: Any = ()


class Plain:
    def __init__(self, rate: Any, more: Any = ()) -> None:
        self.rate, self.more = rate, more

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.rate

    @jit(backend="replay")
    def jitted(self, x: Tensor) -> Tensor:
        return x * self.rate


class Slotted:
    __slots__ = ("rate", "unset")

    def __init__(self, rate: Any) -> None:
        self.rate = rate


class Same(Plain):
    """Equal to all of its kind, and hashable, whatever it holds."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same)

    def __hash__(self) -> int:
        return 0


class Dict(dict):
    pass


class Choice(enum.Enum):
    ONE = 1.0
    TWO = 2.0


@dataclasses.dataclass(frozen=True)
class Node:
    x: Any
    y: Any
    name: str = "a"


@dataclasses.dataclass
class Output:
    x: Any
    extra: Any = None


class Mapped(dict):
    pass


torch.utils._pytree.register_dataclass(Node, field_names=["x", "y"], drop_field_names=["name"])
torch.export.register_dataclass(Output, serialized_type_name="luxtorch.tests.Output")
torch.utils._pytree.register_pytree_node(
    Mapped, lambda node: (list(node.values()), list(node)), lambda values, keys: Mapped(zip(keys, values, strict=True))
)


def _closing(rate: Any) -> Any:
    box = [rate]
    return (lambda x: x * box[0]), lambda new: box.__setitem__(0, new)


def _rebinding(rate: Any) -> Any:
    def function(x: Tensor) -> Tensor:
        return x * rate

    def set_to(new: Any) -> None:
        nonlocal rate
        rate = new

    return function, set_to


def _defaulting(rate: Any) -> Any:
    def function(x: Tensor, rate: Any = rate) -> Tensor:
        return x * rate

    return function, lambda new: setattr(function, "__defaults__", (new,))


def _nested(make: Any) -> Any:
    def case(rate: Any) -> Any:
        made = make(Plain(rate))
        return made, lambda new: setattr(made.rate, "rate", new), lambda a, x: x * a.rate.rate

    return case


def _attribute(make: Any, read: Any = lambda a, x: x * a.rate) -> Any:
    def case(rate: Any) -> Any:
        made = make(rate)
        return made, lambda new: setattr(made, "rate", new), read

    return case


def _item(make: Any, read: Any) -> Any:
    """Return a case of a value that holds a list."""

    def case(rate: Any) -> Any:
        box = [rate]
        return make(box), lambda new: box.__setitem__(0, new), read

    return case


def _called(make: Any) -> Any:
    return lambda rate: (*make(rate), lambda f, x: f(x))


CHANGING = {
    # Values that stay the same object while what they hold changes: the value, how it is changed, how it is used.
    "object": _attribute(Plain),
    "dataclass": _attribute(Mutable),
    "slots": _attribute(Slotted),
    "own ==": _attribute(Same),
    "namespace": _attribute(lambda rate: types.SimpleNamespace(rate=rate)),
    "object inside": _nested(Plain),
    "object in frozen": _nested(Frozen),
    "list in frozen": _item(Frozen, lambda a, x: x * a.rate[0]),
    "list in object": _item(Plain, lambda a, x: x * a.rate[0]),
    "dict in object": lambda rate: (
        (a := Plain({"k": rate})),
        lambda new: a.rate.update(k=new),
        lambda a, x: x * a.rate["k"],
    ),
    "deque in object": lambda rate: (a := Plain(collections.deque([rate])), a.rate.append, lambda a, x: x * a.rate[-1]),
    "set in object": lambda rate: (a := Plain({rate}), a.rate.add, lambda a, x: x * max(a.rate)),
    "dict subclass": lambda rate: (a := Dict(k=rate), lambda new: a.update(k=new), lambda a, x: x * a["k"]),
    "set": lambda rate: (a := {rate}, a.add, lambda a, x: x * max(a)),
    "closure over a list": _called(_closing),
    "closure": _called(_rebinding),
    "default": _called(_defaulting),
    "attribute of a function": _attribute(lambda rate: _with(lambda x: x, rate)),
    "partial": _item(lambda box: functools.partial(lambda box, x: x * box[0], box), lambda f, x: f(x)),
    "partial, keywords": _item(lambda box: functools.partial(lambda x, box: x * box[0], box=box), lambda f, x: f(x)),
    "bound method": _called(lambda rate: ((a := Plain(rate)).scaled, lambda new: setattr(a, "rate", new))),
}


def _with(function: Any, rate: Any) -> Any:
    function.rate = rate
    return function


@pytest.mark.parametrize("how", ["place", "name", "static", "in a tree"])
@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_inside_of_a_constant_is_seen(name, how):
    value, change, use = CHANGING[name](2.0)
    x = torch.ones(2)
    jitted = jit(use, backend="replay", static=use.__code__.co_varnames[0] if how == "static" else ())
    if how == "in a tree":
        jitted, value = jit(lambda tree, x: use(tree["a"][0], x), backend="replay"), {"a": [value]}
    call = (lambda: jitted(x=x, **{use.__code__.co_varnames[0]: value})) if how == "name" else lambda: jitted(value, x)
    assert torch.equal(call(), 2 * x)
    assert torch.equal(call(), 2 * x) and jitted.cache_info()[:2] == (1, 1)
    for rate in (3.0, 5.0, 5.0):
        change(rate)
        assert torch.equal(call(), rate * x)


CONSTANTS = [
    *(1, True, 1.0, -0.0, 0.0, 1j, "a", b"a", None, ..., range(3), slice(1, 2), Choice.ONE, Choice.TWO, np.float32(1)),
    *(np.float64(1), np.int64(1), torch.float32, torch.device("cpu"), torch.strided, torch.Size([2])),
    *(torch.sin, torch.nn.functional.relu, torch.Tensor.sin, len, np.sin, torch, Plain, lt.Dense(2, 3), lt.MSELoss()),
    *(frozenset({1}), frozenset({1.0}), Frozen(1), Frozen(1.0), Frozen((1, "a")), lt.Static(1)),
    types.MappingProxyType({1: 2}),
]  # fmt: skip


@pytest.mark.parametrize("static", [False, True])
def test_constants_are_told_apart_by_value_and_type(static):
    seen = []
    jitted = jit(lambda x, c: (seen.append(c), x + 1)[1], backend="replay", static="c" if static else ())
    for _ in range(2):
        for constant in CONSTANTS[:14]:
            jitted(torch.ones(1), constant)
    assert len(seen) == 14
    jitted, seen[:] = jit(lambda x, c: (seen.append(c), x + 1)[1], backend="replay", static="c" if static else ()), []
    for _ in range(2):
        for constant in CONSTANTS[14:28]:
            jitted(torch.ones(1), constant)
    assert len(seen) == 14
    jitted, seen[:] = jit(lambda x, c: (seen.append(c), x + 1)[1], backend="replay", static="c" if static else ()), []
    for _ in range(2):
        for constant in CONSTANTS[28:]:
            jitted(torch.ones(1), constant)
    assert len(seen) == len(CONSTANTS) - 28


W = torch.ones(2)
HOLDING = {
    # Values that hold a tensor or a state that cannot be seen, and where they do.
    "object": (lambda: Plain(W), "c.rate"),
    "frozen": (lambda: Frozen(W), "c.rate"),
    "own ==": (lambda: Same([W]), "c.rate[0]"),
    "slots": (lambda: Slotted(W), "c.rate"),
    "namespace": (lambda: types.SimpleNamespace(a={"k": W}), "c.a['k']"),
    "deep": (lambda: Plain(Frozen({"k": (1, W)})), "c.rate.rate['k'][1]"),
    "set": (lambda: {W}, "c as an item"),
    "dict subclass": (lambda: Dict(k=W), "c['k']"),
    "closure": (lambda: (lambda w: lambda x: x * w)(W), "c.__closure__.w"),
    "default": (lambda: lambda x, w=W: x * w, "c.__defaults__[0]"),
    "keyword default": (lambda: lambda x, *, w=W: x * w, "c.__kwdefaults__['w']"),
    "partial": (lambda: functools.partial(torch.mul, W), "c.args[0]"),
    "bound method": (lambda: Plain(W).scaled, "c.__self__.rate"),
    "method of a tensor": (lambda: W.add, "c.__self__"),
    "module": (lambda: torch.nn.Linear(2, 2), "from_torch"),
    "module inside": (lambda: Plain(torch.nn.Linear(2, 2)), "c.rate"),
    "optimizer": (lambda: torch.optim.SGD([W], 0.1), "c.param_groups[0]"),
    "box": (lambda: lt.StatefulLayer(lt.Scale(2), *lt.setup(0, lt.Scale(2))), "c.parameters['weight']"),
    "array": (lambda: np.ones(2), "torch.as_tensor"),
    "array inside": (lambda: Plain(np.ones(2)), "c.rate"),
    "generator": (lambda: torch.Generator(), "c: An argument"),
    "iterator": (lambda: iter([1]), "c: An argument"),
    "generator expression": (lambda: (i for i in range(2)), "c: An argument"),
    "lock": (lambda: threading.Lock(), "c: An argument"),
    "numpy generator": (lambda: np.random.default_rng(0), "c: An argument"),
    "static": (lambda: lt.Static([1]), "c: An argument"),
}


@pytest.mark.parametrize("where", ["argument", "tree", "static"])
@pytest.mark.parametrize("name", HOLDING)
def test_what_cannot_be_compared_is_refused_with_its_place(name, where):
    if name == "static" and where == "static":
        pytest.skip("it holds what is compared by its value")
    make, place = HOLDING[name]
    jitted = jit(lambda x, c: x + 1, backend="replay", static="c" if where == "static" else ())
    value = {"k": [make()]} if where == "tree" else make()
    with pytest.raises(DTypeError, match="must be a tensor or a constant") as caught:
        jitted(torch.ones(2), value)
    place = place.replace("c", "c['k'][0]", 1) if where == "tree" and place[0] == "c" else place
    assert place in str(caught.value) and caught.value.fix


def test_a_constant_that_holds_itself():
    value = Plain(1.0)
    value.more = value
    jitted = jit(lambda a, x: x * a.more.rate, backend="replay")
    assert jitted(value, W).tolist() == [1, 1]
    value.rate = 2.0
    assert jitted(value, W).tolist() == [2, 2]


def test_methods_see_their_object():
    one, other = Plain(1.0), Plain(2.0)
    for rate in (1.0, 3.0):
        one.rate = rate
        assert torch.equal(one.jitted(W), rate * W) and torch.equal(other.jitted(W), 2 * W)
    later = jit(one.scaled, backend="replay")
    for rate in (1.0, 3.0):
        one.rate = rate
        assert torch.equal(later(W), rate * W)
    with pytest.raises(DTypeError, match="a Plain, which holds a tensor at self.rate"):
        Plain(W).jitted(W)


def test_modules_are_refused_as_functions():
    module = torch.nn.Linear(2, 2)
    for function in (module, module.forward):
        with pytest.raises(InputError, match="must be pure"):
            jit(function)


NODES = {
    "dataclass of torch": lambda a, b: Node(a, b),
    "exported dataclass": lambda a, b: Output(a, b),
    "dict of torch": lambda a, b: Mapped(a=a, b=b),
    "nested": lambda a, b: {"k": [Node(Output(a), {"m": Mapped(x=b)})]},
    "in a vector's tree": lambda a, b: (lt.ComponentVector({"a": a}), Node(b, None)),
    "results of torch": lambda a, b: torch.return_types.max((a, b)),
    "ordered": lambda a, b: collections.OrderedDict(b=b, a=a),
    "default": lambda a, b: collections.defaultdict(list, a=a, b=b),
    "deque": lambda a, b: collections.deque([a, b], maxlen=3),
}


@pytest.mark.parametrize("donate", [(), "tree"])
@pytest.mark.parametrize("name", NODES)
def test_nodes_of_either_library(name, donate, same):
    make = NODES[name]

    def double(tree):
        return torch.utils._pytree.tree_map(lambda t: t if t is None else t * 2, tree)

    jitted = jit(double, backend="replay", donate=donate)
    for k in (1.0, 2.0):
        got, expected = jitted(make(W * k, W + k)), make(2 * W * k, 2 * (W + k))
        assert type(got) is type(expected)
        leaves, others = map(torch.utils._pytree.tree_leaves, (got, expected))
        same(leaves, others)
    assert jitted.cache_info()[:2] == (1, 1)


def test_the_context_of_a_node_counts():
    jitted = jit(lambda node: node.x * len(node.name), backend="replay")
    assert [jitted(Node(W, None, name)).sum().item() for name in ("a", "bb", "a")] == [2, 2, 2]  # a dropped field
    jitted = jit(lambda node: torch.stack(list(node.values())) * len("".join(node)), backend="replay")
    assert [jitted(Mapped({name: W})).sum().item() for name in ("a", "bb", "a")] == [2, 4, 2]
    assert jitted.cache_info()[:2] == (1, 2)


def test_a_tensordict():
    tensordict = pytest.importorskip("tensordict")
    jitted = jit(lambda td: td.apply(lambda t: t * 2), backend="replay")
    for k in (1.0, 2.0):
        td = tensordict.TensorDict({"a": W * k, "b": {"c": W + k}}, batch_size=[2])
        got = jitted(td)
        assert torch.equal(got["a"], 2 * W * k) and torch.equal(got["b", "c"], 2 * (W + k))
    assert jitted.cache_info()[:2] == (1, 1)


CHANGES = {
    "attribute": lambda a, x: (setattr(a, "rate", 3.0), x)[1],
    "counter": lambda a, x: (setattr(a, "rate", a.rate + 1), x)[1],
    "list inside": lambda a, x: (a.more.append(1), x)[1],
    "dict": lambda d, x: (d.update(new=x), x + 1)[1],
    "replaced": lambda d, x: (d.update(k=x), x + 1)[1],
    "popped": lambda d, x: (d.pop("k"), x + 1)[1],
    "data": lambda d, x: setattr(d["k"], "data", x) or x,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_arguments_are_refused(name):
    value = Plain(1.0, []) if name in ("attribute", "counter", "list inside") else {"k": torch.ones(2)}
    with pytest.raises(TracingError, match="A jitted function must not change"):
        jit(CHANGES[name], backend="replay")(value, torch.ones(2))


class Holder:
    pass


KEEPS = {
    "list": lambda box, x: box.items.append(x),
    "attribute": lambda box, x: setattr(box, "x", x),
    "closure": lambda box, x: setattr(box, "f", lambda: x),
    "dict": lambda box, x: box.items.append({"x": x}),
    "generator": lambda box, x: box.items.append(x + i for i in range(2)),
}


@pytest.mark.parametrize(("grad", "dynamic"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", KEEPS)
def test_arguments_that_are_kept(name, grad, dynamic):
    box = Holder()
    box.items = []
    jitted = jit(lambda x: (KEEPS[name](box, x), x + 1)[1], backend="replay", dynamic=dynamic)
    with pytest.raises(TracingError, match="A jitted function must not keep an argument of shape"):
        jitted(torch.ones(2, requires_grad=grad))


RESULTS_REFUSED = {
    # What holds a traced tensor, or goes on by itself, and the place that is named.
    "object": (lambda x: Plain(x), "result.rate"),
    "frozen": (lambda x: {"a": [Frozen(x * 2)]}, "result['a'][0].rate"),
    "set": (lambda x: {x}, "result as an item"),
    "closure": (lambda x: lambda: x, "result.__closure__.x"),
    "partial": (lambda x: functools.partial(torch.mul, x), "result.args[0]"),
    "dict subclass": (lambda x: Dict(k=x), "result['k']"),
    "map": (lambda x: map(lambda i: x * i, range(2)), "result"),
    "generator": (lambda x: [(x * i for i in range(2))], "result[0]"),
    "iterator": (lambda x: iter([1, 2]), "result"),
    "zip": (lambda x: zip([x], [x], strict=True), "result"),
    "method": (lambda x: x.add, "result.__self__"),
    "array": (lambda x: np.ones(2), "result"),
    "module": (lambda x: torch.nn.Identity(), "result"),
    "closed-over tensor in an object": (lambda x: Plain(W), "result.rate"),
    "f-string": (lambda x: f"{x.sum()}", "result"),
    "repr": (lambda x: (x, [repr(x)]), "result[1][0]"),
    "text in an object": (lambda x: Plain(str(x)), "result"),
}


@pytest.mark.parametrize("name", RESULTS_REFUSED)
def test_results_that_are_refused(name):
    function, place = RESULTS_REFUSED[name]
    with pytest.raises(TracingError, match=f"{HERE}:\\d+: A jitted function must (not )?return") as caught:
        jit(function, backend="replay")(torch.ones(2))
    assert f" {place} " in f"{caught.value} ".replace("\n", " ").replace(",", " ")


RESULTS = {
    "node of torch": lambda x: Node(x + 1, {"k": Output(x)}),
    "ordered": lambda x: collections.OrderedDict(b=x, a=x + 1),
    "deque": lambda x: collections.deque([x, x * 2]),
    "numbers": lambda x: (x, 1, 1.5, "a", None, len(x), x.shape, x.dtype),
    "same twice": lambda x: (lambda y: (y, y))(x + 1),
    "itself": lambda x: (x, [x]),
    "views": lambda x: (x.view(-1), x.T, x[0], x),
    "constant": lambda x: (x + 1, W),
    "made of a constant": lambda x: (x, W + 1, torch.tensor([1.0]), torch.zeros(2), torch.arange(3)),
}


@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_those_of_the_plain_call(name, backend):
    function = RESULTS[name]
    jitted = jit(function, backend=backend)
    for k in (1.0, 2.0, 2.0):
        x = torch.full((2, 2), k)
        got, expected = jitted(x), function(x)
        leaves, others = map(torch.utils._pytree.tree_leaves, (got, expected))
        assert type(got) is type(expected) and len(leaves) == len(others)
        for one, other in zip(leaves, others, strict=True):
            if isinstance(other, Tensor):
                assert torch.equal(one, other)
                assert (one is x) == (other is x) and (one is W) == (other is W)
                assert (one.untyped_storage().data_ptr() == x.data_ptr()) == (
                    other.untyped_storage().data_ptr() == x.data_ptr()
                )
            else:
                assert one == other and type(one) is type(other)
        tensors = [one for one in leaves if isinstance(one, Tensor)]
        again = [one for one in others if isinstance(one, Tensor)]
        assert [a is b for a in tensors for b in tensors] == [a is b for a in again for b in again]
        for one in tensors:
            if one is not W:
                one.add_(1)  # what the caller does with a result is not seen by the next call


def test_objects_that_come_back():
    jitted = jit(lambda a, x: (a, x + 1, {3}, Plain([1])), backend="replay")
    for value in (Mutable(1.0), Mutable(1.0), Plain(1.0)):
        same, _, made, other = jitted(value, W)
        assert same is value and made == {3} and other.rate == [1]
        made.add(4)
        other.rate.append(2)


ASKS = [
    lambda f: f.cache_clear(),
    lambda f: f.lower(torch.ones(3)),
    lambda f: f(torch.ones(2)),
    lambda f: f.cache_info(),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_function_that_asks_for_itself_returns(ask):
    depth, outcome = [], []

    @jit(backend="replay")
    def function(x):
        depth.append(0)
        if len(depth) == 1:
            ask(function)
        return x + 1

    def run():
        try:
            outcome.append(function(torch.ones(2)))
        except TracingError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert outcome and (isinstance(outcome[0], Tensor) or "lower" in outcome[0].fix)


def test_clearing_another_function_while_it_is_compiled():
    one, other = jit(lambda x: (other.cache_clear(), x + 1)[1], backend="replay"), None
    other = jit(lambda x: (one.cache_clear(), x - 1)[1], backend="replay")
    results = []
    threads = [
        threading.Thread(target=lambda f=f, n=n: results.append(f(torch.ones(n))), daemon=True)
        for n in range(2, 8)
        for f in (one, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 12


def test_all_namespaces_agree_on_where_a_node_of_torch_is_known():
    jit(lambda node: node.x, backend="replay")(Node(W, W))
    assert len(optree.tree_leaves(Node(W, W))) == 1  # nowhere else than in jit
