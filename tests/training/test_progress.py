"""The loop is the same with a bar and without; a tensor is read when the bar is drawn, and at no other time."""

from __future__ import annotations

import gc
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from luxtorch.core import InputError
from luxtorch.training import progress


@pytest.fixture(params=["tqdm", "no tqdm"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is tqdm: with and without, wherever it is installed."""
    if request.param == "tqdm":
        pytest.importorskip("tqdm")
        return True
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    return False


@pytest.fixture
def needs_tqdm() -> None:
    pytest.importorskip("tqdm")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The numbers read out of tensors so far."""
    reads: list[float] = []
    item = Tensor.item

    def counted(tensor: Tensor) -> Any:
        reads.append(item(tensor))
        return reads[-1]

    monkeypatch.setattr(Tensor, "item", counted)
    return reads


def drawn(screen: io.StringIO) -> list[str]:
    return [line for line in screen.getvalue().replace("\n", "\r").split("\r") if line.strip()]


@pytest.mark.parametrize("kind", [list, iter, lambda xs: (x for x in xs)], ids=["list", "iterator", "generator"])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("total", [None, 5])
def test_the_loop_is_the_same(installed: bool, kind: Any, n: int, total: int | None) -> None:
    screen = io.StringIO()
    bar = progress(kind(list(range(n))), total, file=screen, mininterval=0.0)
    seen = []
    for x in bar:
        seen.append(x)
        bar.show(loss=torch.tensor(float(x)), step=x)
    assert seen == list(range(n))
    assert bool(screen.getvalue()) == installed


@pytest.mark.parametrize("options", [{}, {"desc": "epoch 3", "leave": False, "initial": 2}])
def test_nothing_is_printed_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert list(progress([1, 2], **options)) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_the_length_is_that_of_what_is_gone_through(installed: bool) -> None:
    assert len(progress([1, 2])) == 2
    with pytest.raises(TypeError, match="no len"):
        len(progress(iter([1, 2])))


def test_each_time_there_is_a_new_bar(installed: bool) -> None:
    screen = io.StringIO()
    bar = progress([1, 2], file=screen, mininterval=0.0)
    for _ in range(2):
        for x in bar:
            bar.show(loss=x)
    assert sum(line.startswith("  0%") for line in drawn(screen)) == (2 if installed else 0)
    assert all("loss" not in line for line in drawn(screen) if line.startswith("  0%"))


@pytest.mark.usefixtures("needs_tqdm")
def test_the_bar_shows_metrics_rate_and_time_left() -> None:
    screen = io.StringIO()
    for i in (bar := progress(range(4), file=screen, mininterval=0.0, desc="epoch 3")):
        bar.show(
            loss=torch.tensor(1.0 / (i + 1), requires_grad=True),
            test={"accuracy": 0.123456},
            n=torch.tensor(12345678),
            bad=float("nan"),
            large=torch.tensor(float("inf")),
        )
    lines = drawn(screen)
    # The last one is drawn twice: after the step, and when the bar is closed.
    assert [line[:13] for line in lines] == [f"epoch 3: {percent:3d}%" for percent in (0, 25, 50, 75, 100, 100)]
    for i, line in enumerate(lines[1:5]):
        assert f"loss={1 / (i + 1):.4g}, test/accuracy=0.1235, n=12345678, bad=nan, large=inf]" in line
    assert "step/s" in lines[2] and "<00:00" in lines[2] and "2/4" in lines[2]


@pytest.mark.usefixtures("needs_tqdm")
def test_tensors_are_read_only_when_the_bar_is_drawn(reads: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    for i in (bar := progress(range(100), file=io.StringIO())):
        bar.show(loss=torch.tensor(float(i)))
        now += 0.1
    assert 15 <= len(reads) <= 25  # 10 s, twice a second; and at the end
    assert reads[-1] == 99 and reads == sorted(reads)


@pytest.mark.usefixtures("needs_tqdm")
def test_the_bar_keeps_up_when_steps_become_slow(reads: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    for i in (bar := progress(range(10_010), file=io.StringIO())):
        bar.show(loss=torch.tensor(float(i)))
        now += 0.001 if i < 10_000 else 60.0
    assert [number for number in reads if number >= 10_000] == [*map(float, range(10_000, 10_010)), 10_009.0]


@pytest.mark.usefixtures("needs_tqdm")
def test_the_last_metrics_stay(reads: list[float]) -> None:
    screen = io.StringIO()
    for i in (bar := progress(range(10), file=screen, mininterval=1000.0)):
        bar.show(loss=torch.tensor(float(i)))
    assert reads == [9.0]
    assert "10/10" in drawn(screen)[-1] and "loss=9]" in drawn(screen)[-1]


@pytest.mark.parametrize("how", ["break", "raise"])
def test_leaving_early_closes_the_bar(installed: bool, how: str) -> None:
    screen, threads = io.StringIO(), threading.active_count()
    closed = []

    def batches() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    def loop() -> None:
        for i in (bar := progress(batches(), 10, file=screen, mininterval=1000.0)):
            bar.show(loss=i)
            if i == 3 and how == "break":
                break
            if i == 3:
                raise ZeroDivisionError

    if how == "break":
        loop()
    else:
        with pytest.raises(ZeroDivisionError):
            loop()
    gc.collect()  # the error holds the loop
    assert closed == [True] and threading.active_count() == threads
    if installed:
        assert "loss=3]" in drawn(screen)[-1]


def test_the_errors_of_the_iterable_come_through(installed: bool) -> None:
    error = RuntimeError("the disk is gone")

    def batches() -> Iterator[int]:
        yield 1
        raise error

    seen = []
    with pytest.raises(RuntimeError) as caught:
        for x in progress(batches(), file=io.StringIO()):
            seen.append(x)
    assert caught.value is error and seen == [1]


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(1), torch.tensor(1j), None, [1.0], "low"])
def test_what_is_no_number_is_refused(installed: bool, value: Any) -> None:
    with pytest.raises(InputError, match="'stats/loss' must be a real number"):
        progress([1]).show(stats={"loss": value})


def test_a_graph_is_not_kept(installed: bool) -> None:
    bar = progress([1])
    bar.show(loss=(torch.ones((), requires_grad=True) * 2))
    assert all(figure.grad_fn is None for figure in bar._shown.figures.values())
