"""`Static`: constants in a pytree that are part of its structure, such as the mode of a layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ._tree import register_constant

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Static(Generic[H]):
    """Hold a value that is part of a tree's structure, not one of its leaves.

    The transforms of torch.func accept tensors only as leaves, so a flag such as "training" cannot be
    one. A `Static` has no leaves at all: it passes through grad, vmap, jvp and compile unchanged, and a
    compiled graph is specialized on its value.

    Args:
        value: Any hashable value.

    Example:
        >>> import torch
        >>> state = {"training": Static(True), "count": torch.zeros(())}
        >>> torch.utils._pytree.tree_leaves(state)
        [tensor(0.)]
    """

    value: H

    def __bool__(self) -> bool:
        return bool(self.value)

    def __repr__(self) -> str:
        return f"Static({self.value!r})"


# torch.compile looks whether the flags of two layers are one object, and compiles anew if that changes.
_FLAGS = {flag: Static(flag) for flag in (False, True)}


def _made(value: H) -> Static[H]:
    return _FLAGS[value] if value is True or value is False else Static(value)  # type: ignore[return-value]


# Strict torch.export can hold a number or a string in a structure, but no object.
register_constant(Static, lambda static: static.value, _made)
# States are saved and loaded as plain data.
torch.serialization.add_safe_globals([Static])
