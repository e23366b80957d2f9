"""The runner and its report."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import pytest

problems = pytest.importorskip("benchmarks.problems")  # the wheel has no benchmarks
report = pytest.importorskip("benchmarks.report")
turns = pytest.importorskip("benchmarks.turns")

ROWS = [
    turns.Row("torch.nn + torch.optim", (2.0, 4.0, 3.0), 3.0, peak=10.0),
    turns.Row("torch.compile of torch.nn, fused", error="fails: Unsupported: a | b"),
    turns.Row("luxtorch, dict", (6.0, 6.0, 6.0)),
    turns.Row("luxtorch, ComponentVector", (1.5, 1.5, 9.0)),
    turns.Row("lt.jit, dict, donated", (0.3, 0.3, 0.3), 12.25, 2.5, 47.0),
    turns.Row("equinox, jax.jit, donated", (0.6, 0.6, 0.6)),
]


def test_best_takes_the_least_median_of_each_kind() -> None:
    expected = {"best eager torch": 1.0, "luxtorch eager": 0.5, "lt.jit, donated": 0.1, "best JAX": 0.2}
    assert report.best(ROWS) == pytest.approx(expected)


def test_every_candidate_is_of_one_kind() -> None:
    rows = pytest.importorskip("benchmarks.torch_rows")
    for problem in problems.PROBLEMS.values():
        for name in rows.candidates(problem):
            assert sum(of(name) for of in report.KINDS.values()) == 1, name


def test_tables_have_a_cell_for_each_column() -> None:
    for table in (report.table(ROWS), report.summary({"W1": ROWS}), report.costs({"W1": ROWS})):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "a / b" in report.table(ROWS)
    assert "| luxtorch, ComponentVector | 1.5e+06 | 0.500 | 0.500 to 3.000 | 0.00 |  | 0 |" in report.table(ROWS)
    assert "| 10 |  |  |  | 0.00 |  | 0 | 12.2 | 2.5 | 47 |" in report.costs({"W1": ROWS})


def test_picture(tmp_path: Path) -> None:
    report.draw(report.markdown({"W1": ROWS, "B5-64": ROWS}, [], "report.png"), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_keeps_what_is_around_the_table() -> None:
    page = f"before\n{report.START}\nold\n{report.END}\nafter\n"
    assert report.replace_between(page, "new") == f"before\n{report.START}\n\nnew\n\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="no lines"):
        report.replace_between("before", "new")


def test_problems_that_are_measured_again_replace_theirs_in_the_report_and_say_so() -> None:
    old = report.markdown({name: ROWS for name in ("W2", "W3")}, ["a machine"], "report.png")
    assert report.updated(old, {}, ["a machine"]) == old
    faster = [*ROWS[:-1], turns.Row("equinox, jax.jit", (0.03, 0.03, 0.03))]
    new = report.updated(old, {"W3": faster, "W1": ROWS, "W11-100": ROWS}, ["a machine", "9 rounds"])
    assert [title.partition(":")[0] for title in report.bests(new)] == ["W1", "W2", "W3", "W11-100"]
    assert [round(of_kind["best JAX"], 3) for of_kind in report.bests(new).values()] == [0.2, 0.2, 0.01, 0.2]
    said = [
        part.partition(":")[0] for part in new.split("\n## ")[3:] if "Measured by itself: a machine; 9 rounds." in part
    ]
    assert said == ["W1", "W3", "W11-100"] and new.startswith(old[:300])
    again = report.updated(new, {"W3": ROWS, "W1": ROWS, "W11-100": ROWS}, ["a machine", "9 rounds"])
    assert report.best_table(again) == report.summary({name: ROWS for name in ("W1", "W2", "W3", "W11-100")})


def test_the_committed_report_can_be_updated() -> None:
    path = Path(problems.__file__).parent / "report.md"
    text = path.read_text()
    new = report.updated(text, {"W14": ROWS}, ["a machine"])
    kept = [line for line in text.splitlines() if line.startswith("| W") and not line.startswith("| W14")]
    assert len(kept) > 10 and set(kept) <= set(new.splitlines()), path


@pytest.mark.parametrize(("value", "agrees"), [(1.0, True), (1.000004, True), (1.00001, False), (math.nan, False)])
def test_disagreement(value: float, agrees: bool) -> None:
    assert (turns.disagreement([value], [1.0]) == "") is agrees
    assert (turns.disagreement([0.001 * value], [0.001]) == "") is agrees


@pytest.mark.slow
def test_candidates_take_turns_in_processes_of_their_own() -> None:
    settings = turns.Settings({"torch": sys.executable}, "cpu", threads=1, rounds=3, seconds=0.01)
    chosen = [("torch", name) for name in ("torch.nn + torch.optim", "luxtorch, dict", "no such candidate")]
    (first, second, third), versions = turns.measure(problems.PROBLEMS["W1"], chosen, settings)
    assert len(first.seconds) == len(second.seconds) == 3
    assert min(first.seconds) > 0 and 0 < first.peak < 4096
    assert "KeyError" in third.error and not third.seconds
    assert "luxtorch" in versions["torch"]


@pytest.mark.slow
def test_another_checkout_is_timed_beside_this_one(tmp_path: Path) -> None:
    for folder in ("benchmarks", "luxtorch"):
        shutil.copytree(turns.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "luxtorch/__init__.py").write_text("raise ImportError('this is the other one')")
    settings = turns.Settings({"torch": sys.executable}, "cpu", threads=1, rounds=2, seconds=0.01, against=tmp_path)
    chosen = [("torch", f"luxtorch, dict{ending}") for ending in (turns.BEFORE, "")]
    (before, now), _ = turns.measure(problems.PROBLEMS["W1"], chosen, settings)
    assert "this is the other one" in before.error and now.seconds


def test_changes_are_the_median_ratios_of_the_rounds() -> None:
    rows = [turns.Row("a, before", (1.0, 2.0, 4.0)), turns.Row("a", (2.0, 4.0, 8.0)), turns.Row("b", (1.0, 1.0, 1.0))]
    assert report.changes(rows) == ["a: 2.000 of before (2.000 to 2.000)"]


@pytest.mark.slow
def test_jax_agrees() -> None:
    pythons, missing = turns.interpreters(str(turns.ROOT / ".venv-jax/bin/python"))
    if missing:
        pytest.skip(missing)
    settings = turns.Settings(pythons, "cpu", threads=1, rounds=1, seconds=0.01)
    main = [problem for problem in problems.PROBLEMS.values() if problem.main]
    for problem, names in zip(main, turns.candidates(main, pythons).values(), strict=True):
        of_jax = [(side, name) for side, name in names if side == "jax"]
        rows, _ = turns.measure(problem, [names[0], *of_jax], settings)
        assert [row.error for row in rows] == [""] * len(rows), problem.name
