"""Former names, with deprecation warnings: names that have moved, parameters in old files, and options.

The affine parameters of normalizations are `weight` and `bias`, as in torch; formerly the first was `scale`.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, TypeVar

from luxtorch._errors import InputError

T = TypeVar("T")


def moved(module: str, names: str, to: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module, in which names still stand that have moved to another one.

    Args:
        module: The module that they have left, its `__name__`.
        names: The names, with spaces between.
        to: The module where they are now.

    Example:
        >>> __getattr__ = moved("luxtorch.surgery", "capture summary", to="luxtorch.inspect")
    """
    old = frozenset(names.split())

    def __getattr__(name: str) -> Any:
        if name not in old:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warnings.warn(f"{module}.{name} has moved: use {to}.{name}.", DeprecationWarning, stacklevel=2)
        return getattr(import_module(to), name)

    return __getattr__


# A whole part of a dotted name, which may be in brackets: `layer_2.weight`, `flat[layer_2.weight]`.
_WEIGHT = re.compile(r"(.*(?<![^.\[]))weight(?![^.\]])(.*)")


def current_names(held: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Return the current names of the tensors in a file: `{"layer_2.scale": "layer_2.weight"}`.

    A name is replaced only if the tree has the new name and the file does not, and the tree does not have the old one.

    Args:
        held: The names in the file.
        wanted: The names in the tree.

    Example:
        >>> current_names(["norm.scale", "norm.bias", "own.scale"], ["norm.weight", "norm.bias", "own.scale"])
        {'norm.scale': 'norm.weight', 'norm.bias': 'norm.bias', 'own.scale': 'own.scale'}
    """
    left, found = set(held) - set(wanted), set(wanted) - set(held)
    former = {_WEIGHT.sub(r"\1scale\2", name): name for name in found}
    return {name: former.get(name, name) if name in left else name for name in held}


def same_after_renaming(held: str, wanted: str) -> bool:
    """Return whether a text with names from a file is that of a tree, up to former names."""
    return re.fullmatch(re.sub(r"\bweight\b", "(?:weight|scale)", re.escape(wanted)), held) is not None


def optional_counts(held: Collection[str], wanted: Collection[str]) -> set[str]:
    """Return the names of `num_batches_tracked` that a file lacks although it has the statistics of the same layer.

    Old files of luxtorch lack them, as those of torch do; torch assumes 0.
    """
    counts = {name: name.rpartition(".")[0] for name in wanted if name.rpartition(".")[2] == "num_batches_tracked"}
    statistics = {name.rpartition(".")[0] for name in held if name.rpartition(".")[2] == "running_mean"}
    return {name for name, place in counts.items() if place in statistics and name not in held}


def renamed_option(former: str, today: str) -> Callable[[type[T]], type[T]]:
    """Decorate a class to accept an option by its former name too, with a warning.

    Args:
        former: The deprecated name of the keyword argument and the attribute.
        today: The current name of both.
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
                    raise InputError(f"`{former}` and `{today}` must not both be given.", fix=f"Pass `{today}` alone.")
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
