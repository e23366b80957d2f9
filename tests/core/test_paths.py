"""What dotted paths, globs, predicates and lists of these stand for: against brute force, and in every function."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.core import DTypeError, KeyNameError, tree_leaves
from luxtorch.core._paths import places, select, select_any

# Words with a meaning in globs are among them: a layer may be called anything without a dot.
WORDS = some.sampled_from(["a", "b", "ab", "bias", "a*", "[a]", "b?", "layer_1", "layer_2"])
TREES = some.recursive(
    some.none(), lambda below: some.dictionaries(WORDS, below, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: tree is not None)
GLOBS = some.lists(some.sampled_from(["*", "?", "a", "b", "layer_", "[ab]", "[!a]", ".", "bias", "1"]), max_size=5)


def names_of(tree, path=()):
    """List the dotted names of the leaves of a tree."""
    if tree is None:
        return [".".join(path)]
    return [name for word, below in tree.items() for name in names_of(below, (*path, word))]


def stands_for(path, name, names):
    """Tell from the definition whether a path stands for a name."""
    ways = [name[:end] for end in range(1, len(name) + 1) if end == len(name) or name[end] == "."]
    literal = any(path == other or other.startswith(f"{path}.") for other in names)
    return path in ways if literal else any(fnmatchcase(way, path) for way in ways)


@given(TREES, some.data())
def test_against_brute_force(tree, data):
    names = names_of(tree)
    ways = {name.rsplit(".", cut)[0] for name in names for cut in range(4)}
    paths = data.draw(some.lists(GLOBS.map("".join) | some.sampled_from(sorted(ways)), min_size=1, max_size=3))
    found = [{name for name in names if stands_for(path, name, names)} for path in paths]
    for path, expected in zip(paths, found, strict=True):
        if expected:
            assert select(path, names) == expected
            below = list(places(path, names).values())
            assert sorted(name for each in below for name in each) == sorted(expected)  # no name has two places
        else:
            with pytest.raises(KeyNameError):
                select(path, names)
    for several in (paths, tuple(paths), set(paths), dict.fromkeys(paths).keys()):
        if all(found):
            assert select(several, names) == set().union(*found)
            assert select_any([several], names) == [name for name in names if name in set().union(*found)]
        else:
            with pytest.raises(KeyNameError):
                select(several, names)


@pytest.mark.parametrize(
    "path, words",
    [
        ("haed", "Did you mean 'head'?"),
        ("*.bais", "Did you mean '*.bias'?"),
        ("encodr.*.bias", "Did you mean 'encoder.*.bias'?"),
        ("encoder.layr_?.bias", "Did you mean 'encoder.layer_"),
        ("*x*", "No parameter is named '*x*'."),
        (["head", "haed"], "Did you mean 'head'?"),
        ([], "An empty list of paths"),
        ((), "An empty list of paths"),
        (lambda name: False, "The predicate is true of no parameter."),
        (["head", lambda name: False], "The predicate is true of no parameter."),
    ],
)
def test_what_stands_for_nothing_is_an_error_that_names_what_is_near(path, words):
    with pytest.raises(KeyNameError) as caught:
        select(path, NAMES)
    assert words in str(caught.value)


@pytest.mark.parametrize("path", [3, torch.ones(2), {"head": 1}, [None], ["head", None], [3]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(DTypeError, match="The path of a parameter must be a dotted path"):
        select(path, NAMES)


MODEL = lt.Chain(
    encoder=lt.Chain(lt.Dense(3, 3, torch.tanh), lt.Chain(deep=lt.Dense(3, 3))),
    block_1=lt.Dense(3, 3),
    block_2=lt.Dense(3, 3),
    head=lt.Dense(3, 3),
)
NAMES = list(lt.flatten_names(lt.setup(0, MODEL)[0]))
X = torch.linspace(-1, 1, 6).reshape(2, 3)

FORMS = {
    "path": ("encoder.layer_2", lambda name: name.startswith("encoder.layer_2.")),
    "name": ("head.weight", lambda name: name == "head.weight"),
    "end": ("*.weight", lambda name: name.endswith(".weight")),
    "middle": ("encoder.*.weight", lambda name: name.startswith("encoder.") and name.endswith(".weight")),
    "layers": ("block_?", lambda name: name.startswith("block_")),
    "class": ("block_[!2].weight", lambda name: name == "block_1.weight"),
    "predicate": (lambda name: "block" in name, lambda name: "block" in name),
    "list": (["head", "*_1.weight"], lambda name: name.startswith("head") or name.endswith("_1.weight")),
    "tuple": (("head.weight", lambda name: "deep" in name), lambda name: name == "head.weight" or "deep" in name),
    "set": (frozenset({"head", "block_1"}), lambda name: name.startswith(("head", "block_1"))),
    "none": (None, lambda name: True),
}


def content(result):
    """Return what can be compared of layers, trees and states."""
    if isinstance(result, tuple):
        return [content(part) for part in result]
    if isinstance(result, dict | lt.ComponentVector):
        return {name: tensor.tolist() for name, tensor in lt.flatten_names(result).items()}
    return result.tolist() if isinstance(result, torch.Tensor) else result


def trained(opt_state, ps):
    return optim.update(opt_state, ps, torch.utils._pytree.tree_map(torch.ones_like, ps))[1]


def grouped(path, ps):
    path = tuple(path) if isinstance(path, list) else path
    return trained(optim.setup(optim.Groups({path: optim.Descent(0.1)}, rest=optim.Descent(0.2)), ps), ps)


def adjusted(path, ps, st):
    ts = training.TrainState(MODEL, ps, st, optim.Descent(0.1))
    return trained(ts.adjust(0.2, path=path).optimizer_state, ps)


USES = {
    "freeze": lambda path, ps, st: lt.freeze(MODEL, ps, st, path),
    "unfreeze": lambda path, ps, st: lt.unfreeze(*lt.freeze(MODEL, ps, st), path),
    "Frozen": lambda path, ps, st: lt.Frozen(MODEL, path).names,
    "lora": lambda path, ps, st: lt.lora(MODEL, ps, st, path, rng=1, rank=1),
    "LoRA": lambda path, ps, st: lt.LoRA(MODEL, path, rank=1).names,
    "weight_norm": lambda path, ps, st: lt.weight_norm(MODEL, ps, st, path),
    "partition": lambda path, ps, st: lt.partition(ps, path),
    "optim.freeze": lambda path, ps, st: trained(optim.freeze(optim.setup(optim.Adam(), ps), path), ps),
    "optim.thaw": lambda path, ps, st: trained(optim.thaw(optim.freeze(optim.setup(optim.Adam(), ps)), path), ps),
    "optim.adjust": lambda path, ps, st: trained(optim.adjust(optim.setup(optim.Adam(), ps), 0.5, path=path), ps),
    "TrainState.adjust": adjusted,
    "Groups": lambda path, ps, st: grouped(path, ps),
}


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", USES)
def test_every_function_takes_every_form(make_key, use, form, tree):
    path, means = FORMS[form]
    if use == "Groups" and path is None:
        pytest.skip("no path of Groups, but its rest")
    ps, st = lt.setup(make_key(), MODEL)
    got, expected = (USES[use](each, tree(ps), st) for each in (path, means))
    assert content(got) == content(expected)


@pytest.mark.parametrize("path", ["*.bias", ("encoder.head", "*.block_?.bias"), "encoder.*"])
def test_a_module_of_torch_has_parameters_of_the_same_names(make_key, path):
    inside = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 3), "block_1": torch.nn.Linear(3, 3)})
    layer, ps, st = lt.from_torch(torch.nn.ModuleDict({"encoder": inside, "head": torch.nn.Linear(3, 3)}))
    frozen = lt.freeze(layer, ps, st, path)[2]["frozen_params"]
    paths = (path,) if isinstance(path, str) else path
    expected = [name for name in lt.flatten_names(ps) if any(stands_for(one, name, list(NAMES)) for one in paths)]
    assert list(lt.flatten_names(frozen)) == expected


GROUPS = {
    "glob in a group": (("block_?",), ("block_1", "block_2")),
    "glob alone": ("block_?", ("block_1", "block_2")),
    "glob and path": (("head", "block_*"), ("head", "block_1", "block_2")),
    "layers at any depth": (["*.layer_1", "*.deep"], ("encoder.layer_1", "encoder.layer_2.deep")),
    "parameters": ("*.bias", tuple(name for name in NAMES if name.endswith("bias"))),
    "predicate": (lambda name: "block" in name and "bias" in name, ("block_1.bias", "block_2.bias")),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_of_shared_parameters(make_key, name):
    ps, st = lt.setup(make_key(), MODEL)
    group, explicit = GROUPS[name]
    got, expected = (lt.share_parameters(MODEL, ps, st, each) for each in (group, explicit))
    assert got[0] == expected[0] and content(got[1:]) == content(expected[1:])


LAYERS = ["encoder.layer_1", "encoder.layer_2", "encoder.layer_2.deep", "encoder", "block_1", "block_2", "head"]
LAYER_FORMS = {
    "path": ("encoder", ["encoder"]),
    "paths": (["head", "encoder.layer_2.deep"], ["head", "encoder.layer_2.deep"]),
    "glob": ("block_?", ["block_1", "block_2"]),
    "glob over dots": ("encoder.*", ["encoder.layer_1", "encoder.layer_2", "encoder.layer_2.deep"]),
    "end": ("*.deep", ["encoder.layer_2.deep"]),
    "tuple": (("head", "block_*", "block_1"), ["head", "block_1", "block_2"]),
    "predicate": (lambda path: "block" in path, ["block_1", "block_2"]),
    "all": (None, LAYERS),
    "none": ([], []),
}


@pytest.mark.parametrize("form", LAYER_FORMS)
def test_layers_to_capture(make_key, form):
    ps, st = lt.setup(make_key(), MODEL)
    path, expected = LAYER_FORMS[form]
    (_, inside), _ = lt.capture(MODEL, X, ps, st, path)
    assert sorted(inside) == sorted(expected)
    if expected:
        (_, again), _ = lt.Perturbed(MODEL, *expected)((X, {}), ps, st)
        assert all(torch.equal(inside[name], again[name]) for name in expected)


def test_modules_to_capture(make_key):
    encoder = torch.nn.Transformer(4, 2, 2, 1, 8, dropout=0.0, batch_first=True).encoder
    layer, ps, st = lt.from_torch(encoder)
    x = lt.random.normal(make_key(), (2, 5, 4))
    (_, inside), _ = lt.capture(layer, x, ps, st, "layers.?")  # and not the list itself, which is never called
    assert list(inside) == ["layers.0", "layers.1"]
    (_, inside), _ = lt.capture(lt.Chain(net=layer), x, {"net": ps}, {"net": st}, ["*.linear1", lambda p: p == "net"])
    assert list(inside) == ["net.layers.0.linear1", "net.layers.1.linear1", "net"]


@pytest.mark.parametrize("path", ["*.nothing", lambda path: False])
def test_no_layer_to_capture(path):
    with pytest.raises(KeyNameError, match="layer"):
        lt.capture(MODEL, X, *lt.setup(0, MODEL), path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["*.bias", ["head", "block_?.weight"], lambda name: name.startswith("block")])
def test_in_a_compiled_function(make_key, path):
    ps, st = lt.setup(make_key(), MODEL)

    def function(ps, st):
        part, rest = lt.partition(ps, path)
        halved = lt.combine(torch.utils._pytree.tree_map(lambda leaf: leaf / 2, part), rest, like=ps)
        return lt.capture(MODEL, X, halved, st, ["block_?", "head"])[0]

    got, expected = (f(ps, st) for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function))
    torch.testing.assert_close(tree_leaves(got), tree_leaves(expected))
