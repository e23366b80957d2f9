"""A key, and inputs, without numbers, for finding out names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._tree import map_tensors

NOWHERE = torch.empty(2, dtype=torch.uint64, device="meta")
"""A key on the meta device: what is drawn from it has a name, a shape and a dtype, and costs nothing."""


def without_numbers(x: Any) -> Any:
    """Return an input on the meta device; instead of one, its shape may be given."""
    if isinstance(x, Sequence) and all(isinstance(size, int) for size in x):
        return torch.empty(tuple(x), device="meta")
    return map_tensors(lambda leaf: leaf.to("meta"), x)
