"""Code of a module that runs after its call: recomputation by `torch.utils.checkpoint`, kept submodules."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils import checkpoint as of_torch

from luxtorch._transforms import transformed, watched

from .pure._keys import Keys
from .pure._mode import PureMode

if TYPE_CHECKING:
    from ._skeleton import WorkingCopy


class _Call(threading.local):
    """Hold the current call of a converted module, for each thread."""

    copy: WorkingCopy | None = None
    keys: Keys | None = None


_now = _Call()


class CurrentCall:
    """Set the current call for checkpoints inside; a class, since each call enters one and a generator is slower."""

    def __init__(self, copy: WorkingCopy, keys: Keys) -> None:
        self._call = copy, keys

    def __enter__(self) -> None:
        self._before = _now.copy, _now.keys
        _now.copy, _now.keys = self._call

    def __exit__(self, *_: object) -> None:
        _now.copy, _now.keys = self._before


def deferred(function: Callable[..., Any], copy: WorkingCopy, keys: Keys) -> Callable[..., Any]:
    """Return a function that runs later as it would now: with the same functions replaced and the same keys."""
    keys = keys.copy()

    @functools.wraps(function)
    def later(*args: Any, **kwargs: Any) -> Any:
        if _now.copy is copy:
            return function(*args, **kwargs)
        again = keys.copy()
        with CurrentCall(copy, again), PureMode(again, copy):
            return function(*args, **kwargs)

    return later


def _checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of the generator of torch's checkpoint that knows the current call."""

    @functools.wraps(original)
    def generator(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _now.copy is None or _now.keys is None:
            return original(function, *args, **kwargs)
        if transformed() or watched():  # these save what they need themselves, and do not allow checkpoints
            return iter((None,))
        return original(deferred(function, _now.copy, _now.keys), *args, **kwargs)

    return generator


class _Reentrant(of_torch.CheckpointFunction):
    """Use non-reentrant checkpoints in the call of a converted module: this kind has no `autograd.grad`."""

    @classmethod
    def apply(cls, function: Any, preserve: bool, *args: Any) -> Any:
        if _now.copy is None:
            return of_torch_reentrant.apply(function, preserve, *args)
        return of_torch.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


of_torch_reentrant = of_torch.CheckpointFunction


def install() -> None:
    """Patch torch's checkpoint inside of the calls of converted modules; elsewhere it is unchanged."""
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"):
        if hasattr(of_torch, name):
            setattr(of_torch, name, _checkpoint(getattr(of_torch, name)))
            break
    of_torch.CheckpointFunction = _Reentrant  # type: ignore[misc]


install()
