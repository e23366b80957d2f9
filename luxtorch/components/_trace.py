"""Reading axes while torch.compile traces: as constants of the graph, so that nothing of the lookup is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch.compiler import is_dynamo_compiling

from luxtorch._torch import compile_constant, current_level
from luxtorch.core import InputError

from ._axes import Axes, Entries, Place, difference


@compile_constant
def transform_depth() -> int:
    """Return how many transforms of torch.func are running."""
    return current_level() or 0


@compile_constant
def function_name(func: Callable[..., Any]) -> str:
    """Return the name of a torch function without that of its module."""
    return func.__name__.removeprefix("special_").removeprefix("linalg_")


class _Known:
    """Hold the axes that traces have met: they cannot be constants themselves, but a name that leads to them can."""


_KNOWN = _Known()


def _know(axes: Axes) -> str:
    """Return the attribute that holds the axes from now on."""
    attribute = f"axes_{id(axes)}"
    setattr(_KNOWN, attribute, axes)
    return attribute


@compile_constant
def _intern(entries: Entries) -> str:
    return _know(Axes(entries))


def intern(entries: Entries) -> Axes:
    """Return the axes with these entries."""
    if is_dynamo_compiling():
        return getattr(_KNOWN, _intern(entries))  # type: ignore[no-any-return]
    return Axes(entries)


@compile_constant
def leaf_sizes(axes: Axes) -> tuple[int, ...]:
    """Return the numbers of elements of all leaves."""
    return axes.leaf_sizes


def _as_constant(place: Place) -> tuple[Any, ...]:
    return (_know(place.child) if isinstance(place.child, Axes) else place.child, *place[1:])


def _as_place(constant: tuple[Any, ...]) -> Place:
    child, *rest = constant
    return Place(getattr(_KNOWN, child) if isinstance(child, str) else child, *rest)


@compile_constant
def _top(axes: Axes) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple((name, _as_constant(place)) for name, place in axes.top)


def top(axes: Axes) -> Iterable[tuple[str, Place]]:
    """Return the names of the top level with their places."""
    return [(name, _as_place(place)) for name, place in _top(axes)] if is_dynamo_compiling() else axes.top


@compile_constant
def _find(axes: Axes, name: str) -> tuple[Any, ...] | None:
    return next((_as_constant(place) for known, place in axes.top if known == name), None)


def find(axes: Axes, name: str) -> Place | None:
    """Return the place of a component of the top level in a trace; None if there is none of that name."""
    place = _find(axes, name)
    return None if place is None else _as_place(place)


@compile_constant
def check_name(axes: Axes, name: str) -> None:
    """Raise a KeyNameError unless there is a component of that name."""
    axes.place(name)


@compile_constant
def refuse_names(a: Axes, b: Axes) -> NoReturn:
    """Raise the error for operands of different names."""
    raise InputError(
        "The operands do not have the same names and shapes.",
        got=difference(a, b),
        fix="Take the numbers of one of them, as in a + b.flat, if they belong together all the same.",
    )
