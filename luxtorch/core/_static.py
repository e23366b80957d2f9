"""Values that ride along in a tree of tensors without being tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import optree
import torch
import torch.utils._pytree as pytree

from ._tree import _EVERYWHERE

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Static(Generic[H]):
    """Hold a value that is part of a tree's structure, not one of its leaves.

    The transforms of torch.func accept tensors only as leaves, so a flag such as "training" cannot be
    one. A `Static` has no leaves at all: it passes through grad, vmap, jvp and compile unchanged, and a
    compiled graph is specialised on its value.

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


pytree.register_constant(Static)
optree.register_pytree_node(
    Static,  # type: ignore[arg-type]
    lambda node: ((), node),  # type: ignore[arg-type,return-value]
    lambda node, _: node,  # type: ignore[arg-type,return-value]
    namespace=_EVERYWHERE,
)
# States are saved and loaded as plain data.
torch.serialization.add_safe_globals([Static])
