"""`Options` of `jit`, checked and frozen: a new option is a field here, and an argument of `jit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from torch import fx

from luxtorch.core import InputError, out_of_range

Backend: TypeAlias = "str | Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] | None"
Dynamic: TypeAlias = "bool | str | Sequence[str] | Mapping[str, int | Sequence[int]]"


class JitOptions(TypedDict, total=False):
    """The options as users pass them; see `jit`."""

    donate: str | Sequence[str]
    static: str | Sequence[str]
    dynamic: Dynamic
    backend: Backend
    options: Mapping[str, Any] | None
    background: bool
    maxsize: int


@dataclass(frozen=True)
class Options:
    """Hold the options of a jitted function, checked; see `jit`.

    Attributes:
        donate: The names of arguments that are donated.
        static: The names of arguments that are compared by their values as a whole.
        dynamic: The dynamic dimensions of arguments by name, None if only the name was given; or whether the first
            one of all arguments is dynamic.
        backend: The backend that runs the graph; None for the best available one.
        inductor: Settings of inductor.
        background: Whether to replay at first, and compile in another thread.
        maxsize: The number of graphs to keep.
    """

    donate: tuple[str, ...]
    static: tuple[str, ...]
    dynamic: bool | Mapping[str, tuple[int, ...] | None]
    backend: Backend
    inductor: Mapping[str, Any]
    background: bool
    maxsize: int

    @staticmethod
    def of(
        donate: str | Sequence[str],
        static: str | Sequence[str],
        dynamic: Dynamic,
        backend: Backend,
        options: Mapping[str, Any] | None,
        background: bool,
        maxsize: int,
    ) -> Options:
        """Check the options that a user passes.

        Raises:
            InputError: If an argument is named twice, or the backend is unknown.
        """
        if twice := set(_names(donate)) & set(_names(static)):
            raise InputError(f"The argument '{twice.pop()}' must not be both donated and static.", fix="Choose one.")
        if not (backend in (None, "inductor", "replay") or callable(backend)):
            raise out_of_range("backend", backend, '"inductor", "replay", or a function')
        return Options(_names(donate), _names(static), _dims(dynamic), backend, options or {}, background, maxsize)

    @property
    def named(self) -> tuple[str, ...]:
        """The names of all arguments that options refer to."""
        return (*self.donate, *self.static, *(self.dynamic if isinstance(self.dynamic, Mapping) else ()))


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _dims(dynamic: Dynamic) -> bool | dict[str, tuple[int, ...] | None]:
    if isinstance(dynamic, bool):
        return dynamic
    if not isinstance(dynamic, Mapping):
        return dict.fromkeys(_names(dynamic))
    found = {name: tuple(dims) if isinstance(dims, Sequence) else (dims,) for name, dims in dynamic.items()}
    for name, dims in found.items():
        if wrong := [dim for dim in dims if isinstance(dim, bool) or not isinstance(dim, int)]:
            raise out_of_range(f"The dynamic dimensions of '{name}'", wrong[0], "ints, as in dynamic={'x': (0, 1)}")
    return dict(found)
