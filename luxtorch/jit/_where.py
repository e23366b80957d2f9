"""Finding the user's line in the stack, for error messages."""

from __future__ import annotations

import sys
import traceback
from types import FrameType

# Packages whose lines are no help, with those of Python itself; code that was made while running has no name.
_LIBRARIES = frozenset(("luxtorch", "torch", "torchopt", "optree", "functorch", "numpy", "")) | sys.stdlib_module_names


def user_line(error: BaseException | None = None) -> str:
    """Return `file:line` of the innermost frame that belongs to no library.

    Args:
        error: Where to look: at the lines through which an error came, and outside of these in the stack.
    """
    lines = list(traceback.walk_tb(error.__traceback__)) if error is not None else []
    for frame, line in (*reversed(lines), *traceback.walk_stack(sys._getframe(1))):
        if library(frame) not in _LIBRARIES:
            return f"{frame.f_code.co_filename}:{line}"
    return "an unknown line"


def user_calls() -> bool:
    """Tell whether the caller's caller belongs to no library."""
    return library(sys._getframe(2)) not in _LIBRARIES


def library(frame: FrameType) -> str:
    """Return to which package the code of a frame belongs."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
