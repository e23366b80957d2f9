"""Frozen values, such as layers; and plain values, classes and functions by their names, as JSON and back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from typing_extensions import dataclass_transform

from luxtorch._errors import InputError, described


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


_OWN = ("torch", "luxtorch")

_HOMES = ("torch", "torch.nn.functional", "torch.special", "torch.linalg", "torch.fft")
"""Where functions of torch are found that do not know their own place."""

_BY_PARTS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}


def write_as(cls: type[Any], parts: Callable[[Any], Any], make: Callable[[Any], Any]) -> None:
    """Have the values of a class written as others.

    Args:
        cls: The class.
        parts: A function of such a value that returns what stands for it.
        make: The inverse.
    """
    _BY_PARTS[cls] = (parts, make)


def to_plain(value: Any) -> Any:
    """Return what JSON can hold, and `from_plain` understands, of a static part of a tree.

    Functions and classes are written by their names. Objects are written by their fields, and are made again without
    a call of their class. So no code of a file is ever run; but what it names may be called by its user later. Names
    are those of torch and of luxtorch, of classes of layers, rules and losses, and what
    `torch.serialization.add_safe_globals` allows.

    Raises:
        InputError: If there is something else in it.

    Example:
        >>> import torch
        >>> to_plain((1, "a", torch.float32, torch.tanh))
        [1, 'a', {'dtype': 'float32'}, {'name': 'torch:tanh'}]
        >>> from_plain(to_plain((1, {"a": None})))
        (1, {'a': None})
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is tuple:
        return [to_plain(part) for part in value]
    if kind in (list, set, frozenset):
        return {kind.__name__: [to_plain(part) for part in value]}
    if kind is dict:
        return {"dict": [[to_plain(key), to_plain(part)] for key, part in value.items()]}
    if kind is torch.Size:
        return {"size": list(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (torch.dtype, torch.device):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if kind in _BY_PARTS:
        return {"class": _name(kind), "parts": to_plain(_BY_PARTS[kind][0](value))}
    if is_namedtuple(kind):
        return {"class": _name(kind), "values": [to_plain(part) for part in value]}
    if dataclasses.is_dataclass(kind):
        fields = getattr(value, "__dict__", None)
        if fields is None:
            fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {"class": _name(kind), "fields": {name: to_plain(part) for name, part in fields.items()}}
    return {"name": _name(value)}


def from_plain(plain: Any) -> Any:
    """Return the static part of a tree that `to_plain` has written.

    Raises:
        InputError: If it names what may not be loaded.
    """
    if isinstance(plain, list):
        return tuple(map(from_plain, plain))
    if not isinstance(plain, dict):
        return plain
    if "class" in plain:
        return _made(_found(plain["class"]), plain)
    what, value = next(iter(plain.items()), ("nothing", None))
    if what not in _READERS:
        raise InputError("The structure of a tree must be written in words that this version knows.", got=f"'{what}'")
    return _READERS[what](value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "complex": lambda parts: complex(*parts),
    "device": torch.device,
    "dict": lambda pairs: {from_plain(key): from_plain(part) for key, part in pairs},
    "dtype": lambda name: _dtype(name),
    "frozenset": lambda parts: frozenset(map(from_plain, parts)),
    "list": lambda parts: list(map(from_plain, parts)),
    "name": lambda path: _found(path),
    "set": lambda parts: set(map(from_plain, parts)),
    "size": torch.Size,
}


def _made(cls: Any, plain: dict[str, Any]) -> Any:
    if "parts" in plain and cls in _BY_PARTS:
        return _BY_PARTS[cls][1](from_plain(plain["parts"]))
    if "values" in plain and is_namedtuple(cls) and len(cls._fields) == len(plain["values"]):
        return tuple.__new__(cls, map(from_plain, plain["values"]))
    if "fields" not in plain or not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise InputError("A class in a file must be one that is written so.", got=f"{cls!r:.80}")
    made = tuple.__new__(cls) if issubclass(cls, tuple) else object.__new__(cls)
    for name, part in plain["fields"].items():
        object.__setattr__(made, name, from_plain(part))
    return made


def _dtype(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    dtype = _attribute(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise InputError("A name of a dtype must be one of torch's.", got=name)
    return dtype


def is_namedtuple(cls: Any) -> bool:
    """Tell whether a class is that of a named tuple."""
    return isinstance(cls, type) and issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)


def _name(value: Any) -> str:
    """Return the name by which a function or a class is found; it may be loaded."""
    path = getattr(value, "__qualname__", "")
    last = path.rpartition(".")[2]
    places = [(home, name) for home in _HOMES for name in (last, last.removeprefix(home.rpartition(".")[2] + "_"))]
    module = getattr(value, "__module__", None) or ""
    public = ".".join(part for part in module.split(".") if not part.startswith("_"))  # private files may be renamed
    for home, name in (*places, (public, path), (module, path)):
        if home in sys.modules and _attribute(sys.modules[home], name) is value is not None:
            if not _allowed(value):
                raise _not_allowed(
                    f"{home}.{name}", f"Call torch.serialization.add_safe_globals([{name}]), here and there."
                )
            return f"{home}:{name}"
    raise InputError(
        "The structure of a tree that is written must consist of plain values, functions and classes with names, and "
        "layers, rules and dataclasses of these.",
        got=described(value),
        fix="Define functions and classes at the top of a module.",
    )


def _found(path: str) -> Any:
    """Return the function or class of a name."""
    home, _, name = path.partition(":")
    if home.partition(".")[0] in _OWN:
        with contextlib.suppress(ImportError):
            importlib.import_module(home)
    if home not in sys.modules:
        raise _not_allowed(f"{home}.{name}", f"Import {home} first.")
    value = _attribute(sys.modules[home], name)
    if not _allowed(value):
        raise _not_allowed(f"{home}.{name}", f"If you trust it, call torch.serialization.add_safe_globals([{name}]).")
    return value


def _not_allowed(name: str, fix: str) -> InputError:
    return InputError("What the structure of a tree names must be known where it is loaded.", got=name, fix=fix)


def _allowed(value: Any) -> bool:
    """Tell whether a file may name something: a function or class of torch or ours, or one that is known as safe."""
    if not callable(value):
        return False
    if (getattr(value, "__module__", None) or "").partition(".")[0] in _OWN:
        return True
    if isinstance(value, type) and issubclass(value, Value):
        return True
    safe = torch.serialization.get_safe_globals()
    return any(value is (entry[0] if isinstance(entry, tuple) else entry) for entry in safe)


def _attribute(owner: Any, path: str) -> Any:
    """Return what lies on a dotted path; None if nothing does."""
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner
