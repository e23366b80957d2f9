"""`Value`: base class of frozen dataclasses with cheap class creation, for layers and rules."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from typing_extensions import dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Value:
    """Base class of immutable values; subclasses become frozen dataclasses.

    Two values are equal if they are of the same class and have equal fields; equal values hash alike. Equality and
    hash are defined here once, because generating them for each class would take half of its time at import.

    Args:
        kw_only: Whether the fields are keyword-only arguments.
    """

    def __init_subclass__(cls, *, kw_only: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, eq=False, repr=False, kw_only=kw_only)(cls)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash((type(self), self._compared()))

    def _compared(self) -> tuple[Any, ...]:
        """Return the values of the fields that make two objects equal."""
        return tuple(getattr(self, item.name) for item in fields(self) if item.compare)  # type: ignore[arg-type]

    def _set(self, **values: Any) -> None:
        """Set fields from a custom constructor or from `__post_init__`; they never change otherwise."""
        for name, value in values.items():
            object.__setattr__(self, name, value)
