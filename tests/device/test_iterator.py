"""Batches come moved, in order and unchanged, however many are fetched ahead, and nothing outlives them."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from luxtorch.core import InputError, Static
from luxtorch.device import Device, DeviceIterator

PREFETCH = [None, 0, 1, 2, 7]

# Newer versions of Python warn when a loader forks its workers.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def pairs(n: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((2,), float(i)), torch.tensor(i)) for i in range(n)]


class Failing(IterableDataset):
    """Gives some numbers, then fails."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.n):
            yield torch.tensor(i)
        raise ZeroDivisionError("the disk is gone")


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", [list, tuple, "generator", "loader"])
def test_batches_come_in_order(kind: Any, n: int, prefetch: int | None, device: torch.device) -> None:
    if kind == "loader":
        x, y = torch.arange(float(2 * n)).reshape(n, 2), torch.arange(n)
        loader: Any = DataLoader(TensorDataset(x, y), batch_size=2, pin_memory=device.type == "cuda")
        expected = list(zip(x.split(2), y.split(2), strict=True)) if n else []
    else:
        expected = pairs(n)
        loader = (batch for batch in expected) if kind == "generator" else kind(expected)
    batches = DeviceIterator(loader, device, prefetch=prefetch)
    for _ in range(1 if kind == "generator" else 2):  # one epoch, or two
        got = list(batches)
        assert all(leaf.device.type == device.type for batch in got for leaf in batch)
        torch.testing.assert_close([[leaf.cpu() for leaf in batch] for batch in got], [*map(list, expected)])
    if kind == "generator":
        assert list(batches) == []
        with pytest.raises(TypeError, match="no len"):
            len(batches)
    else:
        assert len(batches) == len(loader) == len(expected)


@forks
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("prefetch", PREFETCH)
def test_workers_prepare_the_batches(workers: int, prefetch: int | None) -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, num_workers=workers)
    batches = DeviceIterator(loader, Device("cpu", torch.float64), prefetch=prefetch)
    for _ in range(2):
        assert [x.tolist() for (x,) in batches] == [[0, 1], [2, 3], [4, 5]]
    (first,) = next(iter(batches))
    assert first.dtype == torch.float64


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_only_tensors_are_moved(prefetch: int | None) -> None:
    np = pytest.importorskip("numpy")
    array, mode = np.ones(2), Static(True)
    shared = torch.ones(2)
    batch = {"x": shared, "same": [shared], "array": array, "name": "a", "nothing": None, "mode": mode}
    (moved,) = DeviceIterator([batch], "meta", prefetch=prefetch)
    assert moved["x"].device.type == "meta" and moved["x"] is moved["same"][0]
    assert moved["array"] is array and (moved["name"], moved["nothing"], moved["mode"]) == ("a", None, mode)
    assert batch["x"] is shared and shared.device.type == "cpu"


def test_nothing_is_copied_on_the_cpu() -> None:
    batches = pairs()
    for moved, batch in zip(DeviceIterator(batches, "cpu"), batches, strict=True):
        assert all(a is b for a, b in zip(moved, batch, strict=True))


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_so_many_are_fetched_ahead(prefetch: int) -> None:
    fetched = []

    def loader() -> Iterator[Tensor]:
        for i in range(6):
            fetched.append(i)
            yield torch.tensor(i)

    for i, _ in enumerate(DeviceIterator(loader(), "cpu", prefetch=prefetch)):
        assert fetched[-1] == min(5, i + prefetch)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_by_one_where_there_is_nothing_to_gain(device: str) -> None:
    assert DeviceIterator([], device).prefetch == 0
    assert DeviceIterator([], "cuda").prefetch == 2  # no accelerator is asked for before the first batch


def test_a_loader_may_reuse_its_memory_by_default() -> None:
    memory = torch.zeros(())
    loader = (memory.add_(1) for _ in range(3))
    assert [float(batch) for batch in DeviceIterator(loader, "cpu")] == [1, 2, 3]


