"""A module's code: its fingerprint, the random generators and globals that it may reach, and state that it changes."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import random
import types
import uuid
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from luxtorch._transforms import functional, watched
from luxtorch.core import InputError
from luxtorch.inspect._purity import generator_states, generators_restored, moved_generators

from ._module_copy import content_of, restore
from ._reach import LRU, code_of, everything, importable, names_in_operations, names_used, of_torch, package, reaches
from ._submodule import tensors_of
from .pure._modules import Pure

Identity: TypeAlias = tuple[str, tuple[Any, ...]]
"""A hash of all options, and the classes and functions, which may be redefined under the same names."""


class _Recorder(pickle.Pickler):
    """Pickle, but record classes and functions instead of looking them up by name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True  # equal names need not be one object
        self.code: list[Any] = []
        self._seen: dict[int, int] = {}
        self._hooks: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, types.FunctionType) and not importable(obj):  # a copy of it has the same code
            return None
        if isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType | types.CodeType):
            self.code.append(obj)
            return str(obj.co_name if isinstance(obj, types.CodeType) else obj.__qualname__)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Pickle what pickle refuses: functions by their code and closure, weak references by their target."""
        if isinstance(obj, types.FunctionType | types.CellType | nn.Module):  # which may be in cycles
            if id(obj) in self._seen:
                return tuple, (("seen", self._seen[id(obj)]),)
            self._seen[id(obj)] = len(self._seen)
        if isinstance(obj, nn.Module):
            own = {name: self._numbered(value) if "_hooks" in name else value for name, value in vars(obj).items()}
            kind = type(obj).__bases__[1] if isinstance(obj, Pure) else type(obj)
            return kind.__new__, (kind,), own
        if isinstance(obj, RemovableHandle):
            return tuple, (("handle", self._hooks.setdefault(obj.id, len(self._hooks))),)
        if isinstance(obj, types.FunctionType):
            state = obj.__defaults__, obj.__kwdefaults__, obj.__closure__, vars(obj)
            return types.FunctionType, (obj.__code__, obj.__module__), state
        if isinstance(obj, types.CellType):
            return types.CellType, (), obj.cell_contents
        if isinstance(obj, weakref.ReferenceType):
            return weakref.ref, (), obj()
        if type(obj) is LRU:
            return functools.lru_cache, (), obj.__wrapped__
        return NotImplemented

    def _numbered(self, hooks: Any) -> Any:
        """Return hooks numbered in order, in place of torch's ids, which are unique in a process."""
        if not isinstance(hooks, dict):
            return hooks
        return {self._hooks.setdefault(number, len(self._hooks)): hook for number, hook in hooks.items()}


def identity_of(*parts: Any) -> Identity:
    """Return a fingerprint that is equal for objects of the same code and attributes alone."""
    shown = io.BytesIO()
    recorder = _Recorder(shown)
    try:
        recorder.dump(parts)
    except Exception:  # what cannot be pickled may raise anything: such an object equals no other
        return uuid.uuid4().hex, ()
    return hashlib.sha256(shown.getvalue()).hexdigest(), tuple(recorder.code)


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_ABSENT: Any = object()


class SharedState:
    """Find the state that calls of a module share with other code, and undo changes of it.

    Caches of methods belong to one module, and are cleared.

    Args:
        module: The module; None for nothing.
        functions: The functions that a call of it may run.
    """

    def __init__(self, module: nn.Module | None, functions: list[types.FunctionType]) -> None:
        self._containers: list[Any] = []
        self._variables: list[tuple[Any, str]] = []
        self._caches: list[Any] = []
        classes = {kind for part in module.modules() for kind in type(part).__mro__} if module is not None else set()
        classes = {kind for kind in classes if not of_torch(kind) and kind is not object}
        self._methods = [value for kind in classes for value in vars(kind).values() if type(value) is LRU]
        used = set().union(*(function.__code__.co_names for function in functions))
        attributes = [value for kind in classes for name, value in vars(kind).items() if name in used]
        for _, each in everything((attributes, functions), set(map(package, functions))):
            if isinstance(each, types.FunctionType):
                self._variables += (
                    (each.__globals__, name) for name in names_in_operations(each.__code__, "STORE_GLOBAL")
                )
            elif type(each) in _CONTAINERS and each is not attributes and each is not functions:
                self._containers.append(each)
            elif type(each) is LRU and each not in self._methods:
                self._caches.append(each)
        names = set().union(*(names_in_operations(function.__code__, "STORE_ATTR") for function in functions))
        self._attributes = [(kind, name) for kind in classes for name in names]
        self._any = bool(self._containers or self._variables or self._caches or self._methods or self._attributes)

    def restored(self) -> AbstractContextManager[None]:
        """Undo changes that are made inside; a cache keeps results that were computed outside of transforms."""
        return self._restored() if self._any else nullcontext()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        # Most containers are the `__dict__` of functions, which are empty.
        contents = [(each, content_of(each) if each else ()) for each in self._containers]
        variables = [(scope, name, scope.get(name, _ABSENT)) for scope, name in self._variables]
        attributes = [(kind, name, vars(kind).get(name, _ABSENT)) for kind, name in self._attributes]
        computed = [cache.cache_info().misses for cache in self._caches]
        try:
            yield
        finally:
            for each, before in contents:
                if each or before:
                    restore(each, before)
            for scope, name, value in variables:
                if value is _ABSENT:
                    scope.pop(name, None)
                else:
                    scope[name] = value
            for kind, name, value in attributes:
                if vars(kind).get(name, _ABSENT) is value:
                    continue
                if value is _ABSENT:
                    delattr(kind, name)
                else:
                    setattr(kind, name, value)
            for method in self._methods:
                method.cache_clear()
            for cache, misses in zip(self._caches, computed, strict=True):
                if cache.cache_info().misses != misses and (functional() or watched()):
                    cache.cache_clear()


