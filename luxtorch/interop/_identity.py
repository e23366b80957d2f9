"""What tells one module from another: its code and its options."""

from __future__ import annotations

import hashlib
import io
import pickle
import types
import uuid
from typing import Any, TypeAlias

Identity: TypeAlias = tuple[str, tuple[Any, ...]]
"""A text that shows all options, and the classes and functions that it names, which may be redefined."""


class _Recorder(pickle.Pickler):
    """Pickle, but note classes and functions instead of looking them up by their names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True  # equal names need not be one object
        self.code: list[Any] = []

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType):
            self.code.append(obj)
            return obj.__qualname__
        return None


def identity_of(*parts: Any) -> Identity:
    """Return what is equal for objects of the same code and the same attributes, and for no others."""
    shown = io.BytesIO()
    recorder = _Recorder(shown)
    try:
        recorder.dump(parts)
    except Exception:  # whatever a class raises that cannot be pickled: such an object is like no other
        return uuid.uuid4().hex, ()
    return hashlib.sha256(shown.getvalue()).hexdigest(), tuple(recorder.code)
