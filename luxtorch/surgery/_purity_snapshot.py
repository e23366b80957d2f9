"""A tree as it was at some time, to tell what was done to it since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luxtorch._transforms import unwrapped
from luxtorch.core import named_leaves, tree_structure
from luxtorch.core._values import physical


class _Kept(NamedTuple):
    """Hold a leaf of a tree, how often it was written to, and a copy of its numbers."""

    leaf: Any
    version: int
    copy: Any


class Snapshot:
    """Remember the leaves of a tree.

    Args:
        what: What the leaves are, such as "state".
        tree: The tree.
    """

    def __init__(self, what: str, tree: Any) -> None:
        self.what = what
        self._tree = tree
        self._structure = tree_structure(tree)
        self._kept = {name: _Kept(leaf, _version(leaf), _copy(leaf)) for name, leaf in named_leaves(tree)}

    @property
    def copies(self) -> dict[str, Any]:
        """Copies of the leaves by name, and those that are no tensors as they are."""
        return {name: kept.copy for name, kept in self._kept.items()}

    def changes(self) -> Iterator[str]:
        """Say what was done to the tree since then."""
        now = dict(named_leaves(self._tree))
        for name, (leaf, version, copy) in self._kept.items():
            title = self._titled(name)
            if name not in now:
                yield f"removes its {title} from the dict that it is given."
            elif _version(leaf) != version or not _equal(_copy(leaf), copy):
                yield f"changes its {title} in place."
            elif now[name] is not leaf:
                yield f"replaces its {title} in the dict that it is given."
        extra = [name for name in now if name not in self._kept]
        for name in extra:
            yield f"adds the {self._titled(name)} to the dict that it is given."
        if not extra and now.keys() == self._kept.keys() and tree_structure(self._tree) != self._structure:
            yield f"changes a switch in the {self.what}s that it is given."

    def faults(self, new: Any) -> Iterator[str]:
        """Say in what a tree that is returned departs from this one."""
        if not isinstance(new, Mapping):
            yield f"returns {type(new).__name__} instead of its states."
            return
        now = dict(named_leaves(new))
        for name, (leaf, *_) in self._kept.items():
            if name not in now:
                yield f"does not return the {self._titled(name)}."
            elif isinstance(leaf, Tensor):
                yield from self._leaf_faults(self._titled(name), leaf, now[name])
        for name in now:
            if name not in self._kept:
                yield f"returns the {self._titled(name)}, which it was not given."
        if now.keys() == self._kept.keys() and tree_structure(new) != self._structure:
            yield "returns states of another structure than it was given."

    def _leaf_faults(self, title: str, leaf: Tensor, new: Any) -> Iterator[str]:
        if not isinstance(new, Tensor):
            yield f"returns the {title} as {type(new).__name__}, which is no tensor."
            return
        if (new.shape, new.dtype) != (leaf.shape, leaf.dtype):
            came, went = (f"{each.dtype} {tuple(each.shape)}" for each in (leaf, new))
            yield f"returns the {title} as {went}, and was given {came}."
        if unwrapped(new).requires_grad:
            yield f"returns the {title} without detaching it."

    def _titled(self, name: str) -> str:
        return f"{self.what} '{name}'" if name else self.what


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    """Tell whether copies of trees are equal, to the bit."""
    return all(
        a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a) for a, b in zip(left, right, strict=True)
    )


def _version(leaf: Any) -> int:
    if not isinstance(leaf, Tensor) or leaf.is_inference():
        return 0
    return int(unwrapped(leaf)._version)


def _copy(leaf: Any) -> Any:
    return unwrapped(physical(leaf).clone()) if isinstance(leaf, Tensor) else leaf


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or (type(a) is type(b) and bool(a == b))
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
