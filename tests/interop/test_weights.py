"""Weights from files of other programs: all or an error that says what differs, and nothing is changed in place."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch.core import named_leaves
from luxtorch.interop import from_torch, load_weights, to_torch

TREES = {"dict": lambda ps: ps, "vector": lt.ComponentVector}


class Tied(nn.Module):
    """A language model whose head is its embedding, as GPT-2's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


@pytest.fixture
def module(rng):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2))
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=rng))
    return module


@pytest.fixture
def tied(rng):
    module = Tied()
    module.embedding.weight.data.copy_(torch.randn(7, 4, generator=rng))
    return module


@pytest.fixture
def trees(module, make_key):
    """Other values for the same model."""
    _, ps, st = from_torch(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2)))
    return ps, st


def contiguous(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def save_safetensors(module, folder):
    safetensors.torch.save_file(contiguous(module), folder / "model.safetensors")
    return folder / "model.safetensors"


def save_torch(module, folder):
    torch.save(module.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def save_sharded(module, folder, suffix="safetensors"):
    tensors, files = contiguous(module), {}
    for number, names in enumerate((list(tensors)[:3], list(tensors)[3:])):
        name = f"model-{number}.{suffix}"
        shard = {name: tensors[name] for name in names}
        if suffix == "bin":
            torch.save(shard, folder / name)
        else:
            safetensors.torch.save_file(shard, folder / name)
        files |= dict.fromkeys(names, name)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


SOURCES = {
    "safetensors": save_safetensors,
    "torch": save_torch,
    "text path": lambda module, folder: str(save_torch(module, folder)),
    "folder": lambda module, folder: save_safetensors(module, folder).parent,
    "index": save_sharded,
    "folder with an index": lambda module, folder: save_sharded(module, folder).parent,
    "folder with an index of bin": lambda module, folder: save_sharded(module, folder, "bin").parent,
    "mapping": lambda module, folder: module.state_dict(),
    "parameters": lambda module, folder: {**dict(module.named_parameters()), **dict(module.named_buffers())},
    "tree": lambda module, folder: {
        name: dict(part.state_dict()) for name, part in module.named_children() if part.state_dict()
    },
}


def check(got, module):
    _, ps, st = from_torch(module)
    for tree, wanted in ((got.ps, ps), (got.st, st)):
        tree = tree.to_dict() if isinstance(tree, lt.ComponentVector) else tree
        for (name, leaf), (other, value) in zip(named_leaves(tree), named_leaves(wanted), strict=True):
            assert name == other
            assert torch.equal(leaf, value) and leaf.dtype == value.dtype


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tree", TREES)
def test_every_value_arrives(source, tree, module, trees, tmp_path):
    ps, st = trees
    ps, source = TREES[tree](ps), SOURCES[source](module, tmp_path)
    before, before_source = copy.deepcopy((ps, st)), copy.deepcopy(source)
    got = load_weights(source, ps, st)
    check(got, module)
    assert pytree.tree_structure((got.ps, got.st)) == pytree.tree_structure((ps, st))
    assert got.report.complete and len(got.report.loaded) == 9
    # Nothing was changed, and nothing is shared.
    for old, new in ((before, (ps, st)), (before_source, source)):
        leaves = zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in leaves)
    if isinstance(source, dict):
        own = {value.data_ptr() for value in pytree.tree_leaves(source)}
        assert own.isdisjoint(leaf.data_ptr() for leaf in pytree.tree_leaves(got.ps))


def test_the_model_computes_what_the_module_does(module, trees, rng):
    layer, *_ = from_torch(module)
    module.get_submodule("1").running_var.abs_()
    ps, st, _ = load_weights(module.state_dict(), *trees)
    x = torch.randn(5, 3, generator=rng)
    torch.testing.assert_close(layer(x, ps, lt.test_mode(st))[0], module.eval()(x))


RENAMES = {
    "dict": lambda names: {f"model.{name}": name for name in names},
    "function": lambda names: lambda name: name.removeprefix("model."),
    "pairs": lambda names: [(r"^model", "x"), (r"^x\.", "")],
}


@pytest.mark.parametrize("rename", RENAMES)
def test_names_are_mapped(rename, module, trees):
    weights = {f"model.{name}": value for name, value in module.state_dict().items()}
    check(load_weights(weights, *trees, rename=RENAMES[rename](module.state_dict())), module)


@pytest.mark.parametrize("rename", [{"extra": None}, lambda name: None if name == "extra" else name])
def test_a_name_is_left_out(rename, module, trees):
    check(load_weights({**module.state_dict(), "extra": torch.ones(1)}, *trees, rename=rename), module)


def test_values_are_cast_to_the_dtype_of_the_model(module, trees):
    half = {name: value.half() if value.is_floating_point() else value for name, value in module.state_dict().items()}
    ps, st, report = load_weights(half, *trees)
    assert ps["0"]["weight"].dtype == torch.float32
    assert torch.equal(ps["0"]["weight"], half["0.weight"].float())
    assert report.cast["0.weight"] == "float16 to float32" and "1.num_batches_tracked" not in report.cast


def test_a_model_on_the_meta_device_is_loaded_to_the_cpu(module, trees, tmp_path):
    meta = pytree.tree_map(lambda leaf: leaf.to("meta"), trees)
    got = load_weights(save_safetensors(module, tmp_path), *meta)
    check(got._replace(st={**got.st, "2": trees[1]["2"]}), module)


def test_random_keys_are_not_missed_but_loaded_where_they_are(trees, make_key):
    ps, st = trees
    weights = {**dict(named_leaves(ps)), **dict(named_leaves(st))}
    (name,) = (name for name, value in weights.items() if value.dtype == torch.uint64)
    for key in (make_key(), make_key().to(torch.int64)):
        got = load_weights({**weights, name: key}, ps, st)
        assert torch.equal(dict(named_leaves(got.st))[name], key.to(torch.uint64))


@pytest.mark.parametrize(
    "layer",
    [
        lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4), lt.Dropout(0.1)),
        lt.StatefulRecurrentCell(lt.LSTMCell(3, 5), batch_size=2),
    ],
)
def test_the_state_dict_of_a_layers_own_module_is_loaded(layer, make_key, tmp_path):
    ps, st = lt.setup(make_key(), layer)
    safetensors.torch.save_file(to_torch(layer, ps, st).state_dict(), tmp_path / "model.safetensors")
    got = load_weights(tmp_path, *lt.setup(make_key(), layer))
    assert pytree.tree_structure((got.ps, got.st)) == pytree.tree_structure((ps, st))
    leaves = zip(pytree.tree_leaves((got.ps, got.st)), pytree.tree_leaves((ps, st)), strict=True)
    keys = (leaf.dtype == torch.uint64 for leaf in pytree.tree_leaves((ps, st)))  # which stay out
    assert all(key or torch.equal(a, b) and a.dtype == b.dtype for key, (a, b) in zip(keys, leaves, strict=True))


