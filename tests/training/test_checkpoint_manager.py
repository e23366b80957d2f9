"""A manager keeps the checkpoints that it was asked to keep, and knows nothing that is not in its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import luxtorch as lt
from luxtorch.training import CheckpointError, CheckpointManager, _checkpoint_format

LIKE = {"weight": torch.zeros(2)}


def tree(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2,), float(value))}


def value(loaded: dict[str, Any]) -> float:
    return float(loaded["weight"][0])


@given(
    mode=st.sampled_from(["min", "max"]),
    keep_last=st.sampled_from([1, 2, 3, None]),
    keep_best=st.integers(0, 2),
    metrics=st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float), st.just(float("nan"))), max_size=8),
)
def test_last_and_best_are_kept(
    tmp_path_factory: pytest.TempPathFactory, mode: Any, keep_last: int | None, keep_best: int, metrics: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    sign = 1 if mode == "min" else -1
    kept: list[int] = []
    for step, metric in enumerate(metrics):
        # A new manager each time: whatever it must know is in the folder.
        CheckpointManager(folder, keep_last=keep_last, keep_best=keep_best, mode=mode).save(step, tree(step), metric)
        kept.append(step)
        judged = [s for s in kept if metrics[s] is not None and metrics[s] == metrics[s]]
        best = sorted(judged, key=lambda s: (sign * metrics[s], -s))
        kept = [s for s in kept if keep_last is None or s in kept[-keep_last:] or s in best[:keep_best]]
    manager = CheckpointManager(folder, keep_last=keep_last, keep_best=keep_best, mode=mode)
    assert manager.steps() == kept
    assert [value(manager.restore(LIKE, step)) for step in kept] == kept
    judged = [s for s in kept if metrics[s] is not None and metrics[s] == metrics[s]]
    best_step = min(judged, key=lambda s: (sign * metrics[s], -s), default=None)
    assert manager.best_step() == best_step
    if kept:
        assert value(manager.restore(LIKE)) == kept[-1]
    if best_step is not None:
        assert value(manager.restore(LIKE, "best")) == best_step


def test_steps_and_metrics_may_be_tensors(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(torch.tensor(3), tree(3), torch.tensor(0.5))
    manager.save(torch.tensor(4.0), tree(4), metric=1)
    assert (manager.steps(), manager.best_step()) == ([3, 4], 3)
    for step in (-1, 4.5):
        with pytest.raises(lt.InputError, match="step must be an integer of at least 0"):
            manager.save(step, tree(0))  # type: ignore[arg-type]


def test_the_same_step_is_replaced_and_earlier_ones_are_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(5, tree(5))
    manager.save(5, tree(55))
    assert value(manager.restore(LIKE)) == 55
    with pytest.raises(lt.InputError, match="step must be at least 5(.|\n)*another folder"):
        manager.save(4, tree(4))
    assert manager.steps() == [5]


def test_what_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "none")
    assert (manager.steps(), manager.best_step()) == ([], None)
    for step in ("latest", "best", 3):
        with pytest.raises(CheckpointError, match="no such checkpoint(.|\n)*no checkpoints at all"):
            manager.restore(LIKE, step)  # type: ignore[arg-type]
    manager.save(1, tree(1))
    with pytest.raises(CheckpointError, match="one of the steps 1(.|\n)*got: *3"):
        manager.restore(LIKE, 3)
    with pytest.raises(CheckpointError, match="with a metric"):
        manager.restore(LIKE, "best")
    with pytest.raises(CheckpointError, match="got: *'newest'"):
        manager.restore(LIKE, "newest")  # type: ignore[arg-type]


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in ({"mode": "lowest"}, {"keep_last": 0}, {"keep_best": -1}):
        with pytest.raises(lt.InputError):
            CheckpointManager(tmp_path, **wrong)  # type: ignore[arg-type]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["notes.txt", "step_1.safetensors", "step_00000007.safetensors.bak", "step_by_step.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    manager = CheckpointManager(tmp_path, keep_last=1)
    for step in (1, 2):
        manager.save(step, tree(step))
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "step_00000002.safetensors"])


def test_left_overs_of_killed_runs_go_with_the_next_save(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, tree(1))
    left_over = tmp_path / "step_00000002.safetensors.0123abcd.tmp"
    left_over.write_bytes(b"half")
    assert value(manager.restore(LIKE)) == 1
    assert left_over.exists()  # to restore is to read: another run may be writing it
    manager.save(2, tree(2))
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.safetensors", "step_00000002.safetensors"]
    assert value(manager.restore(LIKE)) == 2


def test_a_failed_save_keeps_all_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, tree(1))

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(_checkpoint_format.os, "replace", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        manager.save(2, tree(2))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step_00000001.safetensors"]


def test_a_damaged_file_is_kept_and_does_not_end_the_run(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, tree(1), metric=0.0)
    manager.path(1).write_bytes(b"damaged")
    manager.save(2, tree(2), metric=1.0)
    assert manager.steps() == [1, 2]
    assert value(manager.restore(LIKE)) == 2
    with pytest.raises(CheckpointError, match="00000001"):
        manager.restore(LIKE, "best")


def test_a_manager_is_a_value(tmp_path: Path) -> None:
    assert CheckpointManager(str(tmp_path)) == CheckpointManager(tmp_path)
    assert hash(CheckpointManager(tmp_path)) == hash(CheckpointManager(tmp_path))
