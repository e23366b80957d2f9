"""`print` and `check` in compiled functions, and formats that are checked where they are written."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import user_line
from luxtorch._torch import compile_constant, compiled_stack, outside_transforms, without_modes
from luxtorch.core import InputError, LuxtorchError, tree_map, wrong_type

from ._callback import SYMBOLS, Place, run_with_values, staged


def print(fmt: str, *args: Any, **kwargs: Any) -> None:
    """Print the values of tensors, whenever the program runs.

    The text is that of `print(fmt.format(*args, **kwargs))` where the tensors have values: in eager code at once,
    inside of `lt.jit` and `torch.compile` at each call, inside of `lt.scan` and the like at each step. Lines keep
    their order, but for torch.compile by Inductor, which may change it. Under vmap there is a line for each member, and
    under derivatives one, of the forward pass; see `lt.debug.callback`.

    Args:
        fmt: A format, as of `str.format`.
        args: Its fields by position, any trees.
        kwargs: Its fields by name.

    Raises:
        InputError: If the format has other fields than there are values, or one that does not fit its value.
        DTypeError: If the format is not a string.

    Example:
        >>> import torch, luxtorch as lt
        >>> def loss(x):
        ...     y = x.square().sum()
        ...     lt.debug.print("y={y:.1f} for {}", x, y=y)
        ...     return y
        >>> slope = lt.jit(torch.func.grad(loss), backend="replay")
        >>> slope(torch.tensor([1.0, 2.0]))
        y=5.0 for tensor([1., 2.])
        tensor([2., 4.])
        >>> slope(torch.tensor([0.0, 1.0]))
        y=1.0 for tensor([0., 1.])
        tensor([0., 2.])

    Source: `jax.debug.print`, always ordered.
    """
    check_format(fmt, args, kwargs)
    run_with_values(_print, (fmt,), (args, kwargs))


def _print(fmt: str, tree: Any, place: Place) -> None:
    builtins.print(formatted(fmt, *tree))


def formatted(fmt: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return a format with its fields filled in.

    Raises:
        InputError: If they do not fit.
    """
    try:
        return _Strict().vformat(fmt, args, kwargs)
    except LuxtorchError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        got = f"{fmt!r}: {type(error).__name__}: {error}"
        raise InputError("The fields of a format must fit the values that come with it.", got=got) from error


class _Strict(Formatter):
    """Refuse values that have no field."""

    def check_unused_args(self, used: Any, args: Any, kwargs: Any) -> None:
        """Raise if a value is not used."""
        unused = [*(f"the value {i}" for i in range(len(args)) if i not in used), *sorted(kwargs.keys() - used)]
        if unused:
            raise InputError(
                "Each value must have a field in the format.",
                got=f"no field for {', '.join(unused)}",
                fix="Write {} for a value by position, {name} for one by name; {{ and }} are braces.",
            )


def check_format(fmt: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if values do not fit a format."""
    _check_fields(fmt, len(args), tuple(kwargs))
    if not torch.compiler.is_dynamo_compiling() and staged():
        with outside_transforms(), without_modes():
            formatted(fmt, *tree_map(_sample, (args, kwargs)))


def _sample(leaf: Any) -> Any:
    """Return something with numbers in the place of a leaf that may have none."""
    if isinstance(leaf, SYMBOLS):
        return torch.zeros((), dtype=torch.int64)
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.zeros((), dtype=leaf.dtype).expand([n if isinstance(n, int) else 2 for n in leaf.shape])


@compile_constant
def _check_fields(fmt: str, number: int, names: tuple[str, ...]) -> None:
    if not isinstance(fmt, str):
        raise wrong_type("The format", fmt, "a string", fix='Write lt.debug.print("{}", x).')
    _try_fields(fmt, number, names)


@lru_cache
def _try_fields(fmt: str, number: int, names: tuple[str, ...]) -> None:
    formatted(fmt, [_Any()] * number, dict.fromkeys(names, _Any()))


class _Any:
    """Fit every field."""

    def __getattr__(self, name: str) -> _Any:
        return self

    def __getitem__(self, name: Any) -> _Any:
        return self

    def __format__(self, spec: str) -> str:
        return ""

    def __str__(self) -> str:
        return ""

    __repr__ = __str__


class CheckError(LuxtorchError, AssertionError):
    """Report that a condition of `lt.debug.check` does not hold, and in which line that is.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.debug.check(torch.tensor(1.0) < 0, "it is above zero")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        luxtorch.debug._print.CheckError: it is above zero
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
        luxtorch.debug._print.CheckError: the logarithm of -3.0
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
