"""Measuring: each candidate of a problem in a process of its own, which stays alive and waits for its turn."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .problems import Problem
from .worker import CHECKED

ROOT = Path(__file__).resolve().parent.parent
BEFORE = ", before"
"""What follows the name of a candidate that another checkout of this project runs."""

TOLERANCE = 5e-6
"""How much the first results may differ, relative to those of the first candidate."""


ENOUGH = 20.0
"""Seconds of steps after which a candidate that has had three turns gets no more: where one step takes seconds."""


class Row(NamedTuple):
    """Hold what was measured of a candidate.

    Attributes:
        candidate: Its name.
        seconds: What a step took in each round.
        first: What the first call took, with all that the next few still compiled, in seconds.
        again: The same in a second process, which finds what the first has compiled; NaN where nothing is.
        peak: MiB in use while it was timed.
        error: Why it was not timed.
    """

    candidate: str
    seconds: tuple[float, ...] = ()
    first: float = 0.0
    again: float = math.nan
    peak: float = 0.0
    error: str = ""


class Settings(NamedTuple):
    """Hold how to measure.

    Attributes:
        pythons: The interpreter of each side, "torch" and "jax".
        device: "cpu" or "cuda".
        threads: How many threads each candidate has.
        rounds: How many turns each candidate gets.
        seconds: How long a turn takes.
        against: Another checkout of this project; candidates whose names end with `BEFORE` run there.
    """

    pythons: dict[str, str]
    device: str
    threads: int
    rounds: int
    seconds: float
    against: Path | None = None


class Process:
    """Start a candidate, and talk with it."""

    def __init__(self, side: str, problem: Problem, candidate: str, settings: Settings, cache: str) -> None:
        self.candidate = candidate
        name, before, _ = candidate.partition(BEFORE)
        root = settings.against if before and settings.against else ROOT
        environment = os.environ | {
            "OMP_NUM_THREADS": str(settings.threads),
            "PYTHONPATH": _path(root),
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers beside each candidate
        }
        arguments = [side, problem.name, name, settings.device, str(settings.threads)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [settings.pythons[side], "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=root,  # Python looks there first
        )
        self.built = self._answer()
        self.times: list[float] = []
        self.again = math.nan  # what the first calls took another process with the same cache

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def row(self) -> Row:
        """Return what was measured."""
        peak = self.ask("peak")["peak"]
        others = (CHECKED - 1) * sorted(self.times)[len(self.times) // 2]
        # A slow round is no reason for a call that takes no time.
        first, again = (one - min(others, one * (1 - 1 / CHECKED)) for one in (self.built["first"], self.again))
        return Row(self.candidate, tuple(self.times), first, again, peak)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._log.seek(0)
        last = ["", *self._log.read().strip().splitlines()][-1]
        return {"error": f"the process ended with {self._process.returncode}: {last}"[:200]}


def candidates(problems: Iterable[Problem], pythons: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Return side and name of each problem's candidates, as the interpreters of the sides know them."""
    found: dict[str, list[tuple[str, str]]] = {problem.name: [] for problem in problems}
    for side, python in pythons.items():
        code = (
            f"import json; from benchmarks import {side}_rows as rows, problems; "
            f"print(json.dumps({{name: [*rows.candidates(problems.PROBLEMS[name])] for name in {[*found]!r}}}))"
        )
        environment = os.environ | {"PYTHONPATH": _path(ROOT)}
        run = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
        for problem, names in json.loads(run.stdout).items():
            found[problem] += [(side, name) for name in names]
    return found


def measure(
    problem: Problem, candidates: Iterable[tuple[str, str]], settings: Settings
) -> tuple[list[Row], dict[str, str]]:
    """Return what was measured of a problem's candidates, and the versions of each side.

    Args:
        problem: The problem.
        candidates: Their sides and names; the results of the others are compared with those of the first.
        settings: How to measure.
    """
    versions: dict[str, str] = {}
    processes: list[Process] = []
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            reference: list[float] = []
            for side, candidate in candidates:
                cache = tempfile.mkdtemp(dir=folder)  # no candidate finds what another has compiled
                process = Process(side, problem, candidate, settings, cache)
                processes.append(process)
                error = process.built.get("error", "")
                if not error:
                    versions[side] = process.built["versions"]
                    reference = reference or process.built["values"]
                    error = disagreement(process.built["values"], reference)
                rows[candidate] = Row(candidate, error=error)
                if not error and compiles(side, candidate):
                    second = Process(side, problem, candidate, settings, cache)
                    second.close()
                    process.again = second.built.get("first", math.nan)
                print(f"  {candidate}:", error or f"built in {process.built['first']:.1f} s", flush=True)
            ready = [process for process in processes if not rows[process.candidate].error]
            order = random.Random(0)
            for _ in range(settings.rounds):
                order.shuffle(ready)
                for process in list(ready):
                    if len(process.times) >= 3 and sum(process.times) > ENOUGH:
                        continue
                    answer = process.ask(str(settings.seconds))
                    if "error" in answer:
                        rows[process.candidate] = Row(process.candidate, error=answer["error"])
                        ready.remove(process)
                    else:
                        process.times.append(answer["seconds"])
            for process in ready:
                rows[process.candidate] = process.row()
        finally:
            for process in processes:
                process.close()
    return list(rows.values()), versions


def compiles(side: str, candidate: str) -> bool:
    """Tell whether a candidate compiles something."""
    return side == "jax" or candidate.startswith(("torch.compile", "lt.jit"))


def disagreement(values: list[float], reference: list[float]) -> str:
    """Say how the first results differ from those of the first candidate; nothing if they do not."""
    for value, wanted in zip(values, reference, strict=True):
        if not abs(value - wanted) <= TOLERANCE * abs(wanted):  # NaN agrees with nothing
            return f"disagrees: {value:.7g} instead of {wanted:.7g}"
    return ""


def interpreters(jax_python: str) -> tuple[dict[str, str], str]:
    """Return the interpreter of each side, and why there is none for JAX, if so."""
    pythons = {"torch": sys.executable}
    if not Path(jax_python).exists():
        return pythons, f"there is no {jax_python}"
    run = subprocess.run([jax_python, "-c", "import equinox, flax, optax"], capture_output=True, text=True)
    if run.returncode:
        return pythons, (run.stderr.strip().splitlines() or ["it does not start"])[-1]
    return pythons | {"jax": jax_python}, ""


def _path(root: Path) -> str:
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
