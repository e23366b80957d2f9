"""Indexing by traced numbers, as in `x[i]` and `y[i] = x`: rows are gathered, as a trace has no values to choose by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

IsTraced: TypeAlias = Callable[[Tensor], bool]
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _is_traced_number(item: Any, is_traced: IsTraced) -> bool:
    """Tell whether an index is a whole number without a value."""
    return isinstance(item, Tensor) and not item.ndim and item.dtype in _INTEGERS and is_traced(item)


def taken(x: Tensor, index: Any, is_traced: IsTraced) -> Tensor:
    """Return `x[index]`."""
    place = _first(x, index, is_traced)
    if place is None:
        return x[index]
    dim, rows, rest = place
    return taken(x.index_select(dim, rows), rest, is_traced)


def put(x: Tensor, index: Any, value: Any, is_traced: IsTraced) -> None:
    """Do `x[index] = value`."""
    place = _first(x, index, is_traced)
    if place is None:
        x[index] = value
        return
    dim, rows, rest = place
    part = x.index_select(dim, rows)
    put(part, rest, value, is_traced)
    there = torch.arange(x.shape[dim], device=x.device) == rows  # vmap has no rule for index_copy_
    x.copy_(torch.where(there.view(-1, *[1] * (x.ndim - dim - 1)), part, x))


def _first(x: Tensor, index: Any, is_traced: IsTraced) -> tuple[int, Tensor, Any] | None:
    """Return the dimension of the first traced number, that number as rows, and the index into these rows instead."""
    items = index if isinstance(index, tuple) else (index,)
    at = next((n for n, item in enumerate(items) if _is_traced_number(item, is_traced)), None)
    if at is None:
        return None
    dim = sum(map(_dims, items[:at]))
    if any(item is ... for item in items[:at]):
        dim = x.ndim - sum(map(_dims, items[at:]))
    if not 0 <= dim < x.ndim:
        raise IndexError(f"too many indices for tensor of dimension {x.ndim}")
    number = items[at].long()
    rows = torch.where(number < 0, number + x.shape[dim], number).view(1)
    return dim, rows, (*items[:at], 0, *items[at + 1 :])


def _dims(item: Any) -> int:
    """Return how many dimensions an index takes."""
    if item is None or item is ... or isinstance(item, bool):
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1
