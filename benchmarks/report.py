"""The report: tables in Markdown, and a picture of the best of each kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .problems import PROBLEMS
from .turns import BEFORE, Row

_JAX = ("equinox", "flax", "optax", "jax")
KINDS = {
    "best eager torch": lambda name: not name.startswith(("luxtorch", "lt.jit", *_JAX, "torch.compile")),
    "best torch.compile": lambda name: name.startswith("torch.compile"),
    "best JAX": lambda name: name.startswith(_JAX),
    "luxtorch eager": lambda name: name.startswith("luxtorch") and "donate" not in name,
    "luxtorch eager, donated": lambda name: name.startswith("luxtorch") and "donate" in name,
    "lt.jit": lambda name: name.startswith("lt.jit") and "donated" not in name,
    "lt.jit, donated": lambda name: name.startswith("lt.jit") and "donated" in name,
}
"""Columns of the summary, and which candidates each is the best of."""

BEST, COSTS = "The best of each kind", "First calls and memory"
"""Headings of the report that are not of one problem."""

FIRST_CALLS = (
    "Of the fastest of each kind. The first call is that of the step, with an empty cache, and with all that the next "
    "three still compile; again is the same in a second process, which finds what the first has compiled."
)

START, END = "<!-- the runner writes from here -->", "<!-- to here -->"


def ratios(rows: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """Return for each candidate that ran its times relative to the median of the first of them."""
    ran = [row for row in rows if row.seconds]
    return {row.candidate: tuple(time / statistics.median(ran[0].seconds) for time in row.seconds) for row in ran}


def best(rows: Sequence[Row]) -> dict[str, float]:
    """Return the least median ratio of each kind; kinds without candidates are left out."""
    medians = {name: statistics.median(values) for name, values in ratios(rows).items()}
    found = {kind: [ratio for name, ratio in medians.items() if of(name)] for kind, of in KINDS.items()}
    return {kind: min(values) for kind, values in found.items() if values}


def changes(rows: Sequence[Row]) -> list[str]:
    """Return a line for each candidate that another checkout ran too: median and middle half of the ratios."""
    before = {row.candidate.removesuffix(BEFORE): row for row in rows if row.candidate.endswith(BEFORE)}
    lines = []
    for row in rows:
        if row.candidate in before and row.seconds and before[row.candidate].seconds:
            pairs = zip(row.seconds, before[row.candidate].seconds, strict=False)  # a slower one has fewer turns
            low, middle, high = statistics.quantiles([now / then for now, then in pairs], n=4)
            lines.append(f"{row.candidate}: {middle:.3f} of before ({low:.3f} to {high:.3f})")
    return lines


def summary(results: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of the best of each kind, one row a problem."""
    lines = [f"| problem | {' | '.join(KINDS)} |", "| --- |" + " ---: |" * len(KINDS)]
    for name, rows in results.items():
        of_kind = best(rows)
        cells = (f"{of_kind[kind]:.3g}" if kind in of_kind else "" for kind in KINDS)
        lines.append(f"| {name}: {PROBLEMS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(results: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of what the fastest of each compiled kind costs before its steps and beside them."""
    kinds = ("torch.compile", "JAX", "lt.jit")
    heads = (f"{kind}: first s | again s | MiB" for kind in kinds)
    lines = [f"| problem | eager torch: MiB | {' | '.join(heads)} |", "| --- |" + " ---: |" * (1 + 3 * len(kinds))]
    for name, rows in results.items():
        medians = {row: statistics.median(row.seconds) for row in rows if row.seconds}

        def fastest(kind: str, medians: Mapping[Row, float] = medians) -> Row | None:
            return min((row for row in medians if KINDS[kind](row.candidate)), key=medians.__getitem__, default=None)

        jitted = [row for row in (fastest("lt.jit"), fastest("lt.jit, donated")) if row]
        eager, best_of = fastest("best eager torch"), (fastest("best torch.compile"), fastest("best JAX"))
        cells = [f"{eager.peak:.0f}" if eager else ""]
        for row in (*best_of, min(jitted, key=medians.__getitem__, default=None)):
            cells += [_seconds(row.first), _seconds(row.again), f"{row.peak:.0f}"] if row else [""] * 3
        lines.append(f"| {name}: {PROBLEMS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Return the table of one problem."""
    relative = ratios(rows)
    lines = [
        "| candidate | median us | ratio | middle half | first call s | again s | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if not row.seconds:
            lines.append(f"| {row.candidate} | {row.error.replace('|', '/')} | | | | | |")
            continue
        low, middle, high = _quartiles(relative[row.candidate])
        microseconds = statistics.median(row.seconds) * 1e6
        lines.append(
            f"| {row.candidate} | {microseconds:.4g} | {middle:.3f} | {low:.3f} to {high:.3f} "
            f"| {_seconds(row.first)} | {_seconds(row.again)} | {row.peak:.0f} |"
        )
    return "\n".join(lines)


def markdown(results: Mapping[str, Sequence[Row]], about: Sequence[str], picture: str) -> str:
    """Return the report."""
    parts = [
        "# Benchmark report",
        "\n".join(f"- {line}" for line in about),
        "Ratios are to the first candidate of each problem; less is faster. Memory is what the process held at most "
        "while it was timed, beyond an idle one.",
        f"![The best of each kind]({picture})",
        f"## {BEST}",
        summary(results),
        f"## {COSTS}",
        FIRST_CALLS,
        costs(results),
    ]
    for name, rows in results.items():
        parts += [f"## {name}: {PROBLEMS[name].title}", table(rows)]
    return "\n\n".join(parts) + "\n"


def updated(report: str, results: Mapping[str, Sequence[Row]], about: Sequence[str]) -> str:
    """Return a report with some problems measured again, of which it says so; the others stay as they are."""
    first, sections = _sections(report)
    tables = {BEST: summary(results), COSTS: costs(results)}
    for heading, new in tables.items():
        lines = {_problem(line): line for text in (sections.get(heading, ""), new) for line in text.splitlines()}
        tables[heading] = "\n".join([*new.splitlines()[:2], *(lines[name] for name in _ordered(lines))])
    tables[COSTS] = f"{FIRST_CALLS}\n\n{tables[COSTS]}"
    own = {_problem(heading): f"## {heading}\n\n{text}" for heading, text in sections.items() if heading not in tables}
    for name, rows in results.items():
        said = f"Measured by itself: {'; '.join(about)}."
        own[name] = f"## {name}: {PROBLEMS[name].title}\n\n{said}\n\n{table(rows)}"
    parts = [first, *(f"## {heading}\n\n{text}" for heading, text in tables.items())]
    return "\n\n".join([*parts, *(own[name] for name in _ordered(own))]) + "\n"


def bests(report: str) -> dict[str, dict[str, float]]:
    """Return the ratios of a report's summary, by the titles of the problems, and by kinds."""
    found = {}
    for line in best_table(report).splitlines()[2:]:
        title, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        found[title] = {kind: float(cell) for kind, cell in zip(KINDS, cells, strict=False) if cell}
    return found


def best_table(report: str) -> str:
    """Return the summary of a report."""
    return _sections(report)[1][BEST]


def _sections(report: str) -> tuple[str, dict[str, str]]:
    """Return what stands before the first heading, and the texts under the headings."""
    first, *others = report.split("\n## ")
    return first.strip(), {one.partition("\n")[0]: one.partition("\n")[2].strip() for one in others}


def _problem(line: str) -> str:
    """Return the name of the problem that a line of a table or a heading is about."""
    return line.removeprefix("| ").partition(":")[0]


def _ordered(names: Iterable[str]) -> list[str]:
    """Return names in the order of the problems; those of no problem are left out."""
    return [name for name in PROBLEMS if name in set(names)]


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def draw(report: str, path: Path) -> None:
    """Draw the summary of a report, one line a problem."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = bests(report)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.36 * len(found)), layout="constrained")
    for kind, marker in zip(KINDS, "o^sDdPX", strict=True):
        points = [(ratios[kind], i) for i, ratios in enumerate(found.values()) if kind in ratios]
        axes.plot(*zip(*points, strict=True), marker, label=kind, alpha=0.8) if points else None
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="time relative to the first candidate, such as torch.nn + torch.optim")
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def replace_between(page: str, text: str) -> str:
    """Return a page with a text in the place of what is between the marks."""
    before, _, rest = page.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"The page has no lines {START} and {END}.")
    return f"{before}{START}\n\n{text}\n\n{END}{after}"


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
