"""A process that builds one candidate, stays alive, and runs it when it is its turn.

It reads one command a line and answers in one line of JSON; `turns.py` holds the other end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from importlib import import_module
from typing import Any, TextIO

import numpy as np

from .problems import PROBLEMS, LeftOut

CHECKED = 4
"""How many steps are compared between the candidates before any is timed."""


def number(arrays: list[Any]) -> float:
    """Return a number for what a step returned: a scalar itself, otherwise the mean square of all there is."""
    arrays = [np.asarray(array, np.float64) for array in arrays]
    if len(arrays) == 1 and arrays[0].ndim == 0:
        return float(arrays[0])
    return math.fsum(float(np.square(array).sum()) for array in arrays) / sum(array.size for array in arrays)


class Timed:
    """Build a candidate, and time it."""

    def __init__(self, side: str, problem: str, candidate: str, device: str, threads: int) -> None:
        self.rows, self.device = import_module(f"benchmarks.{side}_rows"), device
        self.rows.settle(threads)
        self._idle = _resident("VmRSS")
        what = PROBLEMS[problem]
        build = self.rows.candidates(what)[candidate]
        self.step = build(what, what.data(), device)
        self.values: list[float] = []
        self.first = 0.0  # what these steps took, compilation included
        for _ in range(CHECKED):
            start = time.perf_counter()
            result = self.step()
            self.rows.finish(result, device)
            self.last = time.perf_counter() - start
            self.first += self.last
            self.values.append(number(self.rows.arrays(result)))
        _forget_peak()

    def turn(self, seconds: float) -> float:
        """Return what one call takes, from as many calls as go into some seconds."""
        if self.last < 1:  # longer calls need no warming up
            self.rows.finish(self.step(), self.device)
        calls = max(1, int(seconds / self.last))
        start = time.perf_counter()
        for _ in range(calls):
            result = self.step()
        self.rows.finish(result, self.device)
        self.last = (time.perf_counter() - start) / calls
        return self.last

    def peak(self) -> float:
        """Return the most memory that was in use while it was timed, in MiB.

        On a GPU it is what torch had allocated there, otherwise what the process held beyond an idle one.
        """
        if self.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        return _resident("VmHWM") - self._idle


def _resident(what: str) -> float:
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))
    except (OSError, StopIteration):
        return math.nan


def _forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        pass  # the peak is then that of the whole run, compilation included


def main() -> None:
    """Answer commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is not an answer
    parser = argparse.ArgumentParser()
    for name in ("side", "problem", "candidate", "device"):
        parser.add_argument(name)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if options.threads < len(available):
        os.sched_setaffinity(0, available[: options.threads])
    try:
        timed = Timed(**vars(options))
    except Exception as error:
        return _answer(answers, error=_short(error))
    _answer(answers, values=timed.values, first=timed.first, versions=timed.rows.versions(options.device))
    for line in sys.stdin:
        if line.strip() == "peak":
            _answer(answers, peak=timed.peak())
        else:
            _answer(answers, seconds=timed.turn(float(line)))


def _short(error: Exception) -> str:
    if isinstance(error, LeftOut):
        return f"left out: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"fails: {type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _answer(answers: TextIO, **fields: Any) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
