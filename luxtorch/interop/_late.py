"""What runs after the call of a module: recomputation by torch's checkpoint, and modules that something has kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils import checkpoint as of_torch

from luxtorch._transforms import transformed, watched

from .pure._keys import Keys

if TYPE_CHECKING:
    from ._skeleton import Body


class _Call(threading.local):
    """Know what is called now, in this thread."""

    body: Body | None = None
    keys: Keys | None = None


_now = _Call()


class Called:
    """Let a checkpoint know whose call it is in; every call enters one, and a generator would cost more."""

    def __init__(self, body: Body, keys: Keys) -> None:
        self._call = body, keys

    def __enter__(self) -> None:
        self._before = _now.body, _now.keys
        _now.body, _now.keys = self._call

    def __exit__(self, *_: object) -> None:
        _now.body, _now.keys = self._before


def carried(function: Callable[..., Any], body: Body, keys: Keys) -> Callable[..., Any]:
    """Return a function that runs later as it would now: with the same replacements, and the same random numbers."""
    keys = keys.copy()

    @functools.wraps(function)
    def later(*args: Any, **kwargs: Any) -> Any:
        if _now.body is body:
            return function(*args, **kwargs)
        from .pure._mode import PureMode

        again = keys.copy()
        with Called(body, again), PureMode(again, body):
            return function(*args, **kwargs)

    return later


def _checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch's checkpoint calls around a function, knowing the call of a converted module."""

    @functools.wraps(original)
    def generator(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _now.body is None or _now.keys is None:
            return original(function, *args, **kwargs)
        if transformed() or watched():  # these keep themselves what they need, and allow no checkpoint
            return iter((None,))
        return original(carried(function, _now.body, _now.keys), *args, **kwargs)

    return generator


class _Reentrant(of_torch.CheckpointFunction):
    """Take the other kind of checkpoint in the call of a converted module: this one knows no `autograd.grad`."""

    @classmethod
    def apply(cls, function: Any, preserve: bool, *args: Any) -> Any:
        if _now.body is None:
            return of_torch_reentrant.apply(function, preserve, *args)
        return of_torch.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


of_torch_reentrant = of_torch.CheckpointFunction


def install() -> None:
    """Make torch's checkpoint know the calls of converted modules; elsewhere it is as it was."""
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"):
        if hasattr(of_torch, name):
            setattr(of_torch, name, _checkpoint(getattr(of_torch, name)))
            break
    of_torch.CheckpointFunction = _Reentrant  # type: ignore[misc]


install()
