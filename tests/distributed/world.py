"""Starting a few processes that meet, and collecting what they return."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from luxtorch import distributed

# A server that has imported everything is forked for each process: importing torch takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["luxtorch.distributed", "luxtorch.optim", "luxtorch.training"])

_MEETINGS = itertools.count()


def start(work: Callable[..., Any], ranks: int, folder: Path, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Start the processes of a world, which return `work(folder, *args)`."""
    meeting = f"file://{folder}/meeting_{next(_MEETINGS)}"
    processes = [
        CONTEXT.Process(target=_run, args=(work, meeting, rank, ranks, folder, args, timeout)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def run(work: Callable[..., Any], ranks: int, folder: Path, *args: Any, limit: float = 240.0) -> list[Any]:
    """Return what the processes of a world return, in the order of their ranks."""
    processes = start(work, ranks, folder, *args)
    end = time.monotonic() + limit
    # Where one has failed, the others would wait for it.
    while time.monotonic() < end and {process.exitcode for process in processes} <= {None, 0}:
        if all(process.exitcode == 0 for process in processes):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, f"the processes ended with {codes}"
    return [torch.load(_result(folder, work, ranks, rank), weights_only=True) for rank in range(ranks)]


def _run(
    work: Callable[..., Any], meeting: str, rank: int, ranks: int, folder: Path, args: tuple[Any, ...], timeout: float
) -> None:
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    distributed.initialize(init_method=meeting, rank=rank, world_size=ranks, timeout=timeout)
    result = work(folder, *args)
    torch.save(result, _result(folder, work, ranks, rank))
    distributed.shutdown()


def _result(folder: Path, work: Callable[..., Any], ranks: int, rank: int) -> Path:
    return folder / f"{work.__name__}_{ranks}_{rank}.pt"
