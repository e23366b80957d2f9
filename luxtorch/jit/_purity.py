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
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode_temporarily

from luxtorch._torch import storage_id, version_of
from luxtorch._transforms import unwrapped
from luxtorch.core import InputError, LuxtorchError

from ._sizes import any_symbol
from ._where import library, user_calls, user_line
from ._writes import arguments, as_it_writes, tensors_in, written

_aten = torch.ops.aten

# Operators that return a value of a tensor to Python.
_READS = frozenset((_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default))

# Operators that make positions and masks, of which code asks whether they are those of one sequence, and whole.
_MADE = frozenset((_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.ones.default))

# Derivatives of means whose forms for tensors without numbers divide by the number of elements, even by zero.
_DIVIDES = frozenset(
    (_aten.mse_loss_backward.default, _aten.smooth_l1_loss_backward.default, _aten.huber_loss_backward.default)
)


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


class Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute what depends on closed-over tensors alone while tracing, so that its value can be read.

    What comes of this is a constant of the graph, until something is written to it that is not known: from then on the
    graph has a copy of its own, which takes the constant's place in all later operators.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed: dict[int, Tensor] = {}  # by their ids
        self._own: set[int] = set()  # storages
        self._copies: dict[int, Tensor] = {}  # by the storages that they stand for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._current(args, kwargs or {})
        known = _is_known(func, args, kwargs)
        self.check(func, args, kwargs)
        for tensor in written(func, args, kwargs):
            if not (known and self.owns(tensor)):
                self.write(func, tensor, known)
        if known:
            return self._compute(func, args, kwargs)
        args, kwargs = self._current(args, kwargs)
        operator = as_it_writes(func, args, kwargs)
        if func in _DIVIDES and not args[1].numel():
            operator = _gradient_of_nothing
        return self.record(operator, func, args, kwargs)

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise if an operator is not allowed."""

    def write(self, func: Any, tensor: Tensor, known: bool) -> None:
        """Prepare for a write to a tensor; `known` is whether what is written is known."""
        if self.owns(tensor):
            self._copy(tensor)

    def record(self, operator: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Let an operator go into the graph."""
        return operator(*args, **kwargs)

    def outputs(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return what a function returns, with new tensors for its own constants; to be called inside."""
        return [self._output(tensor) for tensor in tensors]

    def is_outdated(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a constant that has been written to."""
        tensor = unwrapped(tensor)
        return bool(self._copies) and not _is_traced(tensor) and storage(tensor) in self._copies

    def _output(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        # Autograd calls a tensor a view of the constant, even if what is in it is that of the copy.
        if self.is_outdated(tensor) or self.is_outdated(base):
            return torch.clone(tensor)
        if self.owns(tensor):
            with _pop_mode_temporarily():
                return torch.ops.aten.lift_fresh.default(tensor)  # type: ignore[no-any-return]
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed while tracing, in memory of its own: it is not one that is closed over."""
        return not _is_traced(tensor) and storage(tensor) in self._own

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = {storage(tensor) for tensor in tensors_in(args)} - self._own
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for tensor in tensors_in([result]):
            self._computed[id(tensor)] = tensor
            if storage(tensor) not in given or func is _aten.lift_fresh.default:
                self._own.add(storage(tensor))
        return result

    def _copy(self, tensor: Tensor) -> None:
        """Let the graph copy the memory of a tensor: all of it, since there may be other views of it."""
        with _disable_current_modes(), torch.no_grad():
            memory = tensor.untyped_storage()
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            flat = flat.set_(memory, 0, (memory.nbytes() // tensor.element_size(),), (1,)).clone()
        # torch itself would take a copy made by `clone` for known, and so later reads of it.
        copy = _aten.empty.memory_format(list(flat.shape), dtype=flat.dtype, device=flat.device)
        self._copies[storage(tensor)] = _aten.copy_.default(copy, flat)

    def _current(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return arguments with copies for the constants that were written to."""
        if not self._copies:
            return args, kwargs
        return tuple(map(self._replaced, args)), {name: self._replaced(value) for name, value in kwargs.items()}

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._replaced, value))
        if not isinstance(value, Tensor) or not self.is_outdated(value):
            return value
        copy = self._copies[storage(value)]
        if value.dtype != copy.dtype:
            copy = _aten.view.dtype(copy, value.dtype)
        if value.is_contiguous() and value.numel() == copy.numel():
            return _aten.view.default(copy, list(value.shape))
        return _aten.as_strided.default(copy, value.shape, value.stride(), value.storage_offset())


