"""The report: tables in Markdown, and a picture of the best of each kind."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .problems import PROBLEMS
from .turns import BEFORE, Row

_JAX = ("equinox", "flax", "optax")
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
            pairs = zip(row.seconds, before[row.candidate].seconds, strict=True)
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


def table(rows: Sequence[Row]) -> str:
    """Return the table of one problem."""
    relative = ratios(rows)
    lines = [
        "| candidate | median us | ratio | middle half | compile s | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if not row.seconds:
            lines.append(f"| {row.candidate} | {row.error.replace('|', '/')} | | | | |")
            continue
        low, middle, high = _quartiles(relative[row.candidate])
        microseconds = statistics.median(row.seconds) * 1e6
        lines.append(
            f"| {row.candidate} | {microseconds:.4g} | {middle:.3f} | {low:.3f} to {high:.3f} "
            f"| {row.compile:.1f} | {row.peak:.0f} |"
        )
    return "\n".join(lines)


def markdown(results: Mapping[str, Sequence[Row]], about: Sequence[str], picture: str) -> str:
    """Return the report."""
    parts = [
        "# Benchmark report",
        "\n".join(f"- {line}" for line in about),
        "Ratios are to the first candidate of each problem; less is faster. Compilation is what the first 4 steps took "
        "beyond 4 usual ones. Memory is what the process held at most while it was timed, beyond an idle one.",
        f"![The best of each kind]({picture})",
        "## The best of each kind",
        summary(results),
    ]
    for name, rows in results.items():
        parts += [f"## {name}: {PROBLEMS[name].title}", table(rows)]
    return "\n\n".join(parts) + "\n"


def draw(results: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the best of each kind, one line a problem."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.36 * len(results)), layout="constrained")
    markers = dict(zip(KINDS, "o^sDdPX", strict=True))
    for kind, marker in markers.items():
        points = [(best(rows)[kind], i) for i, rows in enumerate(results.values()) if kind in best(rows)]
        axes.plot(*zip(*points, strict=True), marker, label=kind, alpha=0.8) if points else None
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="time relative to the first candidate, such as torch.nn + torch.optim")
    axes.set_yticks(range(len(results)), [f"{name}: {PROBLEMS[name].title}" for name in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
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
