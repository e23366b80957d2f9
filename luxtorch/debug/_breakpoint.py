"""`breakpoint` in compiled functions."""

from __future__ import annotations

import os
import sys
from typing import Any

from ._callback import Place, run_with_values, staged


def breakpoint(**values: Any) -> None:
    """Stop in Python's debugger, whenever the program runs.

    In eager code it stops in the caller's frame, as Python's `breakpoint()` does. Inside of `lt.jit`, and under
    transforms, where the names of the function stand for no values, it stops when the program gets there, and has the
    values that were passed under their names; see `lt.debug.callback`. `sys.breakpointhook`, and with it
    `PYTHONBREAKPOINT`, choose another debugger or none.

    Args:
        values: What to look at, any trees.

    Example:
        >>> import sys, torch, luxtorch as lt
        >>> def look():  # in place of a debugger, which would wait for commands
        ...     print(sys._getframe(1).f_locals["loss"])
        >>> before, sys.breakpointhook = sys.breakpointhook, look
        >>> @lt.jit(backend="replay")
        ... def double(x):
        ...     lt.debug.breakpoint(loss=2 * x)
        ...     return 2 * x
        >>> double(torch.tensor(3.0))
        tensor(6.)
        tensor(6.)
        >>> sys.breakpointhook = before

    Source: `jax.debug.breakpoint`; the debugger is Python's own.
    """
    if not staged():
        frame = sys._getframe(1)
        if sys.breakpointhook is sys.__breakpointhook__ and not os.environ.get("PYTHONBREAKPOINT"):
            from pdb import Pdb

            Pdb().set_trace(frame)
        else:
            _stop({**frame.f_locals, **values}, frame.f_globals)
        return
    run_with_values(_stop_with, (), values)


def _stop_with(values: Any, place: Place) -> None:
    _stop(values, {})


def _stop(names: dict[str, Any], scope: dict[str, Any]) -> None:
    exec(_CODE, dict(scope), names)


_CODE = compile("breakpoint()", "<lt.debug.breakpoint>", "exec")
