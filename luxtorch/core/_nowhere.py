"""A key, and inputs, without numbers, for finding out names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._tree import tree_map

NOWHERE = torch.empty(2, dtype=torch.uint64, device="meta")
"""A key on the meta device: what is drawn from it has a name, a shape and a dtype, and costs nothing."""


def without_numbers(x: Any) -> Any:
    """Return an input on the meta device; instead of one, its shape may be given."""
    if isinstance(x, Sequence) and all(isinstance(size, int) for size in x):
        return torch.empty(tuple(x), device="meta")
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, x)
