"""The user's line in the stack, for error messages of `jit`."""

from __future__ import annotations

import sys
import traceback
from types import FrameType

# Packages whose lines do not help a user, with those of Python itself; generated code has an empty name.
_LIBRARIES = frozenset(("luxtorch", "torch", "torchopt", "optree", "functorch", "numpy", "")) | sys.stdlib_module_names


def user_line(error: BaseException | None = None) -> str:
    """Return `file:line` of the innermost frame of the user's code.

    Args:
        error: An error whose traceback is searched before the stack.
    """
    lines = list(traceback.walk_tb(error.__traceback__)) if error is not None else []
    for frame, line in (*reversed(lines), *traceback.walk_stack(sys._getframe(1))):
        if package_of(frame) not in _LIBRARIES:
            return f"{frame.f_code.co_filename}:{line}"
    return "an unknown line"


def called_by_user() -> bool:
    """Return whether the caller's caller is code of the user."""
    return package_of(sys._getframe(2)) not in _LIBRARIES


def package_of(frame: FrameType) -> str:
    """Return the package of the code of a frame."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
