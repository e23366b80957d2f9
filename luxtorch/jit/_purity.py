"""Watching a function while it is traced: what would not be the same at the next call is an error, with its line."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from luxtorch.core import InputError, LuxtorchError

from ._where import library, user_line

_aten = torch.ops.aten

# Operators that return a value of a tensor to Python.
_READS = frozenset((_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default))


class TracingError(LuxtorchError, RuntimeError):
    """Report that a function does what cannot be in a compiled graph; the place is the user's line.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch.jit import jit
        >>> jit(lambda x: x + torch.rand(2), backend="replay")(torch.ones(2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        luxtorch.jit._purity.TracingError: ...: A jitted function draws from a generator of torch, by aten.rand.default.
          fix:      Pass a key and draw with luxtorch.random, whose draws are functions of it.
    """


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Look at each operator of a trace before it is recorded."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given: set[int] = set()
        self._storages: list[int] = []
        self._arguments: list[weakref.ref[Tensor]] = []
        self._made: list[tuple[weakref.ref[Tensor], str, str]] = []
        self._constants: dict[int, Tensor] = {}
        self._computed: dict[int, Tensor] = {}
        self._records = torch.is_grad_enabled()

    def given(self, arguments: Iterable[Tensor]) -> Watch:
        """Return this watch, told which tensors stand for the arguments."""
        arguments = list(arguments)
        self._storages = list(map(storage, arguments))
        self._given = set(self._storages)
        self._arguments = list(map(weakref.ref, arguments))
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = func is not _aten.lift_fresh.default and _is_known(args, kwargs)
        if isinstance(func, torch._ops.OpOverload):
            draws, written = _facts(func)
            if draws and _is_random(func, args, kwargs):
                raise TracingError(
                    f"A jitted function draws from a generator of torch, by {func}.",
                    fix="Pass a key and draw with luxtorch.random, whose draws are functions of it.",
                    where=user_line(),
                )
            for place, name in written:
                self._check_written(func, args[place] if place < len(args) else kwargs.get(name), known)
        if self._records and torch.is_grad_enabled() and func is not _aten.detach.default:
            self._check_recorded([*args, *kwargs.values()])
        if known:
            with _disable_current_modes():
                return self._constant(args, func(*args, **kwargs))
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _value_needed(func) from error
        except RuntimeError as error:
            if func in _READS:
                raise _value_needed(func) from error
            raise
        self._remember(func, result)
        return result

    def check_given(self, arguments: Iterable[Tensor]) -> None:
        """Raise if an argument has been given other memory, as by `x.data = y`, of which no operator tells."""
        if list(map(storage, arguments)) != self._storages:
            raise TracingError(
                "A jitted function changes an argument in place, by setting its data.",
                fix="Return the new values instead.",
                where=user_line(),
            )

    def is_computed(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed while tracing, in memory of its own: it is not one that is closed over."""
        return storage(tensor) in self._constants

    def check_leaks(self) -> None:
        """Raise if a tensor of the trace is still held by something, now that the trace is over."""
        kept = [*self._made, *((ref, "", user_line()) for ref in self._arguments)]
        if any(ref() is not None for ref, _, _ in kept):
            gc.collect()
        for ref, func, line in kept:
            tensor = ref()
            if tensor is not None:
                what = f"a result of {func}" if func else f"an argument of shape {tuple(tensor.shape)}"
                raise TracingError(
                    f"A jitted function keeps {what} somewhere outside of itself.",
                    got="a tensor without numbers: it stands for those of every later call",
                    fix="Return it from the function instead.",
                    where=line,
                )

    def _constant(self, args: Any, result: Any) -> Any:
        """Return a result that is known while tracing; the function may write to it as long as that is so."""
        given = {storage(tensor) for tensor in tensors_in(args)} - self._constants.keys()
        self._constants |= {storage(tensor): tensor for tensor in tensors_in([result]) if storage(tensor) not in given}
        self._computed |= {id(tensor): tensor for tensor in tensors_in([result])}
        return result

    def _check_recorded(self, values: Iterable[Any]) -> None:
        """Raise where a derivative would silently be lost: tensors that are closed over are constants."""
        for tensor in tensors_in(values):
            inside = isinstance(tensor, FakeTensor) or id(tensor) in self._computed
            if tensor.requires_grad and not inside:
                raise InputError(
                    "A jitted function closes over a tensor that requires grad, which would be a constant to it.",
                    got=f"a tensor of shape {tuple(tensor.shape)}",
                    fix="Pass it as an argument, or detach it.",
                    where=user_line(),
                )

    def _check_written(self, func: Any, written: Any, known: bool) -> None:
        for tensor in tensors_in([written]):
            if known and storage(tensor) in self._constants:
                continue
            outside = not isinstance(tensor, FakeTensor)
            if outside or storage(tensor) in self._given:
                what = "a tensor that it closes over" if outside else "an argument"
                raise TracingError(
                    f"A jitted function changes {what} in place, by {func}.",
                    fix="Return the new values instead. (An argument named in `donate` gives its memory to them.)",
                    where=user_line(),
                )

    def _remember(self, func: Any, result: Any) -> None:
        for tensor in tensors_in([result]):
            if isinstance(tensor, FakeTensor):
                self._made.append((weakref.ref(tensor), str(func), user_line()))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn errors of torch's insides into a `TracingError` with the user's line; those of the user stay as they are.

    To code that catches it, it is what torch raises otherwise as well: an IndexError, a ValueError.
    """
    # What is raised anyway is not to be logged and warned of besides.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Error detected in .* Traceback of forward call")
            yield
    except LuxtorchError:
        raise
    except Exception as error:
        text = str(error)
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if library(frame) in _TRACERS or any(phrase in text for phrase in _PHRASES):
            raise _explanation(error) from error
        raise
    finally:
        logger.disabled = before


_TRACERS = ("torch", "functorch", "")

# How torch speaks of tensors that have no numbers.
_NUMBERS = ("not supported for tensor subclasses", "data is not allocated yet", "access data pointer")
_PHRASES = (*_NUMBERS, "FakeTensor", "in the TorchScript interpreter", "Can't pickle local object 'WeakValueDict")


def _explanation(error: Exception) -> TracingError:
    where = user_line(error)
    text = str(error).strip()
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return _value_needed(error.func, where)
    if any(phrase in text for phrase in _NUMBERS):
        return TracingError(
            "A jitted function takes the numbers out of a tensor, but what it traces has none.",
            got=text.partition("\n")[0],
            fix="Keep to torch's functions of tensors; copy.deepcopy(x) is x.clone().",
            where=where,
        )
    builtin = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return _also(builtin)(
        "A jitted function fails while it is traced.",
        got=f"{type(error).__name__}: {text.partition(chr(10))[0]}",
        where=where,
    )


@functools.cache
def _also(kind: type) -> type[TracingError]:
    """Return the class of tracing errors that are of another class as well."""
    if issubclass(TracingError, kind):
        return TracingError

    def reduce(error: TracingError) -> Any:
        return TracingError, (error.problem,), error.__dict__

    names = {"__module__": TracingError.__module__, "__reduce__": reduce}
    return type(TracingError.__name__, (TracingError, kind), names)


@functools.cache
def _facts(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Return whether an operator draws random numbers, and which of its arguments it writes to."""
    written = tuple(
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return torch.Tag.nondeterministic_seeded in func.tags, written


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a call of an operator that can draw does draw: attention and the RNNs do if they drop out."""
    arguments = func._schema.arguments
    given = {one.name: one.default_value for one in arguments if one.has_default_value()}
    given |= dict(zip((one.name for one in arguments), args, strict=False)) | kwargs
    if given.get("train", given.get("training")) is False:
        return False
    return bool(given.get("dropout_p", given.get("dropout", given.get("p", 1.0))))


def _is_known(args: Any, kwargs: Any) -> bool:
    """Tell whether an operator works on what is closed over alone: its result is a constant then."""
    tensors = tensors_in([*args, *kwargs.values()])
    return bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operator, also those in lists."""
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]


def _value_needed(func: Any, where: str = "") -> TracingError:
    return TracingError(
        f"A jitted function needs the value of a tensor to go on, by {func}, but what it traces has none.",
        expected="the same operators for all values: no `if`, `float(...)`, `.item()` or `x[mask]` on a traced tensor",
        fix="Use torch.where or torch.cond, or pass the number as an argument of its own: each makes its own graph.",
        where=where or user_line(),
    )


def storage(tensor: Tensor) -> int:
    """Return what is the same for tensors that share memory, and for no others."""
    return int(tensor.untyped_storage()._cdata)
