"""Train and test mode of a model, and updates of states by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luxtorch._errors import unknown_name

from ._layer import States
from ._static import Static

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