NOTHING = SharedState(None, [])


_SEEDS = frozenset(
    ("seed", "manual_seed", "initial_seed", "get_rng_state", "set_rng_state", "default_generator", "fork_rng")
)


def check_code(module: nn.Module, functions: list[types.FunctionType]) -> None:
    """Refuse a module whose code refers to the module itself by a global, which a copy of it would share.

    Args:
        module: The module.
        functions: The functions that a call of it may run.

    Raises:
        InputError: If a global, a closure or a default of a method leads to a part or a tensor of the module.
    """
    wanted = {id(value) for part in module.modules() for value in (part, *(each for _, _, each in tensors_of(part)))}
    way = reaches(functions, wanted, set(map(package, functions)))
    if way is not None:
        raise InputError(
            "The code of a module must reach its parameters, buffers and submodules by attributes alone.",
            got=way.partition("]")[2].strip() or way,
            fix="Make it an attribute: self.name = ...; the call of a layer takes its tensors from ps and st alone.",
        )


def functions_of(module: nn.Module) -> list[types.FunctionType]:
    """Return the methods of a module's classes that a call may run: those reachable by name from a forward."""
    known: dict[str, list[types.FunctionType]] = {}
    for part in module.modules():
        for name, function in code_of(part):
            known.setdefault(name, []).append(function)
    waiting = [name for name in known if name == "forward" or name.startswith("__") and name != "__init__"]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        for function in known.pop(waiting.pop(), ()):
            found[id(function)] = function
            waiting += known.keys() & {*names_used(function.__code__)}
    return [*found.values()]


def sources_of(module: nn.Module, functions: list[types.FunctionType]) -> frozenset[str]:
    """Return the names of the global random number generators that a module and its functions may draw from."""
    found: set[str] = set()
    for _, each in everything([module, *functions], set(map(package, functions))):
        found.update(_sources(each))
    return frozenset(found)


def _sources(x: Any) -> Iterator[str]:
    if (
        x is random
        or isinstance(x, types.BuiltinMethodType | types.MethodType)
        and isinstance(x.__self__, random.Random)
    ):
        yield "Python"
    elif (
        isinstance(x, types.ModuleType)
        and x.__name__ in ("numpy", "numpy.random")
        or isinstance(x, types.BuiltinMethodType)
        and type(x.__self__).__module__.startswith("numpy.random")
    ):
        yield "NumPy"
    elif (
        isinstance(x, torch.jit.ScriptFunction) or isinstance(x, types.FunctionType) and _SEEDS & names_used(x.__code__)
    ):
        yield "torch"


@contextmanager
def check_draws(names: frozenset[str], own: list[Any]) -> Iterator[None]:
    """Raise if random numbers are drawn inside from a generator that no key seeds; restore the global generators.

    Args:
        names: The global generators that may be drawn from.
        own: Other generators.

    Raises:
        InputError: If there was such a draw.
    """
    before, own_before = generator_states(), [*map(pickle.dumps, own)]
    with generators_restored():
        yield
        found = [
            f"the global random numbers of {name}"
            for name in moved_generators(before, generator_states())
            if name in names
        ]
    pairs = zip(own, own_before, strict=True)
    found += [f"a {type(each).__name__} of its own" for each, state in pairs if pickle.dumps(each) != state]
    if found:
        raise InputError(
            "A forward must draw by torch's functions, which take their numbers from the key in the states.",
            got=f"a draw from {found[0]}",
            fix="Draw with torch.rand, torch.randint and their like, and leave the seed alone.",
        )
