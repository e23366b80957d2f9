"""Kill a training run again and again, and see how it ends; `test_checkpoint_killed.py` runs this as a program.

Usage: killed_run.py FOLDER KILLS. Every run is a fork of this process, which imports torch once and never trains.
Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.func loads it when it is first used: it should not do so in each fork
from torch import Tensor

import luxtorch as lt
from luxtorch import optim
from luxtorch.random import fold_in, key, normal
from luxtorch.training import CheckpointManager, load_checkpoint, save_checkpoint

EVERY = 2  # steps from save to save
MODEL = lt.Chain(lt.Dense(4, 8, torch.tanh), lt.BatchNorm(8), lt.Dropout(0.3), lt.Dense(8, 1))
BALLAST = 200_000  # numbers that change at every step: with them, writing takes as long as computing

Report = Callable[[str, int], None]


def first() -> dict[str, Any]:
    ps, st = lt.setup(0, MODEL)
    opt_state = optim.setup(optim.Adam(1e-2), ps)
    return {"ps": ps, "st": st, "opt": opt_state, "step": torch.tensor(0), "ballast": torch.zeros(BALLAST)}


TENSORS = len(lt.core.tree_leaves(first()))


def advance(run: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Take a step; its data follow from its number alone."""
    x = normal(fold_in(key(1), run["step"]), (16, 4))

    def loss(ps: Any) -> tuple[Tensor, Any]:
        y, st = MODEL(x, ps, run["st"])
        return (y - x.sum(1, keepdim=True)).square().mean(), st

    grads, (value, st) = torch.func.grad_and_value(loss, has_aux=True)(run["ps"])
    opt_state, ps = optim.update(run["opt"], run["ps"], grads)
    ballast = run["ballast"] * 0.9 + x.flatten()[0]
    return {"ps": ps, "st": st, "opt": opt_state, "step": run["step"] + 1, "ballast": ballast}, value


def train(folder: Path, until: int, report: Report) -> None:
    """Resume from the last checkpoint if there is one, and train on."""
    manager, run = CheckpointManager(folder, keep_last=2), first()
    if manager.steps():
        run = manager.restore(run)
    report("resumed", int(run["step"]))
    while run["step"] < until:
        run, value = advance(run)
        report("took", int(run["step"]))
        if run["step"] % EVERY == 0 or run["step"] == until:
            manager.save(run["step"], run, metric=value)
            report("saved", int(run["step"]))


def uninterrupted(file: Path, until: int) -> None:
    run = first()
    while run["step"] < until:
        run, _ = advance(run)
    save_checkpoint(file, run)


# Killing.


def fork(work: Callable[[Report], None]) -> tuple[int, int]:
    """Do some work in a fork; return its process, and where it reports."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    os.close(read)
    status = 1
    try:
        work(lambda event, step: os.write(write, f"{event} {step}\n".encode()) and None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_within(owner: Any, name: str, call: int, *, after: bool) -> None:
    """Let a function kill this process at its n-th call, before or after it has done its work."""
    function, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == call and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


# Where a run dies, as a function of the number of the save in which it does. A save calls crc32 once for each tensor,
# all of them being small, and fsync for the file and for its folder.
MOMENTS: dict[str, Callable[[int, random.Random], None]] = {
    "at any time": lambda n, draw: None,
    "in the middle of the data": lambda n, draw: kill_within(
        zlib, "crc32", TENSORS * (n - 1) + draw.randrange(1, TENSORS + 1), after=False
    ),
    "before the file is synced": lambda n, draw: kill_within(os, "fsync", 2 * n - 1, after=False),
    "before the rename": lambda n, draw: kill_within(os, "replace", n, after=False),
    "after the rename": lambda n, draw: kill_within(os, "replace", n, after=True),
    "while old files are removed": lambda n, draw: kill_within(Path, "unlink", n, after=draw.random() < 0.5),
}


def events(read: int, process: int, seconds: float) -> list[tuple[str, int]]:
    """Read reports until the process ends; kill it some time after its first one."""
    text, deadline = b"", None
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([read], [], [], wait)[0]:
            os.kill(process, signal.SIGKILL)
            deadline = None
            continue
        piece = os.read(read, 65536)
        if not piece:
            break
        if not text:
            deadline = time.monotonic() + seconds
        text += piece
    os.close(read)
    return [(line.split()[0], int(line.split()[1])) for line in text.decode().splitlines()]


def last_step(folder: Path) -> int:
    return (CheckpointManager(folder).steps()[-1:] or [0])[0]


def train_and_die(folder: Path, moment: str, draw: random.Random) -> int:
    """Resume a run and kill it; return how many of its steps are lost."""
    before, save = last_step(folder), draw.randrange(1, 4)

    def work(report: Report) -> None:
        def armed(event: str, step: int) -> None:
            report(event, step)
            if event == "resumed":
                MOMENTS[moment](save, draw)

        train(folder, 10**9, armed)

    process, read = fork(work)
    seen = events(read, process, draw.uniform(0, 0.15) if moment == "at any time" else 60.0)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status, seen)

    # It went on from the last checkpoint that there was, and no save that had finished is lost.
    assert seen[0] == ("resumed", before), (moment, seen[0], before)
    after = last_step(folder)
    assert after >= max((step for event, step in seen if event == "saved"), default=0), (moment, after, seen)
    # Whatever has the name of a checkpoint is one.
    manager = CheckpointManager(folder)
    for step in manager.steps():
        assert int(manager.restore(first(), step)["step"]) == step
    return max(step for _, step in seen) - after


def finish(work: Callable[[Report], None]) -> None:
    process, read = fork(work)
    events(read, process, 600.0)
    assert os.waitpid(process, 0)[1] == 0


def main(folder: Path, kills: int) -> dict[str, Any]:
    draw, run, moments = random.Random(kills), folder / "run", Counter[str]()
    lost, half_written = [], 0
    for i in range(kills):
        moment = list(MOMENTS)[i % len(MOMENTS)]
        lost.append(train_and_die(run, moment, draw))
        half_written += any(run.glob("*.tmp"))
        moments[moment] += 1

    until = last_step(run) + 5
    finish(lambda report: train(run, until, report))
    finish(lambda report: uninterrupted(folder / "reference", until))
    # Equal trees make equal files.
    save_checkpoint(folder / "ours", CheckpointManager(run).restore(first()))
    reference = load_checkpoint(folder / "reference", first())
    return {
        "steps": until,
        "kills": dict(moments),
        "half_written": half_written,
        "most_lost": max(lost),
        "trained": not torch.equal(reference["ps"]["layer_1"]["weight"], first()["ps"]["layer_1"]["weight"]),
        "identical": (folder / "ours").read_bytes() == (folder / "reference").read_bytes(),
        "files": sorted(path.name for path in run.iterdir()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
