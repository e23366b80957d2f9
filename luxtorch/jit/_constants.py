"""Fingerprints of arguments that are not tensors, so that a graph is used for equal values alone."""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import DTypeError, Layer, Static

_Reader: TypeAlias = "Callable[[_Walk, Any, str], Any]"

# Immutable types, whose values `==` tells apart.
_ATOMS = frozenset(
    (
        *(int, bool, str, bytes, range, type, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)

# Larger constants would take longer to compare than to compute with.
_MANY = 10_000


class ComparedByIdentity:
    """Mark a class whose objects are compared by identity, whatever they hold."""


class NotComparable(Exception):
    """Report a value that cannot be compared, with its place."""

    def __init__(self, place: str, what: str, fix: str = "") -> None:
        super().__init__(place, what, fix)
        self.place, self.what, self.fix = place, what, fix


def fingerprint(value: Any) -> Any:
    """Return the fingerprint by which a value that is not a tensor is compared.

    Values of one fingerprint share a graph, so it has all that a function could read: types, so that 1, 1.0 and True
    differ, as 0.0 and -0.0 do; the current items of containers and attributes of objects; the closures of functions;
    and the identity of objects whose class does not define `==`.

    Raises:
        NotComparable: If the value holds a tensor, or an object with hidden state.
    """
    cls: Any = type(value)
    if cls in _ATOMS:
        return cls, value
    if cls is float:
        return float, value.hex()
    if cls is tuple and _ATOMS.issuperset(kinds := tuple(map(type, value))):
        return kinds, value
    reader = _reader(cls)
    return (cls, value) if reader is _same else reader(_Walk(), value, "")


def is_mutable(value: Any) -> bool:
    """Return whether a value, or something that it holds, is mutable."""
    walk = _Walk()
    walk.read(value, "")
    return walk.mutable


class Constant:
    """Hold a value that is compared by its fingerprint."""

    __slots__ = ("key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key = fingerprint(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and bool(self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return repr(self.value)


def not_comparable_error(error: NotComparable, value: Any, where: str) -> DTypeError:
    """Return the error for an argument that cannot be compared."""
    inside = f", which holds {error.what} at {where}{error.place}" if error.place else ""
    return DTypeError(
        "An argument of a jitted function must be a tensor or a constant.",
        expected="tensors in any pytree, and values that can be compared, each of which has a graph of its own",
        got=f"a {type(value).__name__}{inside}",
        fix=error.fix or _fix(value, bool(error.place)),
        where=where,
    )


def _fix(value: Any, inside: bool) -> str:
    if hasattr(value, "__array__"):
        return "Convert it by torch.as_tensor."
    if not inside:
        return "Pass the tensors and numbers that the function uses."
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return "Pass what it holds as a separate argument."
    return f"Make {type(value).__name__} a pytree node, {REGISTER}; or pass what it holds as separate arguments."


REGISTER = "by torch.export.register_dataclass or torch.utils._pytree.register_pytree_node"


class _Walk:
    """Visit a value and all that it holds."""

    __slots__ = ("_visiting", "_count", "mutable")

    def __init__(self) -> None:
        self.mutable = False
        self._count = 0
        self._visiting: dict[int, int] = {}

    def read(self, value: Any, place: str) -> Any:
        cls: Any = type(value)
        if cls in _ATOMS:
            return cls, value
        if id(value) in self._visiting:
            return _Walk, self._visiting[id(value)]  # a cycle
        self._count += 1
        if self._count > _MANY:
            raise NotComparable(place, f"one of more than {_MANY} values")
        self._visiting[id(value)] = len(self._visiting)
        key = _reader(cls)(self, value, place)
        del self._visiting[id(value)]
        return key

    def attributes(self, value: Any, place: str) -> tuple[Any, ...]:
        """Return the fingerprints of the attributes of an object, in its `__dict__` and `__slots__`."""
        cls: Any = type(value)
        held = [(name, getattr(value, name, _Walk)) for name in _slots(cls)]
        held += getattr(value, "__dict__", {}).items()
        return tuple((name, self.read(one, f"{place}.{name}")) for name, one in held)

    def items(self, values: Iterable[Any], place: str) -> tuple[Any, ...]:
        return tuple(self.read(one, f"{place}[{i}]") for i, one in enumerate(values))

    def pairs(self, values: Any, place: str) -> tuple[Any, ...]:
        return tuple(
            (self.read(key, f"{place}.keys()"), self.read(one, f"{place}[{key!r:.40}]")) for key, one in values.items()
        )


def _same(walk: _Walk, value: Any, place: str) -> Any:
    """Read what is immutable, or trusted not to change: layers, and objects of Python and torch."""
    return type(value), value


def _number(walk: _Walk, value: Any, place: str) -> Any:
    if isinstance(value, float):
        return type(value), float.hex(value), walk.attributes(value, place)
    if isinstance(value, complex):
        return type(value), value.real.hex(), value.imag.hex(), walk.attributes(value, place)
    base = next(base for base in (int, str, bytes) if isinstance(value, base))
    return type(value), base(value), walk.attributes(value, place)


def _array_scalar(walk: _Walk, value: Any, place: str) -> Any:
    return type(value), value.tobytes(), str(value.dtype)


def _sequence(walk: _Walk, value: Any, place: str) -> Any:
    walk.mutable |= not isinstance(value, tuple)
    extra = (value.maxlen,) if isinstance(value, deque) else ()
    return type(value), walk.items(value, place), walk.attributes(value, place), extra


def _set(walk: _Walk, value: Any, place: str) -> Any:
    walk.mutable |= not isinstance(value, frozenset)
    return type(value), frozenset(walk.read(one, f"{place} as an item") for one in value), walk.attributes(value, place)


def _dict(walk: _Walk, value: Any, place: str) -> Any:
    walk.mutable = True
    extra = walk.read(value.default_factory, f"{place}.default_factory") if isinstance(value, defaultdict) else ()
    return type(value), walk.pairs(value, place), walk.attributes(value, place), extra


def _slice(walk: _Walk, value: Any, place: str) -> Any:
    return slice, walk.items((value.start, value.stop, value.step), place)


def _function(walk: _Walk, value: Any, place: str) -> Any:
    key: tuple[Any, ...] = (types.FunctionType, value, value.__code__)
    if value.__closure__:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # it is still empty
                held = None
            key += (walk.read(held, f"{place}.__closure__.{name}"),)
    if value.__defaults__:
        key += walk.items(value.__defaults__, f"{place}.__defaults__")
    if value.__kwdefaults__:
        key += walk.pairs(value.__kwdefaults__, f"{place}.__kwdefaults__")
    return (*key, walk.attributes(value, place)) if value.__dict__ else key


def _method(walk: _Walk, value: Any, place: str) -> Any:
    owner = value.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return type(value), value
    name = value.__func__ if isinstance(value, types.MethodType) else value.__name__
    return type(value), walk.read(name, f"{place}.__func__"), walk.read(owner, f"{place}.__self__")


def _partial(walk: _Walk, value: Any, place: str) -> Any:
    return (
        type(value),
        walk.read(value.func, f"{place}.func"),
        walk.items(value.args, f"{place}.args"),
        walk.pairs(value.keywords, f"{place}.keywords"),
        walk.attributes(value, place),
    )


def _cached(walk: _Walk, value: Any, place: str) -> Any:
    return type(value), value, walk.read(value.__wrapped__, f"{place}.__wrapped__")


def _reference(walk: _Walk, value: Any, place: str) -> Any:
    return type(value), walk.read(value(), f"{place}()")


def _object(walk: _Walk, value: Any, place: str) -> Any:
    frozen = getattr(getattr(value, "__dataclass_params__", None), "frozen", False)
    held = walk.attributes(value, place)
    walk.mutable |= not frozen and (bool(held) or hasattr(value, "__dict__"))
    cls: Any = type(value)
    return cls, value if cls.__eq__ is object.__eq__ else None, held


def _opaque(walk: _Walk, value: Any, place: str) -> Any:
    cls: Any = type(value)
    if cls.__eq__ is object.__eq__ or cls.__hash__ is None:
        raise NotComparable(place, f"a {cls.__name__}, whose state cannot be compared")
    try:
        hash(value)
    except TypeError as error:
        raise NotComparable(place, f"a {cls.__name__}, which has no hash") from error
    return cls, value, walk.attributes(value, place)


def _tensor(walk: _Walk, value: Any, place: str) -> Any:
    raise NotComparable(place, "a tensor")


def _module(walk: _Walk, value: Any, place: str) -> Any:
    fix = "Make it a layer: layer, ps, st = lt.from_torch(module), and pass ps and st."
    raise NotComparable(place, f"a {type(value).__name__}, a torch.nn.Module", fix)


@functools.lru_cache(maxsize=4096)
def _reader(cls: type) -> _Reader:
    """Return the function that reads values of a class."""
    found = next((reader for base, reader in _readers() if issubclass(cls, base)), None)
    if found is not None:
        return found
    return _opaque if _has_hidden_state(cls) else _object


@functools.cache
def _readers() -> list[tuple[Any, _Reader]]:
    import operator
    import pathlib

    import numpy as np

    return [
        (Tensor, _tensor),
        (torch.nn.Module, _module),
        ((Layer, ComparedByIdentity, enum.Enum, type, types.ModuleType, types.CodeType), _same),
        ((pathlib.PurePath, np.ufunc, torch._ops.OpOverload, torch._ops.OpOverloadPacket), _same),
        ((operator.itemgetter, operator.attrgetter, operator.methodcaller), _same),
        ((types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType), _same),
        (np.generic, _array_scalar),
        ((int, float, complex, str, bytes), _number),
        ((list, tuple, deque), _sequence),
        ((set, frozenset), _set),
        ((dict, types.MappingProxyType), _dict),
        (slice, _slice),
        (types.FunctionType, _function),
        ((types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType), _method),
        (functools.partial, _partial),
        (functools._lru_cache_wrapper, _cached),
        (weakref.ReferenceType, _reference),
    ]


@functools.lru_cache(maxsize=4096)
def _slots(cls: type) -> tuple[str, ...]:
    return tuple(
        name
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    )


def _has_hidden_state(cls: type) -> bool:
    """Return whether objects of a class have memory besides their slots, which only C code reads."""
    pointers = len(_slots(cls)) + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__basicsize__ > object.__basicsize__ + pointers * tuple.__itemsize__ or cls.__itemsize__ > 0


def texts(key: Any) -> Iterator[str]:
    """Yield the strings in a fingerprint."""
    if isinstance(key, str):
        yield key
    elif isinstance(key, (tuple, frozenset)):
        for item in key:
            yield from texts(item)


def wrap_static(args: Any, kwargs: Any, names: Sequence[str], static: Collection[str]) -> tuple[Any, Any]:
    """Wrap the static arguments as constants of the structure.

    Args:
        args: The arguments by position.
        kwargs: Those by name.
        names: The names of the first ones.
        static: The names of static ones.
    """
    if not static:
        return args, kwargs
    args = tuple(
        _as_static(names[i], value) if i < len(names) and names[i] in static else value for i, value in enumerate(args)
    )
    return args, {name: _as_static(name, value) if name in static else value for name, value in kwargs.items()}


def _as_static(name: str, value: Any) -> Static[Constant]:
    """Wrap an argument as a constant of the structure."""
    try:
        return Static(Constant(value))
    except NotComparable as error:
        raise not_comparable_error(error, value, name) from None
