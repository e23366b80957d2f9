"""What is saved is what is loaded, bit for bit; what does not fit is named."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.torch
import torch
import torchopt
from hypothesis import given
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.training import CheckpointError, _checkpoint_format, load_checkpoint, save_checkpoint

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex128, torch.complex64),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, row by row; NaNs compare too."""
    flat = tensor.detach().cpu().resolve_conj().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def assert_same(a: Any, b: Any) -> None:
    """Assert that two trees are equal bit for bit, whatever the order of their dicts."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.device, a.requires_grad) == (b.dtype, b.shape, b.device, b.requires_grad)
        assert bits(a) == bits(b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, lt.ComponentVector):
        assert a.axes == b.axes
        assert_same(a.flat, b.flat)
    elif isinstance(a, optim.OptState):
        assert a.layout == b.layout
        assert_same(a.state, b.state)
    else:
        assert repr(a) == repr(b)  # NaN is not equal to itself


def blank(tree: Any) -> Any:
    """Return a tree of the same structure with nothing of its values, and its dicts backwards."""
    if isinstance(tree, dict):
        return {name: blank(tree[name]) for name in reversed(tree)}
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        return type(tree)(map(blank, tree))
    if isinstance(tree, lt.Static):
        return lt.Static(not tree.value) if isinstance(tree.value, bool) else tree
    if isinstance(tree, Tensor):
        return torch.zeros_like(tree)
    if tree is None or isinstance(tree, (bool, int, float, str, complex)):
        return tree if tree is None else type(tree)()
    return torch.utils._pytree.tree_map(blank, tree)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    """Return a tensor of random bits."""
    double = tuple(2 * size for size in shape) if layout == "sliced" else shape
    count = torch.Size(double).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    tensor = data.to(torch.uint8).view(dtype).reshape(double)
    if layout == "sliced":
        return tensor[tuple(slice(None, None, 2) for _ in shape)]
    return tensor.permute(tuple(reversed(range(tensor.dim())))) if layout == "permuted" else tensor


tensors = st.builds(
    tensor_of,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["rows", "permuted", "sliced"]),
    st.integers(0, 2**32),
)
values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.complex_numbers())
statics = st.builds(lt.Static, st.one_of(st.booleans(), st.integers(), st.text(), st.tuples(st.text(), st.none())))
names = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), max_size=5)
trees = st.recursive(
    st.one_of(tensors, tensors, values, statics),
    lambda inner: st.one_of(
        st.dictionaries(names, inner, max_size=4), st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.mktemp("tree")
    save_checkpoint(folder / "a", tree)
    loaded = load_checkpoint(folder / "a", blank(tree))
    assert_same(loaded, tree)
    # The same tree makes the same file.
    save_checkpoint(folder / "b", load_checkpoint(folder / "a", tree))
    assert (folder / "b").read_bytes() == (folder / "a").read_bytes()


@given(st.dictionaries(names.filter(bool), tensors, max_size=5))
def test_safetensors_reads_the_file(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Tensor]) -> None:
    path = tmp_path_factory.mktemp("tree") / "a.safetensors"
    save_checkpoint(path, tree)
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == tree.keys()
    for name, tensor in tree.items():
        assert bits(theirs[name]) == bits(tensor)
        if tensor.dtype != torch.complex128:  # pairs of real numbers, for want of a dtype
            assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape)


def training_tree(key: Tensor, make: Callable[[Any], Any] = lambda ps: ps) -> dict[str, Any]:
    """Return what a run has after two steps."""
    model = lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4), lt.Dropout(0.5), lt.Dense(4, 2))
    ps, st = lt.setup(key, model)
    ps = make(ps)
    opt_state = optim.setup(optim.Adam(0.1), ps)
    for _ in range(2):
        _, st = model(torch.ones(5, 3), ps, st)
        opt_state, ps = optim.update(opt_state, ps, lt.core.tree_map(torch.cos, ps))
    return {"ps": ps, "st": st, "opt": opt_state, "key": key, "step": torch.tensor(2), "epoch": 1, "run": "first"}


@pytest.mark.parametrize("make", [lambda ps: ps, lt.ComponentVector], ids=["dict", "vector"])
def test_a_whole_training_state_comes_back(make_key: Callable[[], Tensor], file: Path, make: Any) -> None:
    tree = training_tree(make_key(), make)
    save_checkpoint(file, tree)
    assert_same(load_checkpoint(file, training_tree(make_key(), make)), tree)


def test_mode_comes_from_the_file(make_key: Callable[[], Tensor], file: Path) -> None:
    _, st = lt.setup(make_key(), lt.Chain(lt.Dropout(0.5), lt.BatchNorm(2)))
    save_checkpoint(file, lt.test_mode(st))
    loaded = load_checkpoint(file, st)
    assert loaded["layer_1"]["training"] == lt.Static(False)
    assert loaded["layer_2"]["training"] == lt.Static(False)


def test_static_that_is_no_flag_is_structure(file: Path) -> None:
    save_checkpoint(file, {"f": lt.Static(torch.tanh), "names": lt.Static(("a", "b"))})
    loaded = load_checkpoint(file, {"f": lt.Static(torch.tanh), "names": lt.Static(("a", "b"))})
    assert loaded == {"f": lt.Static(torch.tanh), "names": lt.Static(("a", "b"))}
    text = refused(file, {"f": lt.Static(torch.sin), "names": lt.Static(("a", "c"))})
    assert "'f' is Static(<built-in method tanh of type object>) in the file and Static(<built-in method sin" in text
    assert "'names' is Static(('a', 'b')) in the file and Static(('a', 'c')) in the tree." in text
    assert "'f' is Static(<built-in" in refused(file, {"f": lt.Static(True), "names": lt.Static(("a", "b"))})


def test_tied_tensors_stay_tied(file: Path) -> None:
    weight = torch.ones(1000)
    save_checkpoint(file, {"encoder": weight, "decoder": [weight], "other": torch.ones(1000)})
    assert file.stat().st_size < 2 * 4000 + 2000
    loaded = load_checkpoint(file, {"encoder": torch.zeros(1000), "decoder": [torch.zeros(1000)], "other": weight})
    assert loaded["encoder"] is loaded["decoder"][0]
    assert loaded["encoder"] is not loaded["other"]


def test_layout_in_memory_comes_back(file: Path, rng: torch.Generator) -> None:
    image = torch.randn(2, 3, 4, 5, generator=rng)
    tree = {
        "channels_last": image.to(memory_format=torch.channels_last),
        "transposed": image[0, 0].t(),
        "conjugate": torch.complex(image, image).conj(),
        "expanded": image[:1, :1, :1, :1].expand(2, 1, 1, 3),
    }
    save_checkpoint(file, tree)
    loaded = load_checkpoint(file, blank(tree))
    assert_same(loaded, tree)
    assert loaded["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert loaded["transposed"].stride() == tree["transposed"].stride()
    assert loaded["expanded"].untyped_storage().nbytes() == 2 * 3 * 4


def test_tensors_go_where_like_is(file: Path, device: torch.device) -> None:
    weight = torch.arange(3.0, device=device)
    save_checkpoint(file, {"a": weight, "b": weight.double().cpu()})
    like = {"a": torch.zeros(3, device=device), "b": torch.zeros(3, dtype=torch.float64, device="meta")}
    assert_same(load_checkpoint(file, like), {"a": weight, "b": weight.double().cpu()})


def test_requires_grad_is_that_of_like(file: Path) -> None:
    save_checkpoint(file, {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(2)})
    loaded = load_checkpoint(file, {"a": torch.zeros(2), "b": torch.zeros(2, requires_grad=True)})
    assert [loaded[name].requires_grad for name in "ab"] == [False, True]


def test_loaded_tensors_do_not_change_with_the_file(file: Path) -> None:
    save_checkpoint(file, {"a": torch.ones(1000)})
    loaded = load_checkpoint(file, {"a": torch.zeros(1000)})
    file.write_bytes(bytes(file.stat().st_size))
    assert bool((loaded["a"] == 1).all())


def test_neither_tree_is_changed(file: Path) -> None:
    tree, like = {"a": torch.ones(2), "b": lt.Static(True)}, {"a": torch.zeros(2), "b": lt.Static(False)}
    save_checkpoint(file, tree)
    load_checkpoint(file, like)
    assert_same(tree, {"a": torch.ones(2), "b": lt.Static(True)})
    assert_same(like, {"a": torch.zeros(2), "b": lt.Static(False)})


# What does not fit.


def refused(file: Path, like: Any) -> str:
    with pytest.raises((lt.InputError, lt.KeyNameError)) as caught:
        load_checkpoint(file, like)
    return str(caught.value)


def test_all_differences_are_listed(file: Path) -> None:
    a = {
        "weight": torch.zeros(2, 3),
        "bias": torch.zeros(2),
        "scale": torch.zeros(1),
        "epoch": 1,
        "old": lt.Static(True),
    }
    b = {"wieght": torch.zeros(2, 3), "bias": torch.zeros(3), "scale": torch.zeros(1).half(), "epoch": 1.0, "new": "x"}
    save_checkpoint(file, {"layer": a})
    text = refused(file, {"layer": b})
    assert text == (
        f"{file}: The checkpoint and the tree must have the same names, shapes, dtypes and structure.\n"
        "  got:      'layer.bias' is float32 of shape (2,) in the file and float32 of shape (3,) in the tree.\n"
        "            'layer.scale' is float32 of shape (1,) in the file and float16 of shape (1,) in the tree.\n"
        "            'layer.epoch' is a Python int in the file and a Python float in the tree.\n"
        "            'layer.wieght' is not in the file; in the tree it is float32 of shape (2, 3).\n"
        "            'layer.new' is not in the file; in the tree it is a Python str.\n"
        "            'layer.weight' is only in the file, as float32 of shape (2, 3). Did you mean 'layer.wieght'?\n"
        "            'layer.old' is only in the file, as a flag.\n"
        "  fix:      Make the tree from the same model, in the same precision and with the same optimizer, "
        "frozen alike."
    )


def test_differing_names_and_differing_shapes_are_two_errors(file: Path) -> None:
    save_checkpoint(file, {"a": torch.zeros(2)})
    with pytest.raises(lt.KeyNameError, match="'b' is not in the file"):
        load_checkpoint(file, {"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(lt.InputError, match=r"'a' is float32 of shape \(2,\) in the file and None"):
        load_checkpoint(file, {"a": None})


def test_components_are_compared_by_name_and_order(file: Path) -> None:
    a, b = torch.zeros(2), torch.ones(2)
    save_checkpoint(file, {"ps": lt.ComponentVector({"a": a, "b": b})})
    text = refused(file, {"ps": lt.ComponentVector({"b": b, "a": a})})
    assert "got:      'order of ps.flat' is a, b in the file and b, a in the tree.\n  fix" in text
    text = refused(file, {"ps": lt.ComponentVector({"a": a, "b": b[:, None]})})
    assert (
        "'ps.flat[b]' is a component of shape (2,) in the file and a component of shape (2, 1) in the tree.\n" in text
    )
    text = refused(file, {"ps": lt.ComponentVector({"a": a, "c": b})})
    assert "'ps.flat[c]' is not in the file; in the tree it is a component of shape (2,)." in text


PS = {"a": torch.zeros(2), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    ("saved", "like", "words"),
    [
        (optim.setup(optim.Momentum(), PS), optim.setup(optim.Nesterov(), PS), "Momentum in the file and Nesterov"),
        (
            optim.setup(torchopt.chain(torchopt.clip_grad_norm(1.0), optim.Momentum()), PS),
            optim.setup(torchopt.chain(torchopt.clip_grad_norm(1.0), optim.Nesterov()), PS),
            r"'opt.rule' is chain\(.*, Momentum\) in the file and chain\(.*, Nesterov\)",
        ),
        (optim.freeze(optim.setup(optim.Adam(), PS), "b"), optim.setup(optim.Adam(), PS), "'opt.frozen' is b in"),
        (optim.setup(optim.Adam(), PS), optim.setup(optim.AdamW(), PS), r"'opt.0.hyper' is float64 of shape \(4,\)"),
        (
            optim.setup(optim.Adam(), lt.ComponentVector(PS)),
            optim.setup(optim.Adam(), lt.ComponentVector(dict(reversed(PS.items())))),
            "'order of opt.vectors.flat' is a, b in the file and b, a in",
        ),
    ],
)
def test_optimizers_must_be_alike(file: Path, saved: Any, like: Any, words: str) -> None:
    save_checkpoint(file, {"opt": saved})
    with pytest.raises(lt.LuxtorchError, match=words):
        load_checkpoint(file, {"opt": like})


# What cannot be saved.


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (b"bytes", "bytes"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
        (torch.sin, "builtin"),
    ],
)
def test_leaves_that_no_file_can_hold(file: Path, leaf: Any, words: str) -> None:
    with pytest.raises(lt.DTypeError, match=f"'layer.leaf'(.|\n)*{words}"):
        save_checkpoint(file, {"layer": {"leaf": leaf}})
    assert not file.exists()


def test_names_must_be_unique(file: Path) -> None:
    with pytest.raises(lt.KeyNameError, match=r"two leaves of the name 'a\.b'"):
        save_checkpoint(file, {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)})
    with pytest.raises(lt.KeyNameError, match="must not have a leaf of the name '__metadata__'"):
        save_checkpoint(file, {"__metadata__": torch.zeros(1)})


def test_not_within_a_transform(file: Path) -> None:
    def loss(x: Tensor) -> Tensor:
        save_checkpoint(file, {"x": x})
        return x

    with pytest.raises(lt.InputError, match="inside a transform"):
        torch.func.grad(loss)(torch.ones(()))


# The file.


def test_a_failing_write_leaves_the_old_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(file, {"a": torch.ones(3)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint_format.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(file, {"a": torch.zeros(3)})
    assert os.listdir(file.parent) == [file.name]
    assert_same(load_checkpoint(file, {"a": torch.zeros(3)}), {"a": torch.ones(3)})


def test_missing_folders_and_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written(.|\n)*FileNotFoundError"):
        save_checkpoint(tmp_path / "none" / "a", {})
    with pytest.raises(CheckpointError, match="cannot be read(.|\n)*FileNotFoundError"):
        load_checkpoint(tmp_path / "a", {})
    with pytest.raises(CheckpointError, match="cannot be read(.|\n)*IsADirectoryError"):
        load_checkpoint(tmp_path, {})


def test_order_of_a_save(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the file is on the disk before it gets its name, and the name is on the disk before the save returns."""
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else f"file of {status.st_size} bytes")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        assert Path(source).parent == Path(target).parent
        replace(source, target)

    monkeypatch.setattr(_checkpoint_format.os, "fsync", noted_fsync)
    monkeypatch.setattr(_checkpoint_format.os, "replace", noted_replace)
    save_checkpoint(file, {"a": torch.ones(3)})
    assert events == [f"file of {file.stat().st_size} bytes", f"rename to {file.name}", "folder"]


