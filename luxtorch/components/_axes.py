"""`Axes`, the static part of a named vector: the names, shapes and offsets of its components; also under compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView
from itertools import zip_longest
from math import prod
from typing import Any, NamedTuple, NoReturn, TypeAlias
from weakref import WeakValueDictionary

from torch.compiler import is_dynamo_compiling

from luxtorch._torch import compile_constant
from luxtorch.core import InputError, KeyNameError, register_constant, suggest
from luxtorch.core._plain import write_as

Shape: TypeAlias = "tuple[int, ...]"
Entries: TypeAlias = "tuple[tuple[str, Axes | Shape], ...]"


class ComponentNameError(KeyNameError, AttributeError):
    """Report an unknown component, whether it was asked for as a key or as an attribute."""


class Place(NamedTuple):
    """The location of one component: it covers `size` elements from `start`, and `leaves` leaves from `leaf`."""

    child: Axes | Shape
    start: int
    size: int
    leaf: int
    leaves: int


class Axes:
    """Name the elements of a flat vector: nested names, with a shape at every leaf.

    An `Axes` holds no numbers, is hashable and never changes. Equal axes are one object, so comparing
    two of them costs nothing. Make one with `axes`.

    Attributes:
        names: The names of the top level, in the order of the elements.
        size: The number of elements.
        leaf_sizes: The numbers of elements of the leaves, in the order of the elements.
        top: The names of the top level with their places.

    Example:
        >>> import torch, luxtorch as lt
        >>> layout = lt.axes({"dense": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "relu": {}})
        >>> layout
        Axes(dense=Axes(weight=(2, 3), bias=(2,)), relu=Axes())
        >>> layout.names, layout.size
        (('dense', 'relu'), 8)
        >>> layout["dense"], layout["dense.bias"], layout.slice("dense.bias")
        (Axes(weight=(2, 3), bias=(2,)), (2,), slice(6, 8, None))
    """

    __slots__ = ("__weakref__", "_entries", "_hash", "_keys", "_places", "leaf_sizes", "names", "size", "top")

    names: tuple[str, ...]
    size: int
    leaf_sizes: tuple[int, ...]
    top: tuple[tuple[str, Place], ...]
    _entries: Entries
    _hash: int
    _keys: KeysView[str]
    _places: dict[str, Place]

    def __new__(cls, entries: Entries) -> Axes:
        known = _INTERNED.get(entries)
        if known is not None:
            return known
        self = super().__new__(cls)
        self._entries = entries
        self._hash = hash(entries)
        self._places = dict(_places(entries))
        self._keys = dict(entries).keys()
        self.names = tuple(self._keys)
        self.top = tuple((name, self._places[name]) for name in self.names)
        self.leaf_sizes = tuple(prod(shape) for shape in self.shapes.values())
        self.size = sum(self.leaf_sizes)
        return _INTERNED.setdefault(entries, self)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every leaf, by its dotted name, in the order of the elements."""
        return {name: place.child for name, place in self._places.items() if not isinstance(place.child, Axes)}

    def keys(self) -> KeysView[str]:
        """Return the names of the top level."""
        return self._keys

    def place(self, name: str) -> Place:
        """Return the location of a component; a name below the top level is dotted.

        Raises:
            KeyNameError: If there is no such component.
        """
        place = self._places.get(name)
        if place is None:
            raise ComponentNameError(
                f"There is no component '{name}'.",
                expected=", ".join(f"'{known}'" for known in self.names[:8]) + ", ..." * (len(self.names) > 8),
                fix=suggest(name, self._places),
            )
        return place

    def slice(self, name: str) -> slice:
        """Return the elements that a component covers, as a slice of the flat vector."""
        place = self.place(name)
        return slice(place.start, place.start + place.size)

    def __getitem__(self, name: str) -> Axes | Shape:
        return self.place(name).child

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Axes) and self._entries == other._entries)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Axes, (self._entries,)

    def __repr__(self) -> str:
        return f"Axes({', '.join(f'{name}={child!r}' for name, child in self._entries)})"


_INTERNED: WeakValueDictionary[Entries, Axes] = WeakValueDictionary()

# Axes are a pytree constant: torch.compile guards on them by a single comparison.
register_constant(Axes)
write_as(Axes, lambda axes: axes._entries, Axes)


def _places(entries: Entries) -> Iterator[tuple[str, Place]]:
    """Yield every component, groups included, with its dotted name."""
    start = leaf = 0
    for name, child in entries:
        if isinstance(child, Axes):
            here = Place(child, start, child.size, leaf, len(child.leaf_sizes))
            yield name, here
            for inner, place in child._places.items():
                yield f"{name}.{inner}", place._replace(start=start + place.start, leaf=leaf + place.leaf)
        else:
            here = Place(child, start, prod(child), leaf, 1)
            yield name, here
        start += here.size
        leaf += here.leaves


def difference(a: Axes, b: Axes) -> str:
    """Describe the first difference of two axes."""
    left, right = a.shapes, b.shapes
    for name in {**left, **right}:
        if left.get(name) != right.get(name):
            shapes = [str(side[name]) if name in side else "missing" for side in (left, right)]
            return f"'{name}', {shapes[0]} against {shapes[1]}"
    orders = zip_longest(a._places, b._places, fillvalue="nothing")
    return "another order, '{}' against '{}'".format(*next(pair for pair in orders if pair[0] != pair[1]))


# Under torch.compile, axes are read as constants of the graph, so that the lookup itself is not traced.


class _Kept:
    """Hold the axes that were traced: they cannot be constants of a graph, but the name of an attribute can."""


_KEPT = _Kept()


def _keep(axes: Axes) -> str:
    """Store axes, and return the name of the attribute that holds them."""
    attribute = f"axes_{id(axes)}"
    setattr(_KEPT, attribute, axes)
    return attribute


@compile_constant
def _intern(entries: Entries) -> str:
    return _keep(Axes(entries))


def intern(entries: Entries) -> Axes:
    """Return the axes with these entries."""
    if is_dynamo_compiling():
        return getattr(_KEPT, _intern(entries))  # type: ignore[no-any-return]
    return Axes(entries)


@compile_constant
def leaf_sizes(axes: Axes) -> tuple[int, ...]:
    """Return the numbers of elements of all leaves."""
    return axes.leaf_sizes


def _as_constant(place: Place) -> tuple[Any, ...]:
    return (_keep(place.child) if isinstance(place.child, Axes) else place.child, *place[1:])


def _as_place(constant: tuple[Any, ...]) -> Place:
    child, *rest = constant
    return Place(getattr(_KEPT, child) if isinstance(child, str) else child, *rest)


@compile_constant
def _top(axes: Axes) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple((name, _as_constant(place)) for name, place in axes.top)


def top(axes: Axes) -> Iterable[tuple[str, Place]]:
    """Return the names of the top level with their locations."""
    return [(name, _as_place(place)) for name, place in _top(axes)] if is_dynamo_compiling() else axes.top


@compile_constant
def _find(axes: Axes, name: str) -> tuple[Any, ...] | None:
    return next((_as_constant(place) for known, place in axes.top if known == name), None)


def find(axes: Axes, name: str) -> Place | None:
    """Return the location of a top-level component, under torch.compile; None if the name is unknown."""
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
        "The operands must have the same names and shapes.",
        got=difference(a, b),
        fix="Take the numbers of one of them, as in a + b.flat, if they belong together all the same.",
    )