# Tied weights.


@pytest.mark.parametrize(
    "save",
    [
        lambda module, path: torch.save(module.state_dict(), path.with_suffix(".bin")),
        lambda module, path: safetensors.torch.save_file(contiguous(module), path),  # both, in memory of their own
        lambda module, path: safetensors.torch.save_model(module, path),  # one, and a note on the other
    ],
)
def test_a_tied_weight_may_have_one_name_or_two(save, tied, tmp_path):
    _, ps, st = from_torch(Tied())
    save(tied, tmp_path / "model.safetensors")
    got = load_weights(tmp_path, ps, st)
    check(got, tied)
    assert dict(got.report.tied) == {"head.weight": "embedding.weight"}


def test_a_tied_weight_under_its_other_name_is_renamed(tied):
    _, ps, st = from_torch(Tied())
    weights = contiguous(tied)
    both = {"head.weight": "embedding.weight"}
    check(load_weights(weights, ps, st, rename=both), tied)
    del weights["embedding.weight"]
    check(load_weights(weights, ps, st, rename=both), tied)
    loaded = load_weights(weights, ps, st)  # the states know the other name
    check(loaded, tied)
    assert loaded.report.tied == {"head.weight": "embedding.weight"}
    del weights["head.weight"]
    with pytest.raises(lt.KeyNameError, match="'embedding.weight' is not in the file"):
        load_weights(weights, ps, st)


def test_vectors_that_are_equal_by_chance_are_not_tied(module, trees):
    weights = {**module.state_dict(), "extra": torch.zeros(4), "1.bias": torch.zeros(4)}
    assert load_weights(weights, *trees, strict=False).report.unexpected == ("extra",)


def test_two_tensors_for_one_name_are_an_error(module, trees):
    weights = {**module.state_dict(), "other": torch.ones(4, 3)}
    with pytest.raises(lt.InputError, match="Two different tensors must not be called '0.weight'"):
        load_weights(weights, *trees, rename={"other": "0.weight"})


# What does not fit.


