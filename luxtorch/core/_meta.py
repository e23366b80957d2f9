"""Meta-device keys and inputs, to infer names, shapes and dtypes without allocating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._tree import map_tensors

META_KEY = torch.empty(2, dtype=torch.uint64, device="meta")
"""A key on the meta device: initial values from it have shapes and dtypes, and no memory."""


def to_meta(x: Any) -> Any:
    """Return an input, or one of a given shape, on the meta device."""
    if isinstance(x, Sequence) and all(isinstance(size, int) for size in x):
        return torch.empty(tuple(x), device="meta")
    return map_tensors(lambda leaf: leaf.to("meta"), x)
