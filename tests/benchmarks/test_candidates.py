"""The candidates of each problem compute the same: a benchmark of different things would tell nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import luxtorch as lt

problems = pytest.importorskip("benchmarks.problems")  # the wheel has no benchmarks
rows = pytest.importorskip("benchmarks.torch_rows")
turns = pytest.importorskip("benchmarks.turns")
worker = pytest.importorskip("benchmarks.worker")

FAST = ("W1", "W8", "B1-16-relu-forward", "B1-16-gelu-gradient", "B5-32")
LONG = ("W11-1000", "W11-10000")  # W11 with more steps
SLOW = (
    *(name for name in problems.PROBLEMS if name.startswith("W") and name not in (*FAST, *LONG)),
    *("B1-128-relu-forward", "B2-32-relu-forward", "B2-2-relu-gradient", "B4-tanh"),
)
LARGE = ("W3", "W9", "W10", "W15", "W16")  # which take long to trace, donated or not
FIRST = {name: next(iter(rows.candidates(problem))) for name, problem in problems.PROBLEMS.items()}


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as ever, but compile no kernels: it is the functions that are tested here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(lt, "jit", functools.partial(lt.jit, backend="replay"))


@functools.cache
def reference(name: str) -> list[float]:
    return first_numbers(name, FIRST[name])


def first_numbers(name: str, candidate: str) -> list[float]:
    problem = problems.PROBLEMS[name]
    step = rows.candidates(problem)[candidate](problem, problem.data(), "cpu")
    return [worker.number(rows.arrays(step())) for _ in range(worker.CHECKED)]


def cases() -> list[Any]:
    return [
        pytest.param(name, candidate, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in FAST + SLOW
        for candidate in rows.candidates(problems.PROBLEMS[name])
        if candidate != FIRST[name] and not (name in LARGE and candidate.endswith("donated"))
    ]


# Where nn.LSTM breaks torch.compile's graph, torch looks at a gradient of which it warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# And vmap runs it sample by sample.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize(("name", "candidate"), cases())
def test_candidates_agree(name: str, candidate: str) -> None:
    try:
        found = first_numbers(name, candidate)
    except problems.LeftOut as why:
        pytest.skip(str(why))
    assert turns.disagreement(found, reference(name)) == ""


@pytest.mark.parametrize("name", [name for name in FAST if problems.PROBLEMS[name].family == "training"])
def test_steps_train(name: str) -> None:
    losses = reference(name)
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))


def test_every_problem_has_candidates_of_each_kind() -> None:
    for problem in problems.PROBLEMS.values():
        names = [*rows.candidates(problem)]
        for kind in ("torch.compile", "luxtorch, dict", "luxtorch, ComponentVector", "lt.jit, dict", "lt.jit, Comp"):
            assert any(name.startswith(kind) for name in names), (problem.name, kind)
