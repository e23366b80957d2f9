"""The global random generators of torch, NumPy and Python: tell whether they were used, reseed and restore them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def generators() -> dict[str, Any]:
    """Return the states of the global generators that there are."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "Python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["torch on CUDA"] = torch.cat(torch.cuda.get_rng_state_all())
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        found["NumPy"] = (name, keys.tobytes(), *rest)
    return found


def moved(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name the generators that have moved on."""
    return [name for name, state in before.items() if not _equal(state, after[name])]


def _equal(a: Any, b: Any) -> bool:
    # Under forward-mode transforms, a tensor cannot become an array or bytes.
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def reseed(seed: int) -> None:
    """Set the global generators to a seed."""
    torch.manual_seed(seed)  # noqa: TID251  # between times, `restored` puts them back
    random.seed(seed)  # noqa: TID251
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@contextmanager
def restored() -> Iterator[None]:
    """Put the global generators back afterwards."""
    own, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialized else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(of_numpy)
