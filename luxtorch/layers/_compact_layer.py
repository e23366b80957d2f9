"""The layer that calls a function on its parts, and how it is pickled."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import field
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeAlias

from luxtorch.core import InputError, Layer, Parameters, States, Value, show_value

from ._compact_parts import Holder, Part
from ._compact_scope import Parts

Body: TypeAlias = Callable[..., Any]
"""A function of the parts and an input, and if it likes of the model's parameters: `(m, x)` or `(m, x, ps)`."""


class Compact(Holder):
    """Call a function on its parts: the layer that `compact` makes."""

    function: Body
    takes_parameters: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._set(takes_parameters=len(inspect.signature(self.function).parameters) == 3)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the function returns, and the states that it leaves."""
        m = Parts(self, ps, st)
        y = self.function(m, x, ps) if self.takes_parameters else self.function(m, x)
        if y is None:
            raise InputError(f"{self.title} returns nothing.", expected="return y", got="None")
        return y, self.closed(m.__dict__)

    @property
    def title(self) -> str:
        """Return the function's name."""
        return show_value(self.function)

    def extra_repr(self) -> str:
        """Return the function's name and the parts that are no layers."""
        return ", ".join(
            [self.title, *(f"{name}={part!r}" for name, part in self.items() if not isinstance(part, Layer))]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # At the top of a module the decorated name stands for the layer, so that pickle would not find the function.
        place = _Place(self.function.__module__, self.function.__qualname__) if _is_decorated(self.function) else None
        return _rebuilt, (place or self.function, self.names, self.parts)


class _Place(Value):
    """Hold where a decorated function is found: under the name that now stands for its layer."""

    module: str
    name: str

    def find(self) -> Any:
        found: Any = import_module(self.module)
        return attrgetter(self.name)(found)


def _rebuilt(place: _Place | Body, names: tuple[str, ...], parts: tuple[Part, ...]) -> Compact:
    return Compact(names, parts, place.find().function if isinstance(place, _Place) else place)


def _is_decorated(function: Any) -> bool:
    """Tell whether the place where a function was defined holds a layer of it."""
    try:
        found = attrgetter(function.__qualname__)(sys.modules[function.__module__])
    except (AttributeError, KeyError):
        return False
    return isinstance(found, Compact) and found.function is function
