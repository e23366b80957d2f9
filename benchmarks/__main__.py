"""The command: `python -m benchmarks [problems]`; `make bench` calls it."""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import sys
from pathlib import Path

from .problems import PROBLEMS
from .report import best_table, changes, draw, markdown, replace_between, updated
from .turns import BEFORE, ROOT, Row, Settings, candidates, interpreters, measure

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("problems", nargs="*", help="names or patterns, such as W1 'B1-*'; the main ones by default")
    parser.add_argument("--candidates", nargs="*", help="names or patterns, such as 'lt.jit*'; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(_cores()), help="threads of each candidate")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.15, help="the length of a turn")
    parser.add_argument("--jax", default=str(ROOT / ".venv-jax/bin/python"), help="the interpreter that has JAX")
    parser.add_argument("--against", type=Path, help="another checkout, whose luxtorch is timed beside this one")
    parser.add_argument(
        "--update", action="store_true", help="replace these problems in the committed report, which says so"
    )
    parser.add_argument("--out", type=Path, help="the folder for report.md and report.png")
    options = parser.parse_args()
    if options.update and (options.candidates or options.against or options.out or options.device != "cpu"):
        parser.error("--update is for whole problems, on the CPU, in the committed report")
    return options


def main() -> int:
    """Measure and report; the exit status is 1 if candidates disagree."""
    options = arguments()
    patterns = options.problems
    chosen = [p for p in PROBLEMS.values() if _matches(p.name, patterns) or (not patterns and p.main)]
    if not chosen:
        print(f"There is no such problem; these are there: {' '.join(PROBLEMS)}", file=sys.stderr)
        return 2
    pythons, missing = interpreters(options.jax)
    if options.device != "cpu":
        pythons, missing = {"torch": sys.executable}, "on a GPU only torch is timed"
    against = options.against.resolve() if options.against else None
    settings = Settings(pythons, options.device, options.threads, options.rounds, options.seconds, against)
    results: dict[str, list[Row]] = {}
    versions: dict[str, str] = {}
    partial = bool(patterns or options.candidates or against)
    committed = options.update or not partial
    out = options.out or (HERE if committed else HERE / "results")
    before = (HERE / "report.md").read_text() if options.update else ""
    out.mkdir(parents=True, exist_ok=True)
    names = candidates(chosen, pythons)
    for problem in chosen:
        print(f"{problem.name}: {problem.title}", flush=True)
        wanted = [one for one in names[problem.name] if not options.candidates or _matches(one[1], options.candidates)]
        if against:
            ours = [one for one in wanted if one[1].startswith(("luxtorch", "lt.jit"))]
            wanted = [(side, name + ending) for side, name in ours for ending in (BEFORE, "")]
        results[problem.name], found = measure(problem, wanted, settings)
        versions |= found
        for line in changes(results[problem.name]):
            print(f"  {line}", flush=True)
        about = _about(settings, versions, missing)
        report = updated(before, results, about) if before else markdown(results, about, "report.png")
        (out / "report.md").write_text(report)  # as far as it is: a long run may be stopped
        draw(report, out / "report.png")
    if committed and options.device == "cpu":
        page = ROOT / "docs/performance.md"
        page.write_text(replace_between(page.read_text(), best_table(report)))
    print(f"Written to {out}/report.md")
    return any(row.error.startswith("disagrees") for rows in results.values() for row in rows)


def _about(settings: Settings, versions: dict[str, str], missing: str) -> list[str]:
    return [
        f"{platform.machine()}, {os.cpu_count()} cores, {settings.threads} threads for each candidate, Python "
        f"{platform.python_version()}, device {settings.device}",
        f"{settings.rounds} shuffled rounds of {settings.seconds} s, a process for each candidate, one at a time",
        *versions.values(),
        *([f"No JAX: {missing}."] if missing else []),
    ]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}-") for pattern in patterns)


def _cores() -> range:
    return range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
