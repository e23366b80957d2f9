"""Values that are not tensors: what they are compared by, so that no graph is used for a value it was not made for."""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import DTypeError, Layer

_Reader: TypeAlias = "Callable[[_Walk, Any, str], Any]"

# These are what they are, for ever, and `==` tells them apart.
_ATOMS = frozenset(
    (
        *(int, bool, str, bytes, range, type, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)

# More is slower to compare than to compute with.
_MANY = 10_000


class Refused(Exception):
    """Say where a value holds what cannot be compared, and what that is."""

    def __init__(self, place: str, what: str, fix: str = "") -> None:
        super().__init__(place, what, fix)
        self.place, self.what, self.fix = place, what, fix


def fingerprint(value: Any) -> Any:
    """Return what a value that is not a tensor is compared by.

    Two values with one fingerprint make one graph, so it has all that a function could see of them: types, so that 1,
    1.0 and True differ, as 0.0 and -0.0 do; the items of containers and the attributes of objects, as they are now;
    what functions close over; and which object it is, where its class does not define `==`.

    Raises:
        Refused: If the value holds a tensor, or something whose state cannot be seen.
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
    """Tell whether a value, or something that it holds, can change while it stays the same object."""
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


def refusal(error: Refused, value: Any, where: str) -> DTypeError:
    """Return the error for an argument that is refused."""
    inside = f", which holds {error.what} at {where}{error.place}" if error.place else ""
    return DTypeError(
        "An argument of a jitted function is neither a tensor nor a constant.",
        expected="tensors in any pytree; besides, values that can be compared, of which each makes a graph of its own",
        got=f"a {type(value).__name__}{inside}",
        fix=error.fix or _fix(value, bool(error.place)),
        where=where,
    )


def _fix(value: Any, inside: bool) -> str:
    if hasattr(value, "__array__"):
        return "Convert it by torch.as_tensor."
    if not inside:
        return "Pass the tensors and numbers that the function needs of it."
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return "Pass what it holds as an argument of its own."
    return f"Make {type(value).__name__} a pytree node, {REGISTER}; or pass what it holds as arguments of their own."


REGISTER = "by torch.export.register_dataclass or torch.utils._pytree.register_pytree_node"


class _Walk:
    """Go through a value and what it holds."""

    __slots__ = ("_around", "_count", "mutable")

    def __init__(self) -> None:
        self.mutable = False
        self._count = 0
        self._around: dict[int, int] = {}

    def read(self, value: Any, place: str) -> Any:
        cls: Any = type(value)
        if cls in _ATOMS:
            return cls, value
        if id(value) in self._around:
            return _Walk, self._around[id(value)]  # it holds itself
        self._count += 1
        if self._count > _MANY:
            raise Refused(place, f"one of more than {_MANY} values")
        self._around[id(value)] = len(self._around)
        key = _reader(cls)(self, value, place)
        del self._around[id(value)]
        return key

    def attributes(self, value: Any, place: str) -> tuple[Any, ...]:
        """Return the fingerprints of what an object holds in its `__dict__` and `__slots__`."""
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
    """Read what does not change, or is trusted not to: layers, and what Python and torch name."""
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
            except ValueError:  # it has none yet
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


def _unseen(walk: _Walk, value: Any, place: str) -> Any:
    cls: Any = type(value)
    if cls.__eq__ is object.__eq__ or cls.__hash__ is None:
        raise Refused(place, f"a {cls.__name__}, whose state cannot be compared")
    try:
        hash(value)
    except TypeError as error:
        raise Refused(place, f"a {cls.__name__}, which has no hash") from error
    return cls, value, walk.attributes(value, place)


def _tensor(walk: _Walk, value: Any, place: str) -> Any:
    raise Refused(place, "a tensor")


def _module(walk: _Walk, value: Any, place: str) -> Any:
    fix = "Make it a layer: layer, ps, st = lt.from_torch(module), and pass ps and st."
    raise Refused(place, f"a {type(value).__name__}, a torch.nn.Module", fix)


@functools.lru_cache(maxsize=4096)
def _reader(cls: type) -> _Reader:
    """Return how values of a class are read."""
    found = next((reader for base, reader in _readers() if issubclass(cls, base)), None)
    if found is not None:
        return found
    return _unseen if _is_hidden(cls) else _object


@functools.cache
def _readers() -> list[tuple[Any, _Reader]]:
    import operator
    import pathlib

    import numpy as np

    from ._jitted import Jitted

    return [
        (Tensor, _tensor),
        (torch.nn.Module, _module),
        ((Layer, Jitted, enum.Enum, type, types.ModuleType, types.CodeType), _same),
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


def _is_hidden(cls: type) -> bool:
    """Tell whether objects of a class have more memory than their slots take, of which only its C code knows."""
    pointers = len(_slots(cls)) + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)
    return cls.__basicsize__ > object.__basicsize__ + pointers * tuple.__itemsize__ or cls.__itemsize__ > 0


def texts(key: Any) -> Iterator[str]:
    """Yield the strings in a fingerprint."""
    if isinstance(key, str):
        yield key
    elif isinstance(key, (tuple, frozenset)):
        for item in key:
            yield from texts(item)
