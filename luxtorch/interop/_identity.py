"""Fingerprint of a module, by its code and its options, to compare and hash converted modules."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import types
import uuid
import weakref
from typing import Any, TypeAlias

from torch import nn
from torch.utils.hooks import RemovableHandle

from ._reach import LRU, importable
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
