"""The exceptions of luxtorch: each says where, what was expected, what came, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


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
