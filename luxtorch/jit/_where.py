"""Finding the user's line in the stack, for error messages."""

from __future__ import annotations

import sys

# Modules whose lines are no help; code that was made while running has none.
_LIBRARIES = frozenset(
    ("luxtorch", "torch", "torchopt", "optree", "functorch", "contextlib", "functools", "builtins", "")
)


def user_line() -> str:
    """Return `file:line` of the innermost frame that belongs to no library."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def line_of(error: BaseException) -> str:
    """Return `file:line` of the innermost frame that an error has passed and that belongs to no library."""
    line, place = "an unknown line", error.__traceback__
    while place is not None:
        if place.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            line = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        place = place.tb_next
    return line
