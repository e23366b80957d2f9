"""`check`: conditions that become errors when a compiled program runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, compiled_stack
from luxtorch.core import LuxtorchError, wrong_type
from luxtorch.jit._user_line import user_line

from ._callback import Place, run_with_values
from ._print import check_format, formatted


class CheckError(LuxtorchError, AssertionError):
    """Report that a condition of `lt.debug.check` does not hold, and in which line that is.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.debug.check(torch.tensor(1.0) < 0, "it is above zero")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        luxtorch.debug._check.CheckError: it is above zero
          got:      False at ...
    """


def check(condition: bool | Tensor, message: str, *args: Any, **kwargs: Any) -> None:
    """Raise an error if a condition does not hold, whenever the program runs.

    In eager code that is an `assert`. Inside of `lt.jit` and `torch.compile`, where a tensor has no value while the
    function is traced, the error comes when the program gets there: in a scan at the first step that fails, under vmap
    at the first member, which it names. Nothing is returned then, and arguments that were to be donated stay as they
    were. See `lt.debug.callback` for branches under vmap, where both are run, and for what becomes of the program.

    The processor looks at the condition, so on a GPU each check waits for all that was computed before.

    Args:
        condition: A bool, or a boolean tensor without dimensions.
        message: What the error says, a format as in `lt.debug.print`.
        args: Its fields by position, any trees.
        kwargs: Its fields by name.

    Raises:
        CheckError: If the condition does not hold.
        DTypeError: If the condition is no boolean scalar, or the message no string.
        InputError: If the message has other fields than there are values.

    Example:
        >>> import torch, luxtorch as lt
        >>> @lt.jit(backend="replay")
        ... def log(x):
        ...     lt.debug.check((x > 0).all(), "the logarithm of {}", x.min())
        ...     return x.log()
        >>> log(torch.ones(2))
        tensor([0., 0.])
        >>> log(torch.tensor([1.0, -3.0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        luxtorch.debug._check.CheckError: the logarithm of -3.0
          got:      False at ...

    Source: `jax.experimental.checkify.check`, but without a function that passes the errors on.
    """
    boolean = isinstance(condition, Tensor) and condition.dtype == torch.bool and not condition.ndim
    if not (boolean or isinstance(condition, (bool, torch.SymBool))):
        _refuse(condition)
    check_format(message, args, kwargs)
    run_with_values(_check, (message, _line()), (condition, args, kwargs))


def _check(message: str, line: str, tree: Any, place: Place) -> None:
    condition, args, kwargs = tree
    if not condition:
        member = f", for member {', '.join(map(str, place))} of the vmap" * bool(place)
        raise CheckError(formatted(message, args, kwargs), got=f"False at {line}{member}")


@compile_constant
def _refuse(condition: object) -> None:
    raise wrong_type(
        "The condition of a check",
        condition,
        "a boolean scalar, such as (x > 0).all()",
        fix="Reduce it by .all() or .any().",
    )


@compile_constant
def _line() -> str:
    """Return the user's line, also where torch.compile does not run it."""
    for frame in reversed(compiled_stack()):
        if _PACKAGE not in Path(frame.filename).parents:
            return f"{frame.filename}:{frame.lineno}"
    return user_line()


_PACKAGE = Path(__file__).parent.parent
