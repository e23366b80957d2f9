"""Global state that a module's code may change: caches of functions, class attributes and globals."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from luxtorch._transforms import functional, watched

from ._module_copy import content_of, restore
from ._reach import LRU, everything, names_in_operations, of_torch, package

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