def test_all_differences_are_in_one_error_or_in_the_report(module, trees):
    weights = module.state_dict()
    weights["0.wieght"] = weights.pop("0.weight")
    weights["3.bias"] = torch.zeros(3)
    weights["1.running_mean"] = torch.zeros(4, dtype=torch.complex64)
    weights["_extra_state"] = {"a": 1}
    with pytest.raises(lt.KeyNameError) as caught:
        load_weights(weights, *trees)
    for part in (
        "'0.weight' is not in the file; in the model it is float32 of shape (4, 3).",
        "'0.wieght' is only in the file. Did you mean '0.weight'?",
        "'3.bias' does not fit: float32 of shape (3,) in the file, float32 of shape (2,) in the model.",
        "'1.running_mean' does not fit: complex64",
        "'_extra_state.a' is only in the file.",
    ):
        assert part in str(caught.value)
    ps, st, report = load_weights(weights, *trees, strict=False)
    assert report.missing == ("0.weight",)
    assert report.unexpected == ("0.wieght", "_extra_state.a")
    assert set(report.mismatched) == {"3.bias", "1.running_mean"}
    assert not report.complete
    assert ps["0"]["weight"] is trees[0]["0"]["weight"] and ps["3"]["bias"] is trees[0]["3"]["bias"]
    assert torch.equal(ps["0"]["bias"], module.state_dict()["0.bias"])
    for line in ("6 loaded", "missing: 0.weight", "unexpected: 0.wieght", "mismatched: 3.bias: float32 of shape (3,)"):
        assert line in str(report)


def test_shapes_alone_are_an_input_error(module, trees):
    with pytest.raises(lt.InputError, match="'3.bias' does not fit"):
        load_weights({**module.state_dict(), "3.bias": torch.zeros(3)}, *trees)


@pytest.mark.parametrize("prefix", ["model.", "module.net."])
def test_a_prefix_is_found(prefix, module, trees):
    weights = {prefix + name: value for name, value in module.state_dict().items()}
    for source, (ps, st), fix in (
        (weights, trees, [(rf"^{prefix}".replace(".", "\\."), "")]),
        (module.state_dict(), from_torch(_nested(module, prefix))[1:], [("^", prefix)]),
    ):
        with pytest.raises(lt.KeyNameError) as caught:
            load_weights(source, ps, st)
        assert caught.value.fix == f"Pass rename=[(r'{fix[0][0]}', '{fix[0][1]}')]."
        assert load_weights(source, ps, st, rename=fix).report.complete


def _nested(module, prefix):
    for name in reversed(prefix.split(".")[:-1]):
        module = nn.ModuleDict({name: module})
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize("rename", [3, ["a"], "abc"])
def test_other_kinds_of_renaming_are_errors(rename, module, trees):
    with pytest.raises(lt.InputError, match="rename must be"):
        load_weights(module.state_dict(), *trees, rename=rename)


@pytest.mark.parametrize("source", [nn.Linear(2, 2), 3, None, torch.ones(1)])
def test_other_sources_are_errors(source, trees):
    with pytest.raises(lt.DTypeError, match="source must be a path"):
        load_weights(source, *trees)


# Files.


@pytest.mark.parametrize("save", [save_safetensors, save_torch, save_sharded])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_truncated_files_are_errors(save, part, module, trees, tmp_path):
    path = save(module, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(lt.InputError, match="cannot be read") as caught:
        load_weights(path, *trees)
    assert caught.value.where == str(path)


def test_a_truncated_or_lost_shard_is_named(module, trees, tmp_path):
    index = save_sharded(module, tmp_path)
    shard = tmp_path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(lt.InputError, match="cannot be read") as caught:
            load_weights(index, *trees)
        assert caught.value.where == str(shard)
        shard.unlink(missing_ok=True)


def test_a_shard_without_its_tensor_is_an_error(module, trees, tmp_path):
    index = save_sharded(module, tmp_path)
    text = json.loads(index.read_text())
    text["weight_map"]["3.bias"] = "model-0.safetensors"
    index.write_text(json.dumps(text))
    with pytest.raises(lt.InputError, match="'3.bias' must be in the file that the index names"):
        load_weights(index, *trees)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_other_json_is_an_error(text, trees, tmp_path):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(lt.InputError, match="must be an index"):
        load_weights(tmp_path / "model.json", *trees)


def test_nothing_in_a_file_is_run(module, trees, tmp_path):
    torch.save(module, tmp_path / "module.pt")
    with pytest.raises(lt.InputError, match="must hold tensors only"):
        load_weights(tmp_path / "module.pt", *trees)


def test_files_and_folders_without_weights_are_errors(trees, tmp_path):
    torch.save(torch.ones(1), tmp_path / "tensor.pt")
    with pytest.raises(lt.InputError, match="must hold a state_dict"):
        load_weights(tmp_path / "tensor.pt", *trees)
    with pytest.raises(lt.InputError, match="cannot be read"):
        load_weights(tmp_path / "nothing.safetensors", *trees)
    (tmp_path / "empty").mkdir()
    with pytest.raises(lt.InputError, match="must hold a file of weights"):
        load_weights(tmp_path / "empty", *trees)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(lt.InputError, match="several files"):
        load_weights(tmp_path, *trees)
