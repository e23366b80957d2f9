"""Deprecated names: the old place goes on working, and warns where the name is now."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from warnings import warn


def moved(module: str, names: str, to: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module, in which names still stand that have moved to another one.

    Args:
        module: The module that they have left, its `__name__`.
        names: The names, with spaces between.
        to: The module where they are now.

    Example:
        >>> __getattr__ = moved("luxtorch.surgery", "capture summary", to="luxtorch.inspect")
    """
    old = frozenset(names.split())

    def __getattr__(name: str) -> Any:
        if name not in old:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warn(f"{module}.{name} has moved: use {to}.{name}.", DeprecationWarning, stacklevel=2)
        return getattr(import_module(to), name)

    return __getattr__
