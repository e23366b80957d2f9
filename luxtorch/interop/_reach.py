"""Objects that a module's code can reach: through attributes, containers, closures and globals."""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

LRU: Any = type(functools.lru_cache(len))
"""The type of what `functools.lru_cache` returns."""

OF_A_MODULE = frozenset(vars(nn.Module()))
"""The attributes that every module has."""

_CONTAINERS = (list, tuple, set, frozenset, deque)
_CLOSED = (type, types.ModuleType, types.CodeType, str, bytes, int, float, complex, type(None))


def importable(function: Any) -> bool:
    """Return whether a function is found by its qualified name in its module, so that no object owns it."""
    owner: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        owner = getattr(owner, name, None)
    return owner is function


@functools.cache
def names_used(code: types.CodeType) -> frozenset[str]:
    """Return the names of attributes and globals that a function, or one nested in it, uses."""
    return frozenset(code.co_names).union(*map(names_used, _codes_inside(code)))


def globals_used(code: types.CodeType) -> frozenset[str]:
    """Return the names of the globals that a function, or one nested in it, uses."""
    return names_in_operations(code, "LOAD_GLOBAL", "LOAD_NAME")


@functools.cache
def names_in_operations(code: types.CodeType, *operations: str) -> frozenset[str]:
    """Return the arguments of some bytecode operations of a function and of those nested in it."""
    own = (one.argval for one in dis.get_instructions(code) if one.opname in operations)
    return frozenset(own).union(*(names_in_operations(each, *operations) for each in _codes_inside(code)))


def _codes_inside(code: types.CodeType) -> Iterator[types.CodeType]:
    return (each for each in code.co_consts if isinstance(each, types.CodeType))


def reaches(x: Any, wanted: Collection[int], packages: Collection[str] = ()) -> str | None:
    """Return the path from an object to one with any of some ids; None if there is none.

    Args:
        x: The object.
        wanted: The ids.
        packages: The packages of functions whose globals are followed too.
    """
    for path, each in everything(x, packages):
        if id(each) in wanted:
            return path or "itself"
    return None


def everything(x: Any, packages: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield an object and all that it references, each once, with its path; see `reaches`."""
    seen: dict[int, Any] = {}
    waiting: list[tuple[str, Any]] = [("", x)]
    while waiting:
        path, each = waiting.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        yield path, each
        if isinstance(each, _CLOSED):
            continue
        waiting += ((path + name, inner) for name, inner in inside(each))
        if isinstance(each, types.FunctionType) and package(each) in packages:
            known = each.__globals__
            used = (name for name in globals_used(each.__code__) if name in known)
            waiting += ((f"{path} (the global {name} in {each.__qualname__})", known[name]) for name in used)


def package(x: Any) -> str:
    """Return the name of the package that a class or function belongs to."""
    return str(getattr(x, "__module__", "")).partition(".")[0]


def inside(x: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object references directly, each with its path."""
    if isinstance(x, Tensor):
        return
    if isinstance(x, Mapping):
        try:
            yield from ((f"[{name!r:.40}]", value) for name, value in x.items())
        except Exception:  # a computed mapping of something that is gone
            return
    elif isinstance(x, _CONTAINERS):
        yield from ((f"[{i}]", value) for i, value in enumerate(x))
    elif isinstance(x, types.CellType):
        try:
            yield "", x.cell_contents
        except ValueError:
            return
    elif isinstance(x, types.FunctionType):
        yield from _inside_function(x)
    elif isinstance(x, types.MethodType):
        yield from (("", x.__self__), ("", x.__func__))
    elif isinstance(x, functools.partial):
        yield from (("", x.func), ("", x.args), ("", x.keywords))
    elif isinstance(x, weakref.ReferenceType):
        yield "", x()
    elif type(x) is LRU:
        yield "", x.__wrapped__
    elif isinstance(x, property):
        yield from (("", x.fget), ("", x.fset))
    elif isinstance(x, (staticmethod, classmethod)):
        yield "", x.__func__
    elif isinstance(x, functools.cached_property):
        yield "", x.func
    else:
        yield from _inside_object(x)


def _inside_object(x: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(x, "__dict__", None)
    if isinstance(own, dict):
        yield from ((f".{name}", value) for name, value in [*own.items()])
    yield from ((f".{name}", value) for name, value in slots_of(x))
    owner = getattr(x, "__self__", None) if isinstance(x, types.BuiltinMethodType) else None
    if owner is not None:
        yield "", owner


def slots_of(x: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object that its classes list in `__slots__`."""
    for kind in type(x).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if hasattr(x, name) and name not in ("__dict__", "__weakref__"):
                yield name, getattr(x, name)


def _inside_function(x: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
        yield f" ({name} in {x.__qualname__})", cell
    yield from (("", x.__defaults__), ("", x.__kwdefaults__), ("", vars(x)))


def of_torch(x: Any) -> bool:
    """Return whether a class or function belongs to torch, or to luxtorch itself."""
    return package(x) in ("torch", "luxtorch")


def code_of(module: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the methods of a module's class that are not torch's, each with its name."""
    for kind in type(module).__mro__:
        if not of_torch(kind) and kind is not object:
            for name, value in vars(kind).items():
                yield from ((name, function) for function in _functions(value))


def _functions(x: Any) -> Iterator[types.FunctionType]:
    if isinstance(x, types.FunctionType):
        yield x
        if hasattr(x, "__wrapped__"):
            yield from _functions(x.__wrapped__)
    elif isinstance(x, property | staticmethod | classmethod | functools.cached_property) or type(x) is LRU:
        for _, inner in inside(x):
            yield from _functions(inner)


def left_by_calls(module: nn.Module) -> frozenset[str]:
    """Return the attributes that earlier calls have left behind: code writes them before it reads them.

    Such an attribute is not a state. Should a call read it first after all, it is missing.
    """
    names = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    if not names:
        return frozenset()
    first = {name: {_first_use(code, name) for code in _codes_of(module)} for name in names}
    return frozenset(name for name, uses in first.items() if "write" in uses and "read" not in uses)


def _codes_of(module: nn.Module) -> Iterator[types.CodeType]:
    waiting = [function.__code__ for name, function in code_of(module) if name != "__init__"]
    while waiting:
        yield (code := waiting.pop())
        waiting += _codes_inside(code)


@functools.cache
def _first_use(code: types.CodeType, name: str) -> str:
    """Return whether a function first reads ("read") or writes ("write") an attribute of a name."""
    if name in code.co_consts:  # by getattr
        return "read"
    for one in dis.get_instructions(code):
        if one.argval == name and "ATTR" in one.opname or one.argval == name and one.opname == "LOAD_METHOD":
            return "write" if one.opname == "STORE_ATTR" else "read"
    return ""


def asks_for_parameters(module: nn.Module) -> bool:
    """Return whether the code of a module, except its `__init__`, mentions `nn.Parameter`."""
    return any("Parameter" in code.co_names for code in _codes_of(module))
