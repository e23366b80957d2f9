"""Choosing parameters by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from luxtorch.core import KeyNameError, suggest

Path: TypeAlias = "str | Callable[[str], bool] | None"
"""A dotted path such as "layer_1", which stands for everything below it; or a predicate on names; or all."""


def select(path: Path, names: Sequence[str]) -> set[str]:
    """Return the names that a path stands for.

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
    problem = f"No parameter is named '{path}'." if isinstance(path, str) else "The predicate is true of no parameter."
    raise KeyNameError(
        problem,
        expected=", ".join(names[:20]) + (", ..." if len(names) > 20 else ""),
        fix=suggest(path, _prefixes(names)) if isinstance(path, str) else "It is called with each dotted name.",
    )


def _prefixes(names: Sequence[str]) -> list[str]:
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)))
