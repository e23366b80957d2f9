"""Words of transforms on functions of one tree, and the loop of Python that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch.core import tensors
from luxtorch.core._tree import tree_map

F64 = torch.float64


def eager(f: Any) -> Any:
    """Return the function itself."""
    return f


def replayed(f: Any) -> Any:
    """Return the function, traced and replayed."""
    return lt.jit(f, backend="replay")


HOW = pytest.mark.parametrize("how", [eager, replayed])
WORDS = ["".join(word) for length in (1, 2, 3) for word in product("RFV", repeat=length)]
"""All words of reverse mode, forward mode and vmap, the outermost first."""
LONG = [pytest.param(word, marks=pytest.mark.slow) if len(word) > 2 else word for word in WORDS]
"""The same, those of three letters for the slow tests."""
SCALES = torch.tensor([1.0, 0.7, -0.4], dtype=torch.float64)


def apply(word: str, f: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Return the function of one number that a word of transforms makes of one."""
    for place, letter in enumerate(reversed(word)):
        f = LETTERS[letter](f, place)
    return f


def direction(like: Tensor, place: int) -> Tensor:
    return torch.cos(torch.arange(like.numel(), dtype=like.dtype) + place + 1).reshape(like.shape)


def _reverse(f: Any, place: int) -> Any:
    def along(theta: Any) -> Tensor:
        slopes = torch.func.grad(f)(theta)
        return sum((s * direction(s, place)).sum() for s in tensors(slopes))  # type: ignore[return-value]

    return along


def _forward(f: Any, place: int) -> Any:
    def along(theta: Any) -> Tensor:
        tangents = tree_map(lambda x: direction(x, place).expand_as(x), theta)
        return torch.func.jvp(f, (theta,), (tangents,))[1]

    return along


def _batch(f: Any, place: int) -> Any:
    def many(theta: Any) -> Tensor:
        batch = tree_map(lambda x: torch.stack([x * s for s in SCALES]), theta)
        return (torch.vmap(f)(batch) * (SCALES + place)).sum()

    return many


LETTERS: dict[str, Any] = {"R": _reverse, "F": _forward, "V": _batch}


def loop(f: Any, init: Any, xs: Any = None, length: int | None = None, *, reverse: bool = False) -> Any:
    """Scan by a loop of Python."""
    n = length if length is not None else tensors(xs)[0].shape[0]
    carry, ys = init, []
    for i in reversed(range(n)) if reverse else range(n):
        carry, y = f(carry, tree_map(lambda x: x[i], xs))  # noqa: B023
        ys.append(y)
    if reverse:
        ys.reverse()
    return carry, tree_map(lambda *leaves: torch.stack(leaves), ys[0], *ys[1:])
