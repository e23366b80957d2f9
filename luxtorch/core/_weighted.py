"""Which means were taken that are not plain ones, while somebody computes the parts of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_TAKEN: ContextVar[list[Any] | None] = ContextVar("weighted means", default=None)


@contextmanager
def watching_means() -> Iterator[list[Any]]:
    """Return a list to which each weighted mean that is taken meanwhile is added."""
    taken: list[Any] = []
    token = _TAKEN.set(taken)
    try:
        yield taken
    finally:
        _TAKEN.reset(token)


def watched_means() -> list[Any] | None:
    """Return the list, if somebody watches."""
    return None if torch.compiler.is_compiling() else _TAKEN.get()
