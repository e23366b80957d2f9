"""Record of weighted means in losses, to combine the losses of microbatches correctly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_RECORD: ContextVar[list[Any] | None] = ContextVar("weighted means", default=None)


@contextmanager
def watching_means() -> Iterator[list[Any]]:
    """Yield a list to which each weighted mean that is computed inside is added."""
    record: list[Any] = []
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def watched_means() -> list[Any] | None:
    """Return the list, if weighted means are recorded."""
    return None if torch.compiler.is_compiling() else _RECORD.get()
