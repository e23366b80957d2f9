"""Files from when the weight of a normalization was called `scale`, and batches were not counted, are loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_structure

import luxtorch as lt
from luxtorch import distributed, optim, training
from luxtorch.core import tree_leaves, tree_map
from luxtorch.training import _checkpoint, load_checkpoint, save_checkpoint


@lt.compact(inner=lt.Dense(4, 4), scale=torch.ones(4), weight=torch.zeros(4))
def own(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) * m.scale + m.weight


MODEL = lt.Chain(lt.Dense(2, 4), lt.BatchNorm(4, "tanh"), own, lt.LayerNorm(4), lt.Dense(4, 1))
NORMS = "layer_[24]"

RULES: dict[str, Any] = {
    "Adam": optim.Adam(0.1),
    "Momentum in a chain": optim.OptimiserChain(optim.ClipNorm(1.0), optim.Momentum(0.1)),
    "groups": optim.Groups({"layer_4": optim.AdamW(0.1)}, optim.Momentum(0.1)),
    "MixedPrecision": optim.MixedPrecision(optim.Adam(0.1)),
}
HOLDERS: dict[str, Callable[[Any], Any]] = {"dicts": dict, "vector": lt.ComponentVector}


@pytest.fixture
def former(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Any], None]:
    """Return a function that saves a tree as it was saved formerly."""

    def name(text: str) -> str:
        return re.sub(rf"({NORMS}\.)weight", r"\1scale", text)

    def contents_of(*args: Any) -> Any:
        contents, tensors = now(*args)
        kept = [(key, tensor) for key, tensor in zip(contents.tensors, tensors, strict=True) if "tracked" not in key]
        contents = replace(
            contents,
            tensors={name(key): contents.tensors[key] for key, _ in kept},
            same={name(key): name(other) for key, other in contents.same.items()},
            structure={name(key): name(text) for key, text in contents.structure.items()},
        )
        assert any("scale" in key for key in contents.tensors) or any("scale" in key for key in contents.structure)
        return contents, [tensor for _, tensor in kept]

    def save(path: Path, tree: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(_checkpoint, "contents_of", contents_of)
            save_checkpoint(path, tree)

    now = _checkpoint.contents_of
    return save


def trained(key: Tensor, rule: Any, holder: Callable[[Any], Any]) -> training.TrainState:
    ps, st = lt.setup(key, MODEL)
    ts = training.TrainState(MODEL, holder(ps), st, rule)
    x = lt.random.normal(key, (8, 2))
    for _ in range(2):
        ts = training.single_train_step(lt.MSELoss(), (x, x[:, :1]), ts)[-1]
    return ts


def with_counts(tree: Any, count: int) -> Any:
    """Return a state in which so many batches were counted."""
    return lt.update_state(tree, "num_batches_tracked", torch.tensor(count))


def assert_same(a: Any, b: Any) -> None:
    """Assert that two trees are equal bit for bit."""
    assert tree_structure(a) == tree_structure(b)
    torch.testing.assert_close(tree_leaves(a), tree_leaves(b), rtol=0, atol=0)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_former_train_state_goes_on_as_it_would_have(make_key, tmp_path, former, rule, holder):
    ts = trained(make_key(), RULES[rule], HOLDERS[holder])
    former(tmp_path / "run", ts)
    ps, st = lt.setup(1, MODEL)
    like = training.TrainState(MODEL, HOLDERS[holder](ps), st, RULES[rule])
    again = load_checkpoint(tmp_path / "run", like)
    assert int(again.states["layer_2"]["num_batches_tracked"]) == 0
    x = lt.random.normal(make_key(), (8, 2))
    runs = [ts.replace(states=with_counts(ts.states, 0)), again]
    for _ in range(2):
        steps = [training.single_train_step(lt.MSELoss(), (x, x[:, :1]), one) for one in runs]
        runs = [step[-1] for step in steps]
    assert_same(*runs)


def test_what_is_frozen_or_stands_twice_is_found(make_key, tmp_path, former):
    ps, st = lt.setup(make_key(), MODEL)
    model, ps, st = lt.freeze(MODEL, ps, st, "layer_4", "layer_1")
    opt_state = optim.freeze(optim.setup(optim.Adam(), ps), "layer_2.weight")
    tree = {"ps": ps, "st": st, "again": {"layer_2": {"weight": ps["layer_2"]["weight"]}}, "opt": opt_state}
    former(tmp_path / "run", tree)
    again = load_checkpoint(
        tmp_path / "run", tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, tree)
    )
    assert again["again"]["layer_2"]["weight"] is again["ps"]["layer_2"]["weight"]
    assert_same(again, tree)


def test_the_devices_and_the_stack_of_like_hold(make_key, tmp_path, former):
    layer = lt.Ensemble(lt.Chain(lt.Dense(2, 3), lt.BatchNorm(3)), 5)
    _, st = lt.setup(make_key(), layer)
    former(tmp_path / "st", {"st": st, "layer_2": {"weight": torch.ones(2)}})
    like = lt.to_device({"st": st, "layer_2": {"weight": torch.ones(2)}}, "meta")
    count = load_checkpoint(tmp_path / "st", like)["st"]["layer_2"]["num_batches_tracked"]
    assert count.device.type == "cpu" and count.dtype == torch.int64 and count.tolist() == [0] * 5


ONES = torch.ones(2)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "both names": ({"scale": ONES, "weight": ONES}, {"weight": ONES}, "scale' is only in the file"),
    "a scale of its own": ({"scale": ONES}, {"scale": ONES, "weight": ONES}, "weight' is not in the file"),
    "the other way": ({"weight": ONES}, {"scale": ONES}, "weight' is only in the file"),
    "another shape": ({"scale": torch.ones(3)}, {"weight": ONES}, r"weight' is .* of shape \(3,\) in the file"),
    "a part of a name": ({"my_scale": ONES}, {"my_weight": ONES}, "my_scale' is only in the file"),
    "no statistics": ({"weight": ONES}, {"weight": ONES, "num_batches_tracked": ONES}, "tracked' is not in the file"),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", REFUSED)
def test_other_names_are_other_names(tmp_path, name, holder):
    held, wanted, words = REFUSED[name]
    make = HOLDERS[holder]
    save_checkpoint(tmp_path / "run", make({"n": held}))
    with pytest.raises((lt.KeyNameError, lt.InputError), match=words.replace("'", r"\]?'")):
        load_checkpoint(tmp_path / "run", make({"n": wanted}))


def test_the_order_in_a_vector_is_that_of_the_file(tmp_path):
    a, b = torch.zeros(2), torch.ones(2)
    save_checkpoint(tmp_path / "run", lt.ComponentVector({"scale": a, "weight": b}))
    with pytest.raises(lt.InputError, match="order of flat"):
        load_checkpoint(tmp_path / "run", lt.ComponentVector({"weight": b, "scale": a}))


def old(tree: Any) -> Any:
    """Return parameters or states by their former names."""
    if not isinstance(tree, dict):
        return tree
    norm = "bias" in tree and isinstance(tree.get("weight"), Tensor) and tree["weight"].ndim == 1
    names = {"weight": "scale"} if norm else {}
    return {names.get(name, name): old(value) for name, value in tree.items() if "tracked" not in name}


@pytest.mark.parametrize("holder", HOLDERS)
def test_former_folders_of_several_processes_are_loaded(make_key, tmp_path, holder):
    ps, st = lt.setup(make_key(), MODEL)
    like = {"ps": HOLDERS[holder](ps), "st": with_counts(st, 7)}
    held = {"ps": HOLDERS[holder](old(ps)), "st": old(st)}
    assert "scale" in held["ps"]["layer_2"] and "weight" in held["ps"]["layer_3"]
    distributed.save_checkpoint(tmp_path / "run", held)
    again = distributed.load_checkpoint(tmp_path / "run", like)
    assert_same(again, {"ps": like["ps"], "st": with_counts(st, 0)})
    with pytest.raises(lt.KeyNameError, match="'n.weight'|without 'scale'"):
        distributed.load_checkpoint(tmp_path / "run", {**like, "scale": torch.ones(1)})
