"""Loggers keep what they are given; a run that was stopped leaves the same as one that was not."""

from __future__ import annotations

import csv
import random
import sys
import time
from collections.abc import Callable
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import hypothesis.strategies as some
import pytest
import torch
from hypothesis import given
from torch import Tensor

from luxtorch.core import InputError, KeyNameError, LuxtorchError
from luxtorch.training import CSVLogger, Logger, TensorBoardLogger, _loggers


class Keeping(Logger):
    """Keeps metrics in a list."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, dict[str, int | float]]] = []
        self.closed = False

    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        self.kept.append((step, numbers))

    def close(self) -> None:
        self.closed = True


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a folder as TensorBoard does."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


# What all loggers have in common.


@pytest.mark.parametrize("step", [3, torch.tensor(3), torch.tensor(3.0), 3.0])
@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1),
        (0.1, 0.1),
        (True, 1),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.1), float(torch.tensor(0.1))),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(2**40 + 1), 2**40 + 1),
        (torch.tensor(True), 1),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, requires_grad=True) * 1, 0.5),
        (torch.tensor(inf), inf),
        (-inf, -inf),
    ],
)
def test_numbers_and_tensors_are_taken(step: Any, value: Any, number: float) -> None:
    logger = Keeping()
    logger.log(step, {"loss": value, "test": {"a": {"b": value}}})
    assert logger.kept == [(3, {"loss": number, "test/a/b": number})]
    assert type(logger.kept[0][0]) is int and type(logger.kept[0][1]["loss"]) is type(number)


def test_numbers_of_numpy_are_taken() -> None:
    np = pytest.importorskip("numpy")
    logger = Keeping()
    logger.log(np.int64(1), {"a": np.float32(0.5), "b": np.float64(0.1), "c": np.int16(3)})
    assert logger.kept == [(1, {"a": 0.5, "b": 0.1, "c": 3})]
    assert [type(number) for number in logger.kept[0][1].values()] == [float, float, int]


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(1), torch.tensor(1j), 1j, None, [1.0], "low", object()])
@pytest.mark.parametrize(
    ("metrics", "name"), [(lambda v: {"a": 1, "loss": v}, "loss"), (lambda v: {"t": {"x": v}}, "t/x")]
)
def test_what_is_no_number_is_refused_by_name(value: Any, metrics: Callable, name: str) -> None:
    logger = Keeping()
    with pytest.raises(InputError, match=f"The metric '{name}' must be a real number") as error:
        logger.log(1, metrics(value))
    assert (str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)) in error.value.got
    assert logger.kept == []


@pytest.mark.parametrize("step", [-1, 0.5, torch.tensor(-1)])
def test_steps_are_counted(step: Any) -> None:
    with pytest.raises(InputError, match="step must be an integer of at least 0"):
        Keeping().log(step, {"loss": 1.0})


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(KeyNameError, match="'a/b'"):
        Keeping().log(1, {"a": {"b": 1.0}, "a/b": 2.0})


def test_nothing_to_log_is_nothing() -> None:
    logger = Keeping()
    logger.log(1, {})
    logger.log(1, {"test": {}})
    assert logger.kept == []


def test_a_logger_closes_itself() -> None:
    with pytest.raises(ZeroDivisionError), Keeping() as logger:
        raise ZeroDivisionError
    assert logger.closed


def test_metrics_are_not_changed() -> None:
    inner, loss = {"accuracy": 0.5}, torch.tensor(1.0)
    metrics = {"loss": loss, "test": inner}
    Keeping().log(1, metrics)
    assert metrics == {"loss": loss, "test": {"accuracy": 0.5}} and metrics["test"] is inner


# CSV.


def test_csv_as_text(tmp_path: Path) -> None:
    with CSVLogger(tmp_path / "new" / "folder" / "metrics.csv") as logger:
        logger.log(0, {"loss": 0.1, "n": 3, "a,b": 1.0, 'say "hi"': 2})
        assert logger.path.read_bytes() == b'step,loss,n,"a,b","say ""hi"""\n0,0.1,3,1.0,2\n'
        logger.log(10, {"n": torch.tensor(nan), "loss": torch.tensor(-inf)})  # another order, and not all of them
        assert logger.path.read_bytes().splitlines()[2:] == [b"10,-inf,nan,,"]  # each row at once


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [nan, inf, -inf, 0.1, 1e-300, -0.0, 1 / 3])
def test_csv_keeps_every_bit(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    CSVLogger(tmp_path / "m.csv").log(1, {"x": torch.tensor(value, dtype=dtype)})
    back = torch.tensor(float(table(tmp_path / "m.csv")[0]["x"]), dtype=dtype)
    torch.testing.assert_close(back, torch.tensor(value, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_csv_one_row_for_a_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "m.csv")
    for step in (1, 2, 3):
        logger.log(step, {"loss": step / 10})
        if step > 1:
            logger.log(step, {"accuracy": 1.0})
            logger.log(step, {"loss": 5})  # shorter than what was there
    assert logger.path.read_text() == "step,loss,accuracy\n1,0.1,\n2,5,1.0\n3,5,1.0\n"


def test_csv_a_new_name_is_a_new_column(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "m.csv")
    logger.log(1, {"loss": 1})
    logger.log(2, {"loss": 2, "test": {"b": 3, "a": 4}})
    logger.log(3, {"loss": 5})
    assert logger.path.read_text() == "step,loss,test/b,test/a\n1,1,,\n2,2,3,4\n3,5,,\n"


def test_csv_no_metric_is_called_step(tmp_path: Path) -> None:
    with pytest.raises(KeyNameError, match="A metric must not be called 'step'"):
        CSVLogger(tmp_path / "m.csv").log(1, {"step": 1})
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    "text",
    ["a note", "a note\n", "time,loss\n1,2\n", "step,loss\n1\n", "step,loss\nx,1\n", "\x00\xff", "step,a\n\n1,2\n"],
)
def test_csv_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match="must be one that a CSVLogger has written") as error:
        CSVLogger(path).log(1, {"loss": 1.0})
    assert str(path) in str(error.value) and path.read_bytes() == text.encode("latin1")


