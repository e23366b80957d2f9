"""The exceptions of luxtorch: each says where, what was expected, what came, and how to mend it."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor


class LuxtorchError(Exception):
    """Report a mistake that luxtorch can explain; the base of all its exceptions.

    Args:
        problem: One full sentence that says what is wrong.
        expected: What would have been right.
        got: What came instead.
        fix: The likely way to mend it.
        where: The place, for instance `model.layer_2 (Dense 10 -> 5)`.

    Example:
        >>> print(LuxtorchError("The widths differ.", expected="10", got="7", fix="Pass 10 features."))
        The widths differ.
          expected: 10
          got:      7
          fix:      Pass 10 features.
    """

    inside: tuple[str, ...] = ()
    """Names that lead from the layer that raises the error to the place in its own trees, set where they are nested."""

    def __init__(self, problem: str, *, expected: str = "", got: str = "", fix: str = "", where: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.got = got
        self.fix = fix
        self.where = where

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.problem}" if self.where else self.problem]
        labelled = (("expected: ", self.expected), ("got:      ", self.got), ("fix:      ", self.fix))
        lines += [f"  {label}{text}" for label, text in labelled if text]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their positional arguments alone; ours are keyword arguments, kept in __dict__.
        return type(self), (self.problem,), self.__dict__


class InputError(LuxtorchError, ValueError):
    """Report an argument whose value, shape or structure does not fit."""


class DTypeError(LuxtorchError, TypeError):
    """Report a tensor, or another argument, of the wrong type."""


class KeyNameError(LuxtorchError, KeyError):
    """Report a missing, extra or misspelt name in a tree of parameters or states."""


class LayerError(LuxtorchError, RuntimeError):
    """Report that something failed inside a layer; the original error is its cause."""


def suggest(name: str, names: Iterable[str]) -> str:
    """Return `Did you mean 'weight'?` for the nearest of some names, or an empty string.

    Example:
        >>> suggest("weigth", ["weight", "bias"])
        "Did you mean 'weight'?"
    """
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"Did you mean '{nearest[0]}'?" if nearest else ""


def wrong_type(name: str, value: object, expected: str, *, fix: str = "", where: str = "") -> DTypeError:
    """Return the error for a value of the wrong type.

    Args:
        name: What the value is: an argument's name, or a few words.
        value: The value.
        expected: What it has to be, for instance "a tensor".
        fix: The likely way to mend it.
        where: The place.

    Example:
        >>> print(wrong_type("mask", 3, "a boolean tensor"))
        mask must be a boolean tensor.
          got:      3 of type int
    """
    return DTypeError(f"{name} must be {expected}.", got=described(value), fix=fix, where=where)


def out_of_range(name: str, value: object, expected: str, *, fix: str = "", where: str = "") -> InputError:
    """Return the error for a value that is not among those that are allowed; see `wrong_type`.

    Example:
        >>> print(out_of_range("rank", 0, "at least 1"))
        rank must be at least 1.
          got:      0
    """
    return InputError(f"{name} must be {expected}.", got=f"{value!r:.80}", fix=fix, where=where)


def wrong_shape(name: str, value: Tensor, expected: object, *, fix: str = "", where: str = "") -> InputError:
    """Return the error for a tensor of the wrong shape; see `wrong_type`.

    Example:
        >>> import torch
        >>> print(wrong_shape("bias", torch.zeros(3), (4,)))
        bias has the wrong shape.
          expected: (4,)
          got:      (3,)
    """
    shape = tuple(value.shape)
    return InputError(f"{name} has the wrong shape.", expected=str(expected), got=str(shape), fix=fix, where=where)


def unknown_name(name: object, known: Iterable[str], kind: str = "name", *, where: str = "") -> KeyNameError:
    """Return the error for a name that is not among those that are known.

    Args:
        name: The name.
        known: Those that there are.
        kind: What they are the names of.
        where: The place.

    Example:
        >>> print(unknown_name("weigth", ["weight", "bias"], "parameter"))
        There is no parameter 'weigth'.
          expected: weight, bias
          fix:      Did you mean 'weight'?
    """
    names = list(known)
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or f"no {kind}, as there is none"
    return KeyNameError(f"There is no {kind} '{name}'.", expected=shown, fix=suggest(str(name), names), where=where)


def described(value: object) -> str:
    """Describe a value for an error: a tensor by its dtype and shape, a container by its length.

    Example:
        >>> import torch
        >>> described(torch.zeros(2, 3)), described([1, 2]), described("ten")
        ('a torch.float32 tensor of shape (2, 3)', 'a list of length 2', "'ten' of type str")
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with the names {', '.join(map(str, value))}" if value else "an empty dict"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{value!r:.80} of type {type(value).__name__}"


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