@forks
@pytest.mark.parametrize(
    ("n", "prefetch", "workers"),
    [
        *[(0, 0, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (4, None, 0), (4, 2, 0), (4, 7, 0)],
        pytest.param(4, 2, 1, marks=pytest.mark.slow),  # torch takes 5 s to stop a worker that has failed
    ],
)
def test_errors_come_where_they_belong(n: int, prefetch: int | None, workers: int) -> None:
    got: list[int] = []
    batches = DeviceIterator(DataLoader(Failing(n), batch_size=None, num_workers=workers), "cpu", prefetch=prefetch)
    with pytest.raises(ZeroDivisionError, match="the disk is gone"):
        for batch in batches:
            got.append(int(batch))
    assert got == list(range(n))


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_the_error_is_the_loaders_own(prefetch: int | None) -> None:
    error = RuntimeError("mine")

    def loader() -> Iterator[Tensor]:
        yield torch.zeros(())
        raise error

    batches = iter(DeviceIterator(loader(), "cpu", prefetch=prefetch))
    next(batches)
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    assert caught.value is error and "loader" in [entry.name for entry in caught.traceback]
    assert list(batches) == []


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_what_cannot_be_moved_is_an_error_where_it_belongs(prefetch: int | None) -> None:
    batches = iter(DeviceIterator([torch.zeros(()), {"net": torch.nn.Linear(1, 1)}], "cpu", prefetch=prefetch))
    next(batches)
    with pytest.raises(InputError, match="not a tree of tensors"):
        next(batches)


def test_to_interrupt_is_not_put_off() -> None:
    def loader() -> Iterator[Tensor]:
        yield torch.zeros(())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(iter(DeviceIterator(loader(), "cpu", prefetch=1)))


@pytest.mark.sampled(4)
@forks
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("prefetch", PREFETCH)
def test_leaving_early_leaves_nothing_behind(prefetch: int | None, workers: int) -> None:
    threads = set(threading.enumerate())
    loader = DataLoader(TensorDataset(torch.arange(8.0)), num_workers=workers)
    for _ in DeviceIterator(loader, "cpu", prefetch=prefetch):
        break
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)  # that of a worker's queue takes its time to end
        assert not thread.is_alive()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_leaving_early_closes_the_loader(prefetch: int | None) -> None:
    closed = []

    def loader() -> Iterator[Tensor]:
        try:
            while True:
                yield torch.zeros(())
        finally:
            closed.append(True)

    for _ in DeviceIterator(loader(), "cpu", prefetch=prefetch):
        break
    assert closed == [True]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_batch_that_was_used_is_free_to_go(prefetch: int) -> None:
    gc.disable()  # nothing may wait for it
    try:
        batches = iter(DeviceIterator((torch.zeros(2) for _ in range(4)), "cpu", prefetch=prefetch))
        batch = next(batches)
        gone = weakref.ref(batch)
        del batch
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("prefetch", [-1, -2])
def test_a_negative_prefetch_is_refused(prefetch: int) -> None:
    with pytest.raises(InputError, match="prefetch must be at least 0") as error:
        DeviceIterator([], "cpu", prefetch=prefetch)
    assert str(prefetch) in str(error.value)


def test_printing() -> None:
    text = repr(DeviceIterator([], "cpu", prefetch=1))
    assert text.startswith("DeviceIterator(list, Device(") and text.endswith("prefetch=1)")


# Copies on a stream of their own. There may be no GPU here: a stand-in for torch's streams writes down what is done.


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.events = 0

        def record_event(self) -> int:
            done.append(f"record {self.events}")
            self.events += 1
            return self.events - 1

        def wait_event(self, event: int) -> None:
            done.append(f"wait {event}")

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        done.append("enter")
        yield
        done.append("leave")

    current, to = Stream("current"), Tensor.to

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        done.append(f"copy {kwargs}" if args[0] == torch.device("meta") else f"cast to {args[0]}")
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: current)
    monkeypatch.setattr(Tensor, "to", moved)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: done.append(f"used by current {stream is current}")
    )
    return done


def streamed(loader: Any, device: Device, prefetch: int) -> Iterator[Any]:
    batches = DeviceIterator(loader, device, prefetch=prefetch)
    batches._copies = True
    return iter(batches)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_next_batch_is_copied_before_this_one_is_waited_for(done: list[str], dtype: torch.dtype | None) -> None:
    batches = streamed([torch.ones(2)] * 3, Device("meta", dtype), 1)
    copied = ["enter", "copy {'non_blocking': True}", *(["cast to torch.float16"] if dtype else [])]
    for steps in (
        [*copied, "record 0", "leave", *copied, "record 1", "leave", "wait 0", "used by current True"],
        [*copied, "record 2", "leave", "wait 1", "used by current True"],
        ["wait 2", "used by current True"],
    ):
        done.clear()
        moved = next(batches)
        assert done == steps
        assert (moved.device.type, moved.dtype) == ("meta", dtype or torch.float32)
    assert list(batches) == []


@pytest.mark.parametrize(
    "batch", [torch.ones(2, device="meta"), torch.eye(2).to_sparse(), [torch.ones(1), torch.ones(1, device="meta")]]
)
def test_what_another_stream_may_be_computing_stays_in_its_order(done: list[str], batch: Any) -> None:
    done.clear()
    list(streamed([batch], Device("meta"), 2))
    assert set(done) == {"copy {}"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("pinned", [True, False])
def test_values_are_right_while_the_gpu_is_late(prefetch: int, pinned: bool) -> None:
    data = torch.arange(20.0)[:, None].expand(20, 100_000).contiguous()
    loader = DataLoader(TensorDataset(data), batch_size=1, pin_memory=pinned)
    sums = []
    for (x,) in DeviceIterator(loader, "cuda", prefetch=prefetch):
        torch.cuda._sleep(10_000_000)
        sums.append((x.double().mean(), x.flatten()[-1].clone()))
        del x
    torch.cuda.synchronize()
    got = torch.tensor([(float(mean), float(last)) for mean, last in sums])
    torch.testing.assert_close(got, torch.arange(20.0)[:, None].expand(20, 2))
