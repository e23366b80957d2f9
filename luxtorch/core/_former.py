"""Names that were others before: of tensors in files, and of options.

The affine parameters of the normalizations are `weight` and `bias`; up to the names of torch the first was `scale`.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from luxtorch._errors import InputError

T = TypeVar("T")

# As a whole part of a dotted name, which may stand in brackets: `layer_2.weight`, `flat[layer_2.weight]`.
_WEIGHT = re.compile(r"(.*(?<![^.\[]))weight(?![^.\]])(.*)")


def names_today(held: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Return what a tree calls the tensors that a file holds: `{"layer_2.scale": "layer_2.weight"}`.

    A name is another one today only where the tree wants that and the file has it not, and where the tree does not
    want the name that the file has.

    Args:
        held: The names in the file.
        wanted: The names in the tree.

    Example:
        >>> names_today(["norm.scale", "norm.bias", "own.scale"], ["norm.weight", "norm.bias", "own.scale"])
        {'norm.scale': 'norm.weight', 'norm.bias': 'norm.bias', 'own.scale': 'own.scale'}
    """
    left, found = set(held) - set(wanted), set(wanted) - set(held)
    former = {_WEIGHT.sub(r"\1scale\2", name): name for name in found}
    return {name: former.get(name, name) if name in left else name for name in held}


def same_today(held: str, wanted: str) -> bool:
    """Say whether a text about names says in a file what it says of a tree, some of them by their former names."""
    return re.fullmatch(re.sub(r"\bweight\b", "(?:weight|scale)", re.escape(wanted)), held) is not None


def uncounted(held: Collection[str], wanted: Collection[str]) -> set[str]:
    """Return the counts of batches that a file lacks, though it holds the statistics of the same normalization.

    Files of luxtorch lacked them once, as those of torch did; torch takes the count for 0.
    """
    counts = {name: name.rpartition(".")[0] for name in wanted if name.rpartition(".")[2] == "num_batches_tracked"}
    statistics = {name.rpartition(".")[0] for name in held if name.rpartition(".")[2] == "running_mean"}
    return {name for name, place in counts.items() if place in statistics and name not in held}


def renamed_option(former: str, today: str) -> Callable[[type[T]], type[T]]:
    """Let a class take an option by its former name too, with a warning.

    Args:
        former: The name that is deprecated, of the keyword argument and of the attribute.
        today: The name of both.
    """

    def warn(what: str) -> None:
        message = f"`{former}` of {what} is deprecated, as its name is `{today}` now."
        warnings.warn(message, DeprecationWarning, stacklevel=3)

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def init(self: T, *args: Any, **options: Any) -> None:
            if former in options:
                if today in options:
                    raise InputError(f"`{former}` and `{today}` are one option.", fix=f"Pass `{today}` alone.")
                warn(cls.__name__)
                options[today] = options.pop(former)
            construct(self, *args, **options)

        def read(self: T) -> Any:
            warn(cls.__name__)
            return getattr(self, today)

        cls.__init__ = init  # type: ignore[method-assign, assignment]
        setattr(cls, former, property(read, doc=f"The former name of `{today}`."))
        return cls

    return decorate
