"""Choosing parameters by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from luxtorch._errors import KeyNameError, suggest

Path: TypeAlias = "str | Callable[[str], bool] | None"
"""A dotted path such as "layer_1", which stands for everything below it; or a predicate on names; or all."""


def select(path: Path, names: Sequence[str], kind: str = "parameter") -> set[str]:
    """Return the names that a path stands for.

    Args:
        path: The path.
        names: The dotted names to choose from.
        kind: What they are the names of, for the error.

    Raises:
        KeyNameError: If there is none.
    """
    if path is None:
        return set(names)
    if isinstance(path, str):
        chosen = {name for name in names if name == path or name.startswith(f"{path}.")}
    else:
        chosen = {name for name in names if path(name)}
    if chosen:
        return chosen
    problem = f"No {kind} is named '{path}'." if isinstance(path, str) else f"The predicate is true of no {kind}."
    raise KeyNameError(
        problem,
        expected=", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or f"no {kind}, as there is none",
        fix=suggest(path, _prefixes(names)) if isinstance(path, str) else "It is called with each dotted name.",
    )


def select_any(paths: Sequence[Path], names: Sequence[str], kind: str = "parameter") -> list[str]:
    """Return the names that any of some paths stands for, in their order; without paths, all.

    Raises:
        KeyNameError: If a path stands for none.
    """
    if not paths:
        return list(names)
    chosen = set[str]().union(*(select(path, names, kind) for path in paths))
    return [name for name in names if name in chosen]


def _prefixes(names: Sequence[str]) -> list[str]:
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)))
