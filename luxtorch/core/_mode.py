"""States of a model: constants in them, train and test mode, and updates by name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from luxtorch._errors import unknown_name

from ._layer import States
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


TRAINING = "training"
"""The name of the state that tells whether a layer is in training mode, a `Static` bool."""


def train_mode(st: States) -> dict[str, Any]:
    """Return the states with every layer in training mode, which is the initial one.

    Args:
        st: The states of a model.

    Returns:
        New states; those passed in are not changed.

    Example:
        >>> import luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Dropout(0.5))
        >>> lt.test_mode(st)["training"], lt.train_mode(lt.test_mode(st))["training"]
        (Static(False), Static(True))
    """
    return _with_entries(st, TRAINING, Static(True))


def test_mode(st: States) -> dict[str, Any]:
    """Return the states with every layer in test mode: no dropout, and running statistics are used and not updated.

    Args:
        st: The states of a model.

    Returns:
        New states; those passed in are not changed.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Dropout(0.5)
        >>> ps, st = lt.setup(0, model)
        >>> y, _ = model(torch.ones(3), ps, lt.test_mode(st))
        >>> y
        tensor([1., 1., 1.])
    """
    return _with_entries(st, TRAINING, Static(False))


test_mode.__test__ = False  # type: ignore[attr-defined]  # so that pytest does not collect it


def update_state(st: States, name: str, value: Any) -> dict[str, Any]:
    """Return the states with every entry called `name` set to a value.

    Args:
        st: The states of a model.
        name: The last part of the entries' paths.
        value: The new value, the same for all.

    Returns:
        New states; those passed in are not changed.

    Raises:
        KeyNameError: If no entry has that name.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Chain(lt.BatchNorm(2)))
        >>> lt.update_state(st, "running_var", 4 * torch.ones(2))["layer_1"]["running_var"]
        tensor([4., 4.])
    """
    names = set(_entry_names(st))
    if name not in names:
        raise unknown_name(name, sorted(names), "state")
    return _with_entries(st, name, value)


def _with_entries(tree: States, name: str, value: Any) -> dict[str, Any]:
    return {
        key: _with_entries(entry, name, value) if isinstance(entry, Mapping) else value if key == name else entry
        for key, entry in tree.items()
    }


def _entry_names(tree: States) -> list[str]:
    names = []
    for key, entry in tree.items():
        names += _entry_names(entry) if isinstance(entry, Mapping) else [key]
    return names
