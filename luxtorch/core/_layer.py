"""The layer: an immutable description of a computation, whose parameters and states live outside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from ._locate import located
from ._nowhere import NOWHERE
from ._value import Value

Parameters: TypeAlias = Mapping[str, Any]
"""A nested mapping from names to tensors: a dict, or a ComponentVector."""

States: TypeAlias = Mapping[str, Any]
"""A nested dict from names to tensors and `Static` values."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Layer(Value, ABC):
    """Describe a computation by its hyperparameters; subclasses become frozen, hashable dataclasses.

    A layer holds no tensor. `initial_parameters` and `initial_states` make its tensors from a key, and calling it
    is a pure function of an input and of those tensors. Two equal layers are interchangeable.

    A subclass declares its hyperparameters as annotated fields, which become the constructor's arguments, and
    defines `__call__`; where it has parameters or states it defines their initial values too.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Power(lt.Layer):
        ...     size: int
        ...
        ...     def initial_parameters(self, key):
        ...         return {"exponent": torch.ones(self.size, device=key.device)}
        ...
        ...     def __call__(self, x, ps, st):
        ...         return x ** ps["exponent"], st
        >>> ps, st = lt.setup(0, Power(2))
        >>> y, st = Power(2)(torch.tensor([2.0, 3.0]), ps, st)
        >>> y
        tensor([2., 3.])
        >>> Power(2) == Power(2)
        True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call = cls.__dict__.get("__call__")
        if call is not None and not getattr(call, "__isabstractmethod__", False):
            cls.__call__ = located(call)  # type: ignore[method-assign]

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the initial trainable tensors, by name.

        Args:
            key: The key to draw from; the tensors belong on its device.

        Returns:
            A nested dict of tensors; empty for a layer without parameters.
        """
        return {}

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the initial tensors that change without being trained, and the static switches, by name.

        Args:
            key: The key to draw from; the tensors belong on its device.

        Returns:
            A nested dict of tensors and `Static` values; empty for a layer without states.
        """
        return {}

    @abstractmethod
    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output and the new state; nothing that is passed in is changed.

        Args:
            x: The input: a tensor, or any tree of tensors that the layer takes.
            ps: The parameters, named as in `initial_parameters`.
            st: The states, named as in `initial_states`.

        Returns:
            `(y, st)`: the output, and a state of the same structure, detached.
        """

    def children(self) -> Mapping[str, Layer]:
        """Return the layers inside, by the names under which their parameters and states are nested.

        The empty name stands for a single layer inside whose trees are not nested at all.
        """
        return {}

    def expected_input(self) -> str:
        """Say in words what the layer takes, for error messages; empty where there is nothing to say."""
        return ""

    def extra_repr(self) -> str:
        """Return the arguments as they are shown in prints and errors: by default, the fields that matter."""
        shown = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.repr and (item.default is MISSING or value != item.default):
                shown.append(f"{item.name}={show_value(value)}" if item.kw_only else show_value(value))
        return ", ".join(shown)

    def __repr__(self) -> str:
        from ._show import show

        return show(self)

    def _repr_html_(self) -> str:
        from ._layer_html import layer_html

        return layer_html(self)

    @cached_property
    def _names(self) -> tuple[frozenset[str], frozenset[str]]:
        """The names at the top of the layer's parameters and of its states, found without computing anything."""
        return frozenset(self.initial_parameters(NOWHERE)), frozenset(self.initial_states(NOWHERE))


def show_value(value: Any) -> str:
    """Return how a hyperparameter is shown: a function by its name."""
    if isinstance(value, torch.dtype | str | int | float | tuple):
        return str(value) if not isinstance(value, str) else repr(value)
    return getattr(value, "__name__", None) or str(value)
