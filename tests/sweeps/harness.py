"""What the sweeps share: torch's own samples, how results are compared, and the table of what came out."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

import luxtorch as lt

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"

COUNTED = "2.14"
"""The version of torch whose samples the table in `PAGE` counts; those of others are checked, not counted."""

ALL = os.environ.get("SWEEP") == "all"
"""Whether every sample is tried, not only a few of each operator; nothing is counted then."""

WRITE = os.environ.get("TABLES") == "write"
"""Whether the table is written anew, instead of being compared."""


class Difference(AssertionError):
    """Report that a result is not what it should be."""


class Result(NamedTuple):
    """Say how one call went.

    Attributes:
        name: The operator, with its sample and form where that helps.
        kind: `"equal"`, `"refused"` with a clear error, `"wrong"`, or `"crash"` with torch's insides.
        words: What is wrong.
        place: Which of the samples, and in which form.
        beyond_torch: Of a refused one, how torch fails at it; empty if torch can do it, None if it was not asked.
    """

    name: str
    kind: str
    words: str
    place: Any = ""
    beyond_torch: str | None = None


@functools.cache
def database(module: str, name: str) -> list[Any]:
    """Return one of torch's databases of samples, e.g. `common_methods_invocations` and `op_db`."""
    pytest.importorskip("expecttest", reason="torch's databases import it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are in beta, and the like
        return getattr(importlib.import_module(f"torch.testing._internal.{module}"), name)  # type: ignore[no-any-return]


def operators() -> list[Any]:
    return database("common_methods_invocations", "op_db")


def label(op: Any) -> str:
    return op.name + (f"[{op.variant_test_name}]" if op.variant_test_name else "")


def samples(op: Any, dtype: torch.dtype, limit: int, requires_grad: bool = False) -> list[Any]:
    """Return samples of an operator, the same in every run, spread over all that there are."""
    if not op.supports_dtype(dtype, "cpu"):
        return []
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        found = list(op.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    return found if ALL or len(found) <= limit else [found[i * len(found) // limit] for i in range(limit)]


def copied(tree: Any) -> Any:
    """Return a tree with copies of its tensors."""
    return optree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def check_same(got: Any, wanted: Any, tolerance: float = 1e-10, numbers: bool = True, strides: bool = True) -> None:
    """Raise if two results differ in structure, type, dtype, shape, strides or numbers."""
    ones, spec = optree.tree_flatten(got)
    others, other = optree.tree_flatten(wanted)
    if spec != other:
        raise Difference(f"structure {spec} against {other}")
    for one, two in zip(ones, others, strict=True):
        if type(one) is not type(two):
            raise Difference(f"{type(one).__name__} against {type(two).__name__}")
        if not isinstance(two, Tensor):
            if one != two and not (one != one and two != two):
                raise Difference(f"{one!r} against {two!r}")
            continue
        for what in ("dtype", "shape", "layout", "device"):
            if getattr(one, what) != getattr(two, what):
                raise Difference(f"{what} {getattr(one, what)} against {getattr(two, what)}")
        if strides and two.layout is torch.strided and two.numel() > 1 and not _lie_alike(one, two):
            raise Difference(f"strides {one.stride()} against {two.stride()} for the shape {tuple(two.shape)}")
        if numbers:
            _compare(one, two, tolerance)


def _lie_alike(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors of one shape have the same strides, where these matter."""
    triples = zip(two.shape, one.stride(), two.stride(), strict=True)
    return all(a == b for size, a, b in triples if size > 1)


def _compare(one: Tensor, two: Tensor, tolerance: float) -> None:
    if two.layout is not torch.strided:
        one, two = one.to_dense(), two.to_dense()
    exact = not (two.is_floating_point() or two.is_complex())
    # Low precision: the order of the operations may change the last digits.
    tolerance = max(tolerance, 4 * torch.finfo(two.dtype).eps) if not exact else 0.0
    same = torch.equal(one, two) if exact else torch.allclose(one, two, tolerance, tolerance, equal_nan=True)
    if not same:
        raise Difference(f"{one.flatten()[:3].tolist()} against {two.flatten()[:3].tolist()}")


_CLEAR = (
    "Trying to use forward AD with",
    "vmap: called random operation",
    "vmap: we do not yet support",
    "does not yet have a batching rule",
    "must override the setup_context",
)
"""How torch says that a transform has no rule for an operator."""


def outcome(call: Callable[[], Any], check: Callable[[Any], None]) -> tuple[str, str]:
    """Call, and tell how it went, as in `Result`."""
    try:
        got = call()
    except lt.LuxtorchError as error:
        return "refused", str(error).splitlines()[0]
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return "refused" if any(words in text for words in _CLEAR) else "crash", f"{type(error).__name__}: {text}"
    try:
        check(got)
    except Difference as difference:
        return "wrong", str(difference)
    return "equal", ""


def report(title: str, results: list[Result], exceptions: Mapping[str, str]) -> None:
    """Fail if anything differs that is not an exception, if one is needed no more, or if the table says else."""
    assert results, f"{title}: nothing was tried"
    differing = [result for result in results if result.kind in ("wrong", "crash") or result.beyond_torch == ""]
    new = [result for result in differing if result.name not in exceptions]
    if new:
        lines = [f"{one.name} ({one.place}): {one.kind}: {one.words}" for one in new]
        pytest.fail(f"{title}: {len(new)} of {len(results)} differ:\n" + "\n".join(lines))
    needless = exceptions.keys() - {result.name for result in differing}
    if not torch.__version__.startswith(COUNTED) or ALL:
        return  # another version may have mended its own faults
    assert not needless, f"{title}: no exceptions any more: {sorted(needless)}"
    kinds = [result.kind for result in results]
    names = {result.name for result in results}
    refused = [result for result in results if result.kind == "refused"]
    beyond: dict[str, list[str]] = {}
    for result in refused:
        beyond.setdefault(result.beyond_torch or "", []).append(result.name)
    number = "–" if beyond.pop("", None) else sum(map(len, beyond.values()))
    counts = len(names), len(results), kinds.count("equal"), len(refused), number, len(differing)
    lines = [f"| {title} | " + " | ".join(map(str, counts)) + " |"]
    for words, found in beyond.items():
        lines.append(f"- {title}, `{'`, `'.join(sorted({*found}))}`: Nor can torch: {words}")
    lines += [f"- {title}, `{name}`: {reason}" for name, reason in sorted(exceptions.items())]
    text = PAGE.read_text()
    if WRITE:
        PAGE.write_text(_rewritten(text, title, lines))
    elif any(f"{line}\n" not in text for line in lines):
        pytest.fail(f"The table in docs/{PAGE.name} says else; `make tables` writes it anew:\n" + "\n".join(lines))


def _rewritten(text: str, title: str, lines: list[str]) -> str:
    """Return the page with the lines of one sweep replaced; the rows and the exceptions are in alphabetical order."""
    before, header, after = text.partition("| sweep |")
    columns, rule, *old = (header + after).splitlines()
    starts = (f"| {title} |", f"- {title}, `")
    kept = [line for line in old if line and not line.startswith(starts)] + lines
    rows, notes = (sorted(line for line in kept if line.startswith(mark)) for mark in "|-")
    return before + "\n".join([columns, rule, *rows, "", *notes, ""])
