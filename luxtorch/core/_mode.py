"""Switching a model between training and testing, and setting states by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luxtorch._errors import KeyNameError, suggest

from ._layer import States
from ._static import Static

TRAINING = "training"
"""The name under which a layer keeps whether it is being trained, as a `Static` bool."""


def train_mode(st: States) -> dict[str, Any]:
    """Return the states with every layer set to training; models start out so.

    Args:
        st: The states of a model.

    Returns:
        New states; those passed in stay as they are.

    Example:
        >>> import luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Dropout(0.5))
        >>> lt.test_mode(st)["training"], lt.train_mode(lt.test_mode(st))["training"]
        (Static(False), Static(True))
    """
    return _replaced(st, TRAINING, Static(True))


def test_mode(st: States) -> dict[str, Any]:
    """Return the states with every layer set to testing: no dropout, running statistics used as they are.

    Args:
        st: The states of a model.

    Returns:
        New states; those passed in stay as they are.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Dropout(0.5)
        >>> ps, st = lt.setup(0, model)
        >>> y, _ = model(torch.ones(3), ps, lt.test_mode(st))
        >>> y
        tensor([1., 1., 1.])
    """
    return _replaced(st, TRAINING, Static(False))


test_mode.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def update_state(st: States, name: str, value: Any) -> dict[str, Any]:
    """Return the states with every entry called `name` set to a value.

    Args:
        st: The states of a model.
        name: The last part of the entries' paths.
        value: The new value, the same for all.

    Returns:
        New states; those passed in stay as they are.

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
        raise KeyNameError(
            f"No state is called '{name}'.",
            expected=", ".join(sorted(names)) or "no names at all",
            got=name,
            fix=suggest(name, names),
        )
    return _replaced(st, name, value)


def _replaced(tree: States, name: str, value: Any) -> dict[str, Any]:
    return {
        key: _replaced(entry, name, value) if isinstance(entry, Mapping) else value if key == name else entry
        for key, entry in tree.items()
    }


def _entry_names(tree: States) -> list[str]:
    names = []
    for key, entry in tree.items():
        names += _entry_names(entry) if isinstance(entry, Mapping) else [key]
    return names