class Functions(TorchFunctionMode):
    """Look at the calls of torch's functions while a function is traced, for what no operator shows.

    Attributes:
        strides: Whether the function has asked how a tensor lies in memory.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()
        self._known = known
        self.strides = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            _check_loop(func)
        if func in _LAYOUT:
            self.strides |= user_calls()
        elif func in (Tensor.tolist, Tensor.numpy) and self._known.is_outdated(args[0]):
            raise _value_needed(f"Tensor.{func.__name__}")
        elif "out" in kwargs:
            return self._into(func, args, kwargs)
        return func(*args, **kwargs)

    def _into(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Where torch only looks at `out`, as in `torch.linalg.matrix_rank`, the write is lost under any dispatch mode.
        outs = [tensor for tensor in tensors_in([kwargs["out"]]) if isinstance(tensor, FakeTensor)]
        before = [version_of(tensor) for tensor in outs]
        result = func(*args, **kwargs)
        if any(version_of(tensor) == version for tensor, version in zip(outs, before, strict=True)):
            raise TracingError(
                f"A jitted function loses what {resolve_name(func) or func} would write into its argument 'out'.",
                fix="Take what the function returns instead.",
                where=user_line(),
            )
        return result


# What tells how a tensor lies in memory, or depends on it.
_LAYOUT = (Tensor.stride, Tensor.is_contiguous, Tensor.storage_offset, Tensor.as_strided, torch.as_strided)


class Watch(Known):  # type: ignore[no-untyped-call]
    """Look at each operator of a trace before it is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._given: set[int] = set()
        self._storages: list[int] = []
        self._arguments: list[weakref.ref[Tensor]] = []
        self._made: list[tuple[weakref.ref[Tensor], str, str]] = []
        self._records = torch.is_grad_enabled()

    def given(self, arguments: Iterable[Tensor]) -> Watch:
        """Return this watch, told which tensors stand for the arguments."""
        arguments = list(arguments)
        self._storages = list(map(storage, arguments))
        self._given = set(self._storages)
        self._arguments = list(map(weakref.ref, arguments))
        return self

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise if an operator draws, or would lose a derivative."""
        if isinstance(func, torch._ops.HigherOrderOperator):
            _check_loop(func)
        if isinstance(func, torch._ops.OpOverload) and _is_random(func, args, kwargs):
            raise TracingError(
                f"A jitted function draws from a generator of torch, by {func}.",
                fix="Pass a key and draw with luxtorch.random, whose draws are functions of it.",
                where=user_line(),
            )
        if self._records and torch.is_grad_enabled() and func is not _aten.detach.default:
            self._check_recorded([*args, *kwargs.values()])

    def write(self, func: Any, tensor: Tensor, known: bool) -> None:
        """Raise if a tensor is not the function's own."""
        super().write(func, tensor, known)
        outside = not _is_traced(tensor) and not self.owns(tensor)
        if outside or storage(tensor) in self._given:
            what = "a tensor that it closes over" if outside else "an argument"
            raise TracingError(
                f"A jitted function changes {what} in place, by {func}.",
                fix="Return the new values instead. (An argument named in `donate` gives its memory to them.)",
                where=user_line(),
            )

    def record(self, operator: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Let an operator go into the graph, if that needs no value, and note what it makes."""
        if operator is None:
            raise TracingError(
                f"A jitted function calls {func}, which writes running statistics that its schema calls inputs.",
                fix="Compute the new statistics and return them, or pass None for them.",
                where=user_line(),
            )
        try:
            result = operator(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _value_needed(func) from error
        except RuntimeError as error:
            if func in _READS:
                raise _value_needed(func) from error
            raise
        for tensor in tensors_in([result]):
            if isinstance(tensor, FakeTensor):
                self._made.append((weakref.ref(tensor), str(func), user_line()))
        return result

    def check_given(self, arguments: Iterable[Tensor]) -> None:
        """Raise if an argument has been given other memory, as by `x.data = y`, of which no operator tells."""
        if list(map(storage, arguments)) != self._storages:
            raise TracingError(
                "A jitted function changes an argument in place, by setting its data.",
                fix="Return the new values instead.",
                where=user_line(),
            )

    def check_leaks(self) -> None:
        """Raise if a tensor of the trace is still held by something, now that the trace is over."""
        self._copies, self._computed = {}, {}
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


def _gradient_of_nothing(grad: Tensor, x: Tensor, y: Tensor, *_: Any) -> Any:
    return _aten.mul.Tensor(_aten.sub.Tensor(x, y), grad)


@functools.cache
def _can_draw(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a call of an operator that can draw does draw: attention and the RNNs do if they drop out."""
    if not _can_draw(func):
        return False
    given = arguments(func, args, kwargs)
    if given.get("train", given.get("training")) is False:
        return False
    return bool(given.get("dropout_p", given.get("dropout", given.get("p", 1.0))))


def _is_known(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether an operator works on what is closed over alone, or on nothing: its result is a constant then."""
    values = [*args, *kwargs.values()]
    tensors = tensors_in(values)
    return (bool(tensors) or func in _MADE) and not any(map(_is_traced, tensors)) and not any_symbol(values)


def _is_traced(tensor: Tensor) -> bool:
    return isinstance(tensor, (FakeTensor, FunctionalTensor))


# Operators of torch with bodies, which have no rules for transforms, and here are wrong or fail.
_LOOPS = {
    "cond": "lt.cond",
    "while_loop": "lt.while_loop",
    "while_loop_stack_output": "lt.while_loop",
    "scan": "lt.scan",
    "map_impl": "lt.map or torch.vmap",
}


def _check_loop(func: Any) -> None:
    if func.name() in _LOOPS:
        raise TracingError(
            f"A jitted function calls torch's own operator '{func.name()}'.",
            fix=f"Use {_LOOPS[func.name()]}, which works under every transform.",
            where=user_line(),
        )


def _value_needed(func: Any, where: str = "") -> TracingError:
    return TracingError(
        f"A jitted function needs the value of a tensor to go on, by {func}, but what it traces has none.",
        expected="the same operators for all values: no `if`, `float(...)`, `.item()` or `x[mask]` on a traced tensor",
        fix="Use torch.where, lt.cond or lt.while_loop; or pass the number as an argument of its own: each value makes "
        "its own graph.",
        where=where or user_line(),
    )


def storage(tensor: Tensor) -> int:
    """Return what is the same for tensors that share memory, and for no others."""
    return storage_id(tensor)