def test_csv_is_whole_if_a_rewrite_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger(tmp_path / "m.csv")
    logger.log(1, {"loss": 1})
    before = logger.path.read_bytes()
    monkeypatch.setattr(_loggers, "_line", lambda cells: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logger.log(2, {"accuracy": 1})
    assert logger.path.read_bytes() == before and [*tmp_path.iterdir()] == [logger.path]
    monkeypatch.undo()
    logger.log(2, {"accuracy": 1})
    assert logger.path.read_text() == "step,loss,accuracy\n1,1,\n2,,1\n"


# A run logs these at each step: all, some, several calls, and a name that comes late.
def calls(step: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if step % 2 == 0:
        found.append({"loss": 1 / (step + 1)})
    if step in (4, 8):
        found.append({"test": {"accuracy": step * 1.5}})
    if step == 6:
        found.append({"late": nan, "loss": 7})
    return found


def train(logger: Logger, start: int, until: int) -> None:
    for step in range(start, until):
        for metrics in calls(step):
            logger.log(step, metrics)


@pytest.mark.parametrize("saved", range(11))
@pytest.mark.parametrize("killed", range(1, 12))
def test_csv_of_a_resumed_run_is_that_of_a_whole_one(tmp_path: Path, killed: int, saved: int) -> None:
    train(CSVLogger(tmp_path / "whole.csv"), 0, 11)
    train(CSVLogger(tmp_path / "resumed.csv"), 0, killed)
    train(CSVLogger(tmp_path / "resumed.csv"), min(saved, killed), 11)
    assert (tmp_path / "resumed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("saved", range(10))
def test_csv_of_a_resumed_run_that_ends_earlier(tmp_path: Path, saved: int) -> None:
    until = saved + 1 + saved % 2  # after the first step that logs
    train(CSVLogger(tmp_path / "whole.csv"), 0, until)
    train(CSVLogger(tmp_path / "resumed.csv"), 0, 11)
    train(CSVLogger(tmp_path / "resumed.csv"), saved, until)
    assert (tmp_path / "resumed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("back", range(11))
def test_csv_of_a_run_that_goes_back_is_that_of_a_whole_one(tmp_path: Path, back: int) -> None:
    train(CSVLogger(tmp_path / "whole.csv"), 0, 11)
    logger = CSVLogger(tmp_path / "back.csv")
    train(logger, 0, 11)
    train(logger, back, 11)
    assert (tmp_path / "back.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_csv_of_a_run_cut_within_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    train(CSVLogger(path), 0, 11)
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        train(CSVLogger(path), 9, 11)  # the steps after the last row that is whole
        assert path.read_bytes() == whole


@given(some.lists(some.tuples(some.integers(0, 6), some.sampled_from("abc")), max_size=12), some.randoms())
def test_csv_holds_the_last_word_on_each_step(
    tmp_path_factory: pytest.TempPathFactory, log: list[tuple[int, str]], draw: random.Random
) -> None:
    path = tmp_path_factory.mktemp("run") / "m.csv"
    logger, expected, last = CSVLogger(path), dict[int, dict[str, str]](), -1
    for number, (step, name) in enumerate(log):
        if draw.random() < 0.3:
            logger, last = CSVLogger(path), -1  # as in a new process
        expected = {s: row for s, row in expected.items() if s < step or s == step == last}
        expected.setdefault(step, {})[name] = str(number)
        logger.log(step, {name: number})
        last = step
        rows = {int(row.pop("step")): {k: v for k, v in row.items() if v} for row in table(path)}
        assert rows == expected and list(rows) == sorted(rows)


# TensorBoard.


def test_tensorboard_sees_a_run_that_was_not_closed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2):
        logger.log(step, {"loss": 0.5})
        deadline = time.monotonic() + 30
        while len(scalars(tmp_path).get("loss", [])) < step and time.monotonic() < deadline:
            time.sleep(0.05)
        assert scalars(tmp_path)["loss"][-1] == (step, 0.5)
    logger.close()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoardLogger(tmp_path / "run") as logger:
        logger.log(torch.tensor(1), {"loss": torch.tensor(0.5), "test": {"accuracy": 0.25}, "n": 3})
        logger.log(2, {"loss": torch.tensor(0.1, dtype=torch.float64)})
    single = float(torch.tensor(0.1))
    assert scalars(tmp_path / "run") == {
        "loss": [(1, 0.5), (2, single)],
        "test/accuracy": [(1, 0.25)],
        "n": [(1, 3.0)],
    }


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("tensor", [True, False])
def test_tensorboard_keeps_what_is_not_finite(tmp_path: Path, value: float, tensor: bool) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoardLogger(tmp_path) as logger:
        logger.log(1, {"loss": torch.tensor(value) if tensor else value})
    ((_, back),) = scalars(tmp_path)["loss"]
    assert back == value or (isnan(back) and isnan(value))


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize("back", [0, 5, 12])
def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path, back: int, resumed: bool) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoardLogger(tmp_path / "whole") as logger:
        train(logger, 0, 14)
    logger = TensorBoardLogger(tmp_path / "resumed")
    train(logger, 0, back)
    for step in range(back + back % 2, 15, 2):
        logger.log(step, {"loss": 100.0, "other": 1.0})
    time.sleep(1 - time.time() % 1)  # TensorBoard tells files apart by the second
    if resumed:
        logger.close()
        logger = TensorBoardLogger(tmp_path / "resumed")
    train(logger, back, 14)
    logger.close()
    resumed_run, whole = scalars(tmp_path / "resumed"), scalars(tmp_path / "whole")
    assert not resumed_run.pop("other", None)
    assert str(resumed_run) == str(whole)  # NaN among them


def test_tensorboard_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LuxtorchError, match="TensorBoard must be installed") as error:
        TensorBoardLogger(tmp_path)
    assert "luxtorch[tensorboard]" in str(error.value)
