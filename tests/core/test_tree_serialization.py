"""Every node has paths that lead to its leaves, and a structure that is written as JSON and read again."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.autodiff._torch_func import pack
from luxtorch.core import _tree, register_constant, register_node
from luxtorch.core._plain import from_plain


def act(x):
    return x.relu()


class Own(lt.Layer):
    """A layer that a user defines."""

    size: int
    scale: float = 2.0

    def __call__(self, x, ps, st):
        return self.scale * x, st


@dataclasses.dataclass(frozen=True)
class Config:
    name: str


class Names(NamedTuple):
    a: int
    b: str


def model():
    return lt.Chain(
        lt.Conv((3, 3), 3, 4, torch.relu, padding=1),
        lt.BatchNorm(4),
        lt.FlattenLayer(),
        lt.Dense(4 * 16, 8, torch.nn.functional.gelu),
        lt.SkipConnection(lt.Dense(8, 8, torch.tanh), torch.add),
        lt.Dropout(0.3),
        Own(8),
    )


RULES = {
    "Adam": optim.Adam(0.1),
    "schedule": optim.AdamW(optim.warmup_cosine(0.1, 2, 100), weight_decay=0.1),
    "clipped": optim.OptimiserChain(optim.ClipNorm(1.0), optim.Momentum(0.1)),
    "groups": optim.Groups({"layer_4": optim.Adam(0.1)}, rest=optim.Descent(0.1)),
    "accumulated": optim.OptimiserChain(optim.AccumGrad(2), optim.RMSProp(0.1)),
}


def train_state(rule, flat=False):
    ps, st = lt.setup(0, model())
    return training.TrainState(model(), lt.ComponentVector(ps) if flat else ps, st, rule)


def trees():
    """Yield a name and a tree for each kind of node."""
    ps, st = lt.setup(0, model())
    vector = lt.ComponentVector(ps)
    yield "parameters", ps
    yield "states", st
    yield "vector", vector
    yield "empty vector", lt.ComponentVector({}, dtype=torch.float32)
    small = lt.ComponentVector({"a": torch.zeros(2), "b": {"c": torch.zeros(())}})
    yield "matrix", lt.ComponentMatrix(torch.zeros(3, 3), small.axes, None)
    yield "axes", {"axes": small.axes, "x": torch.zeros(1)}
    yield "inputs", lt.Inputs(torch.zeros(1), {"m": torch.zeros(2)}, scale=torch.zeros(3))
    for name, value in STATICS.items():
        yield f"static {name}", {"static": lt.Static(value), "x": torch.zeros(1)}
    for name, rule in RULES.items():
        yield name, optim.setup(rule, ps)
        yield f"{name}, flat", optim.setup(rule, vector)
        yield f"{name}, training", [train_state(rule), train_state(rule, flat=True)]
    frozen = optim.freeze(optim.setup(optim.Adam(0.1), vector), "layer_4")
    yield "frozen", frozen
    yield (
        "minimum",
        optim.MinimizeResult(torch.zeros(()), torch.zeros(()), torch.ones(()), torch.ones(()), torch.ones(())),
    )
    yield "packed", pack({"a": torch.zeros(1), "b": "text", "c": (3, torch.zeros(2))})
    yield "user", Bag([torch.zeros(1), torch.zeros(2)], "a")
    yield "constant", {"mode": Mode("fast"), "x": torch.zeros(1)}


class Bag:
    """A node that a user registers."""

    def __init__(self, items, label):
        self.items, self.label = items, label


@dataclasses.dataclass(frozen=True)
class Mode:
    """A constant that a user registers."""

    name: str


register_node(Bag, lambda bag: (bag.items, bag.label), lambda items, label: Bag(list(items), label))
register_constant(Mode)

STATICS = {
    "bool": True,
    "number": 1.5,
    "integer": -(2**70),
    "infinite": math.inf,
    "complex": 1 + 2j,
    "text": "a\u00e9\n",
    "none": None,
    "tuple": (1, (2.0, "three"), ()),
    "set": frozenset({1, 2}),
    "dtype": torch.float32,
    "device": torch.device("cpu", 0),
    "size": torch.Size([2, 3]),
    "function of torch": torch.tanh,
    "function with a prefix": torch.special.erf,
    "function of C": torch.nn.functional.logsigmoid,
    "class": lt.Dense,
    "layer": model(),
    "loss": lt.losses.CrossEntropyLoss(weight=(1.0, 2.0)),
    "axes": lt.axes({"a": torch.zeros(2)}),
}
TREES = dict(trees())


@pytest.fixture(autouse=True)
def _known():
    with torch.serialization.safe_globals([Mode]):
        yield


@pytest.mark.parametrize("name", TREES)
def test_paths_lead_to_leaves(name):
    tree = TREES[name]
    found, spec = pytree.tree_flatten_with_path(tree)
    leaves, same = pytree.tree_flatten(tree)
    assert spec == same and len(found) == len(leaves) > 0
    for (path, leaf), expected in zip(found, leaves, strict=True):
        assert leaf is expected and pytree.key_get(tree, path) is leaf
    assert len({path for path, _ in found}) == len(found)


@pytest.mark.parametrize("name", TREES)
def test_structures_are_written_and_read(name):
    if name == "packed":  # only derivatives make it, and it holds anything
        with pytest.raises(lt.InputError, match="structure of a tree"):
            pytree.treespec_dumps(pytree.tree_structure(TREES[name]))
        return
    leaves, spec = pytree.tree_flatten(TREES[name])
    text = pytree.treespec_dumps(spec)
    json.loads(text)
    read = pytree.treespec_loads(text)
    assert read == spec
    again = pytree.tree_unflatten(leaves, read)
    assert repr(again) == repr(TREES[name]) or name == "user"
    assert pytree.tree_structure(again) == spec


def test_every_node_of_the_package_is_here():
    def kinds(spec):
        return {spec.type}.union(*map(kinds, spec.children())) if not spec.is_leaf() else set()

    seen = set().union(*(kinds(pytree.tree_structure(tree)) for tree in TREES.values()))
    ours = {cls for cls in _tree._NODES | _tree._CONSTANTS if cls.__module__.startswith("luxtorch.")}
    assert ours <= seen
    for cls in ours:
        name = pytree.SUPPORTED_SERIALIZED_TYPES[cls].serialized_type_name
        assert pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[name] is cls and not any(
            part.startswith("_") for part in name.split(".")[:-1]
        )


def test_a_state_that_was_read_goes_on(make_key):
    ts = train_state(optim.Adam(optim.linear(0.1, 0.0, 10)))
    leaves, spec = pytree.tree_flatten(ts)
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    x = lt.random.normal(make_key(), (2, 3, 4, 4))
    for _ in range(3):
        (_, loss, _, ts), (_, other, _, again) = (
            training.single_train_step(lt.MSELoss(), (x, torch.zeros(2, 8)), state) for state in (ts, again)
        )
        assert torch.equal(loss, other)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (act, r"test_tree_serialization\.act[\s\S]*add_safe_globals\(\[act\]\)"),
        (Config("a"), r"test_tree_serialization\.Config[\s\S]*add_safe_globals\(\[Config\]\)"),
        (Names(1, "a"), r"Names"),
        (lambda x: x, r"consist of[\s\S]*lambda"),
        (torch.ones(1).sin, "consist of"),
        (object(), "consist of"),
        (print, r"builtins\.print"),
        (torch.os.system, r"add_safe_globals\(\[system\]\)"),
    ],
)
def test_what_cannot_be_written_is_named(value, text):
    spec = pytree.tree_structure({"static": lt.Static(value)})
    with pytest.raises(lt.InputError, match=text):
        pytree.treespec_dumps(spec)
    if value in (act, Config("a"), Names(1, "a")):
        with torch.serialization.safe_globals([value if value is act else type(value)]):
            assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize(
    "plain",
    [
        {"name": "torch:os.system"},
        {"name": "os:system"},
        {"name": "builtins:exec"},
        {"name": "torch:nothing"},
        {"name": "torch:os"},
        {"name": "not_imported_yet:f"},
        {"name": "torch.not_there:f"},
        {"class": "builtins:dict", "fields": {}},
        {"class": "subprocess:Popen", "values": ["ls"]},
        {"class": "torch:Tensor", "fields": {}},
        {"class": "luxtorch.core._mode:Static", "parts": 1},
        {"class": "luxtorch.optim._rule_state:RuleState", "values": [1]},
        {"dtype": "os"},
        {"pickle": "gASV"},
        {},
        {"name": f"{__name__}:act"},
    ],
)
def test_a_file_can_name_nothing_else(plain):
    with pytest.raises(lt.InputError):
        from_plain(plain)


def test_the_words_of_the_format():
    """What was written once must be read for ever."""
    written = {
        "rule": [1, "a", {"dtype": "float32"}, {"name": "torch:tanh"}],
        "dict": {"dict": [["a", 1], [2, {"list": [3]}]]},
    }
    assert from_plain(written["rule"]) == (1, "a", torch.float32, torch.tanh)
    assert from_plain(written["dict"]) == {"a": 1, 2: [3]}
