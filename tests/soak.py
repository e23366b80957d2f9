"""Run what takes hours, and write what came of it into docs/reliability.md: `make soak`.

Usage: python -m tests.soak [--share SHARE] [NAME ...]. Of each thing a share is done, all of it by default; with names,
only these rows of the table are written anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TEXT = """# Reliability

What luxtorch survives when it is tried for long: `make soak` runs it, and writes this page. Each row says what happened
in its last run, with the versions and the day. A run that finds a fault writes it here before it fails.

| what | how often | what came of it | seconds | where and when |
| --- | --- | --- | --- | --- |
"""


def tests(path: str, *options: str, **variables: str) -> str:
    """Run tests in a process of their own, and return what they print; raise if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", path, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return done.stdout


def counted(output: str) -> int:
    """Return how many tests have passed."""
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


def step_of(model: lt.Layer, data: tuple[Tensor, Tensor]) -> Callable[[training.TrainState], training.TrainState]:
    def step(ts: training.TrainState) -> training.TrainState:
        return training.single_train_step(lt.MSELoss(), data, ts)[3]

    return step


def small() -> tuple[lt.Layer, tuple[Tensor, Tensor], training.TrainState]:
    model = lt.Chain(lt.Dense(4, 8, torch.tanh), lt.Dropout(0.1), lt.Dense(8, 1))
    ps, st = lt.setup(0, model)
    data = lt.random.normal(lt.random.key(1), (16, 4)), torch.ones(16, 1)
    return model, data, training.TrainState(model, ps, st, optim.Adam(1e-3))


def random_models(count: int) -> str:
    """Check every law on random models."""
    tests("tests/fuzz", FUZZ_MODELS=str(count))
    return "every law holds"


def kills(count: int) -> str:
    """Kill a training run by SIGKILL, at any time and in the middle of its writes."""
    with tempfile.TemporaryDirectory() as folder:
        program = ROOT / "tests" / "training" / "killed_run.py"
        done = subprocess.run([sys.executable, program, folder, str(count)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["identical"] and sum(result["kills"].values()) == count
    return (
        f"ends bit for bit as a run that nobody killed; {result['half_written']} files were left half written, at most "
        f"{result['most_lost']} steps were done again"
    )


def damaged_checkpoints(count: int) -> str:
    """Load checkpoints that were damaged."""
    output = tests("tests/training/test_checkpoint_corruption.py", "-k", "damaged_copies", COPIES=str(count))
    found = re.search(r"\{'error': (\d+), 'recovered': (\d+)\}", output)
    assert found and int(found[1]) + int(found[2]) == count
    return f"{found[1]} errors that name the file, {found[2]} loaded bit for bit (the damage had changed nothing)"


def bad_inputs(_count: int) -> tuple[int, str]:
    """Call layers with wrong inputs, parameters and states."""
    return counted(tests("tests/core/test_bad_inputs.py")), "each an error of luxtorch that names the layer"


def memory() -> float:
    """Return the resident memory in MiB."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def flat_steps(count: int) -> str:
    """Train for many steps, in eager code and jitted, and look at memory and time."""
    model, data, ts = small()
    found = []
    for way, step in (("eager", step_of(model, data)), ("jitted", lt.jit(step_of(model, data), donate="ts"))):
        state, tenth = ts, max(count // 10, 1)
        if way == "jitted":
            state = training.TrainState(model, *lt.setup(0, model), optim.Adam(1e-3))
        before, seconds = 0.0, []
        for block in range(10):
            begun = time.perf_counter()
            for _ in range(tenth):
                state = step(state)
            seconds.append(time.perf_counter() - begun)
            if block == 0:
                before = memory()
        grown, slower = memory() - before, seconds[-1] / seconds[1]
        assert grown < 8, f"{way}: {grown:.1f} MiB more"
        found.append(f"{way}: {grown:+.1f} MiB and {slower:.2f} times the time a step, the last tenth to the second")
    return "; ".join(found)


def threads(count: int) -> str:
    """Call one jitted function from eight threads."""
    model, data, ts = small()
    step = lt.jit(lambda x, ps, st: model(x, ps, lt.test_mode(st))[0])
    inputs = [data[0] + number for number in range(8)]
    expected = [model(x, ts.parameters, lt.test_mode(ts.states))[0] for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        try:
            for _ in range(count):
                if not torch.allclose(step(inputs[number], ts.parameters, ts.states), expected[number], atol=1e-5):
                    wrong.append(number)
        except BaseException:
            wrong.append(number)
            raise

    running = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert not wrong, wrong
    return "each result is that of its own input"


def _jitted_in_child(x: Tensor, queue: multiprocessing.Queue[float]) -> None:
    queue.put(float(_square(x).sum()))


_square = lt.jit(lambda x: (x * x).tanh())


def children(count: int) -> str:
    """Call a jitted function in forked and spawned processes, after the parent has called it."""
    x = torch.arange(4.0)
    expected = float(_square(x).sum())
    for number in range(count):
        how = multiprocessing.get_context(("fork", "spawn")[number % 2])
        queue: multiprocessing.Queue[float] = how.Queue()
        child = how.Process(target=_jitted_in_child, args=(x, queue))
        child.start()
        found = queue.get(timeout=300)
        child.join(timeout=300)
        assert (child.exitcode, found) == (0, expected), (how.get_start_method(), child.exitcode, found, expected)
    return "each returns what its parent did"


ROWS: dict[str, tuple[int, str, Callable[[int], str | tuple[int, str]]]] = {
    "models": (10_000, "random models out of all layers, under every law", random_models),
    "kills": (1_000, "SIGKILLs of a training run that saves", kills),
    "checkpoints": (10_000, "damaged checkpoints", damaged_checkpoints),
    "inputs": (450, "wrong inputs, parameters and states", bad_inputs),
    "steps": (100_000, "training steps", flat_steps),
    "threads": (10_000, "jitted calls from each of 8 threads", threads),
    "processes": (20, "forks and spawns after a jitted call", children),
}


def main() -> None:
    """Run the rows that were asked for, and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *ROWS], metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--share", type=float, default=1.0, help="how much of each is done")
    chosen = parser.parse_args()
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    known = {
        title: line for title in (row[1] for row in ROWS.values()) for line in lines if line.startswith(f"| {title}")
    }
    for name in chosen.names or ROWS:
        number, title, run = ROWS[name]
        count, begun, failure = max(int(number * chosen.share), 1), time.perf_counter(), None
        try:
            found = run(count)
            count, text = found if isinstance(found, tuple) else (count, found)
        except Exception as error:
            failure, text = error, f"**failed**: {type(error).__name__} {str(error)[:200]}"
        seconds = time.perf_counter() - begun
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        place = f"{versions}, {os.cpu_count()} cores, {datetime.date.today()}"
        known[title] = f"| {title} | {count:,} | {text} | {seconds:,.0f} | {place} |"
        PAGE.write_text(TEXT + "".join(f"{known[row[1]]}\n" for row in ROWS.values() if row[1] in known))
        print(known[title], flush=True)
        if failure is not None:
            raise failure


if __name__ == "__main__":
    main()