def test_file_is_plain_data(file: Path) -> None:
    save_checkpoint(file, {"ps": {"weight": torch.ones(2, 3)}, "st": {"training": lt.Static(True)}})
    with safetensors.safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["luxtorch"])
    leaf = described["leaves"]["ps.weight"]
    assert described["format"] == 1
    assert (leaf["dtype"], leaf["shape"]) == ("float32", [2, 3])
    assert described["flags"] == {"st.training": True}


def test_nothing_is_pickled(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    save_checkpoint(file, {"a": torch.ones(2), "b": "x"})
    load_checkpoint(file, {"a": torch.zeros(2), "b": ""})
    assert b"pickle" not in file.read_bytes()


def test_memory_is_not_doubled(file: Path) -> None:
    """Saving needs no memory of the size of the tree, and loading needs it once: 64 MiB here."""
    code = (
        "import resource, sys, torch\n"
        "from luxtorch.training._checkpoint import load_checkpoint, save_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "save_checkpoint(sys.argv[1], {'a': torch.ones(2)})\n"
        "tree = {str(i): torch.ones(2**22) for i in range(4)}\n"
        "start = peak()\n"
        "save_checkpoint(sys.argv[1], tree)\n"
        "saved = peak()\n"
        "loaded = load_checkpoint(sys.argv[1], {name: torch.empty(2**22, device='meta') for name in tree})\n"
        "print(saved - start, peak() - saved)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, file], check=True, timeout=120, capture_output=True, text=True)
    saving, loading = map(int, out.stdout.split())
    assert saving < 16
    assert loading < 64 + 16


# A run.


@pytest.mark.parametrize("frozen", [None, "layer_1"])
def test_a_resumed_run_ends_like_one_that_went_on(
    file: Path, new: Any, objective: Any, data: Any, tree: Any, frozen: str | None
) -> None:
    def start() -> training.TrainState:
        ts = new(tree, dtype=torch.float32)
        return ts if frozen is None else ts.replace(optimizer_state=optim.freeze(ts.optimizer_state, frozen))

    def steps(ts: training.TrainState) -> training.TrainState:
        for _ in range(3):
            *_, ts = training.single_train_step(objective, tuple(part.float() for part in data), ts)
        return ts

    half = steps(start()).adjust(lr=0.01)
    save_checkpoint(file, half)
    save_checkpoint(file.with_name("went on"), steps(half))
    save_checkpoint(file.with_name("resumed"), steps(load_checkpoint(file, start())))
    assert file.with_name("resumed").read_bytes() == file.with_name("went on").read_bytes()
    assert int(load_checkpoint(file.with_name("resumed"), start()).step) == 6
