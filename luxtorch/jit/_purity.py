"""Purity checks while tracing: random numbers, in-place changes and leaked tensors are a TracingError with its line."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode_temporarily

from luxtorch._errors import called_by_user, package_of, user_line
from luxtorch._torch import storage_id, version_of
from luxtorch._transforms import unwrapped
from luxtorch.core import InputError, LuxtorchError, described

from ._effects import EFFECTS, arguments, tensors_in, with_declared_writes, written
from ._flatten import SHARDED
from ._sizes import any_symbol

IsTraced: TypeAlias = Callable[[Tensor], bool]
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _is_traced_number(item: Any, is_traced: IsTraced) -> bool:
    """Tell whether an index is a whole number without a value."""
    return isinstance(item, Tensor) and not item.ndim and item.dtype in _INTEGERS and is_traced(item)


def taken(x: Tensor, index: Any, is_traced: IsTraced) -> Tensor:
    """Return `x[index]`."""
    place = _first(x, index, is_traced)
    if place is None:
        return x[index]
    dim, rows, rest = place
    return taken(x.index_select(dim, rows), rest, is_traced)


def put(x: Tensor, index: Any, value: Any, is_traced: IsTraced) -> None:
    """Do `x[index] = value`."""
    place = _first(x, index, is_traced)
    if place is None:
        x[index] = value
        return
    dim, rows, rest = place
    part = x.index_select(dim, rows)
    put(part, rest, value, is_traced)
    there = torch.arange(x.shape[dim], device=x.device) == rows  # vmap has no rule for index_copy_
    x.copy_(torch.where(there.view(-1, *[1] * (x.ndim - dim - 1)), part, x))


def _first(x: Tensor, index: Any, is_traced: IsTraced) -> tuple[int, Tensor, Any] | None:
    """Return the dimension of the first traced number, that number as rows, and the index into these rows instead."""
    items = index if isinstance(index, tuple) else (index,)
    at = next((n for n, item in enumerate(items) if _is_traced_number(item, is_traced)), None)
    if at is None:
        return None
    dim = sum(map(_dims, items[:at]))
    if any(item is ... for item in items[:at]):
        dim = x.ndim - sum(map(_dims, items[at:]))
    if not 0 <= dim < x.ndim:
        raise IndexError(f"too many indices for tensor of dimension {x.ndim}")
    number = items[at].long()
    rows = torch.where(number < 0, number + x.shape[dim], number).view(1)
    return dim, rows, (*items[:at], 0, *items[at + 1 :])


def _dims(item: Any) -> int:
    """Return how many dimensions an index takes."""
    if item is None or item is ... or isinstance(item, bool):
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


_aten = torch.ops.aten

# Operators that return a value of a tensor to Python.
_READS = frozenset((_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default))

# Operators that make positions and masks, whose values code may read.
_MADE = frozenset((_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.ones.default))

# Derivatives of means whose meta kernels divide by the number of elements, even by zero.
_DIVIDES = frozenset(
    (_aten.mse_loss_backward.default, _aten.smooth_l1_loss_backward.default, _aten.huber_loss_backward.default)
)


class TracingError(LuxtorchError, RuntimeError):
    """Report that a function cannot be compiled, such as an impure one; the place is the user's line.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch.jit import jit
        >>> jit(lambda x: x + torch.rand(2), backend="replay")(torch.ones(2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        luxtorch.jit._purity.TracingError: ...: A jitted function must not draw from a generator of torch, as ... does.
          fix:      Pass a key and draw with luxtorch.random, whose draws are functions of it.
    """


class ConstantFolding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fold constants while tracing: compute what depends on closed-over tensors alone, so that its values can be read.

    The results are constants of the graph, until a traced value is written into one: from then on the graph has a copy
    of it, which replaces the constant in all later operators.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed: dict[int, Tensor] = {}  # by their ids
        self._own: set[int] = set()  # storages
        self._copies: dict[int, Tensor] = {}  # by the storages that they replace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if SHARDED and not SHARDED.isdisjoint(types):
            return NotImplemented  # what a sharded tensor does is seen as what this rank's part does
        args, kwargs = self._current(args, kwargs or {})
        known = _is_known(func, args, kwargs)
        self.check(func, args, kwargs)
        for tensor in written(func, args, kwargs):
            if not (known and self.owns(tensor)):
                self.write(func, tensor, known)
        if known:
            return self._compute(func, args, kwargs)
        args, kwargs = self._current(args, kwargs)
        operator = with_declared_writes(func, args, kwargs)
        if func in _DIVIDES and not args[1].numel():
            operator = _empty_mean_gradient
        return self.record(operator, func, args, kwargs)

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise if an operator is not allowed."""

    def write(self, func: Any, tensor: Tensor, known: bool) -> None:
        """Prepare for a write to a tensor; `known` is whether the written values are known."""
        if self.owns(tensor):
            self._copy(tensor)

    def record(self, operator: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operator in the graph."""
        return operator(*args, **kwargs)

    def outputs(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the results of a function, with new tensors for its own constants; to be called inside of the mode."""
        return [self._output(tensor) for tensor in tensors]

    def is_outdated(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a constant that has been written to."""
        tensor = unwrapped(tensor)
        return bool(self._copies) and not _is_traced(tensor) and storage(tensor) in self._copies

    def _output(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        # To autograd a tensor is a view of the constant, even if its values are those of the copy.
        if self.is_outdated(tensor) or self.is_outdated(base):
            return torch.clone(tensor)
        if self.owns(tensor):
            with _pop_mode_temporarily():
                return torch.ops.aten.lift_fresh.default(tensor)  # type: ignore[no-any-return]
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        """Return whether a tensor was computed while tracing, in memory that no closed-over tensor shares."""
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
        """Copy the whole memory of a tensor in the graph, since there may be other views of it."""
        with _disable_current_modes(), torch.no_grad():
            memory = tensor.untyped_storage()
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            flat = flat.set_(memory, 0, (memory.nbytes() // tensor.element_size(),), (1,)).clone()
        # torch itself would fold a copy made by `clone`, and later reads of it.
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


class FunctionCheck(TorchFunctionMode):
    """Check calls of torch functions while tracing, for what operators do not show.

    Attributes:
        strides: Whether the function has read strides.
    """

    def __init__(self, known: ConstantFolding) -> None:
        super().__init__()
        self._known = known
        self.strides = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            _check_loop(func)
        if func in _LAYOUT:
            self.strides |= called_by_user()
        elif func in (Tensor.tolist, Tensor.numpy) and self._known.is_outdated(args[0]):
            raise _value_needed(f"Tensor.{func.__name__}")
        elif func in _INDEXING:
            return _INDEXING[func](*args, _has_no_value)
        elif "out" in kwargs:
            return self._into(func, args, kwargs)
        return func(*args, **kwargs)

    def _into(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Some functions, as `torch.linalg.matrix_rank`, do not write to `out` under a dispatch mode.
        outs = [tensor for tensor in tensors_in([kwargs["out"]]) if isinstance(tensor, FakeTensor)]
        before = [version_of(tensor) for tensor in outs]
        result = func(*args, **kwargs)
        if any(version_of(tensor) == version for tensor, version in zip(outs, before, strict=True)):
            raise TracingError(
                f"A jitted function must not pass out= to {resolve_name(func) or func}, whose write would be lost.",
                fix="Use the returned tensor instead.",
                where=user_line(),
            )
        return result


_INDEXING: dict[Any, Callable[..., Any]] = {Tensor.__getitem__: taken, Tensor.__setitem__: put}


def _has_no_value(tensor: Tensor) -> bool:
    return _is_traced(unwrapped(tensor))


# Functions that depend on strides.
_LAYOUT = (Tensor.stride, Tensor.is_contiguous, Tensor.storage_offset, Tensor.as_strided, torch.as_strided)


class TraceCheck(ConstantFolding):  # type: ignore[no-untyped-call]
    """Check each operator of a trace before it is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._given: set[int] = set()
        self._storages: list[int] = []
        self._arguments: list[weakref.ref[Tensor]] = []
        self._made: list[tuple[weakref.ref[Tensor], str, str]] = []
        self._records = torch.is_grad_enabled()

    def with_arguments(self, arguments: Iterable[Tensor]) -> TraceCheck:
        """Set the traced tensors of the arguments, and return the mode itself."""
        arguments = list(arguments)
        self._storages = list(map(storage, arguments))
        self._given = set(self._storages)
        self._arguments = list(map(weakref.ref, arguments))
        return self

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise if an operator draws random numbers, or would lose a derivative."""
        if isinstance(func, torch._ops.HigherOrderOperator):
            _check_loop(func)
        if isinstance(func, torch._ops.OpOverload) and _is_random(func, args, kwargs):
            headline = f"A jitted function must not draw from a generator of torch, as {func} does."
            fix = "Pass a key and draw with luxtorch.random, whose draws are functions of it."
            raise TracingError(headline, fix=fix, where=user_line())
        if self._records and torch.is_grad_enabled() and func is not _aten.detach.default:
            self._check_recorded([*args, *kwargs.values()])

    def write(self, func: Any, tensor: Tensor, known: bool) -> None:
        """Raise if a tensor was not made by the function."""
        super().write(func, tensor, known)
        outside = not _is_traced(tensor) and not self.owns(tensor)
        if outside or storage(tensor) in self._given:
            what = "a tensor that it closes over" if outside else "an argument"
            headline = f"A jitted function must not change {what} in place, as by {func}."
            fix = "Return the new values instead. (They reuse the memory of arguments named in `donate`.)"
            raise TracingError(headline, fix=fix, where=user_line())

    def record(self, operator: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operator in the graph, if it does not need values, and remember its results."""
        if operator is None:
            headline = f"A jitted function must not call {func} with running statistics, which it changes in place."
            fix = "Compute the new statistics and return them, or pass None for them."
            raise TracingError(headline, fix=fix, where=user_line())
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
        """Raise if `data` of an argument was set, as by `x.data = y`, which no operator shows."""
        if list(map(storage, arguments)) != self._storages:
            headline, fix = "A jitted function must not change an argument in place.", "Return the new values instead."
            raise TracingError(headline, got="a write to its .data", fix=fix, where=user_line())

    def check_leaks(self) -> None:
        """Raise if something still references a traced tensor after the trace."""
        self._copies, self._computed = {}, {}
        kept = [*self._made, *((ref, "", user_line()) for ref in self._arguments)]
        if any(ref() is not None for ref, _, _ in kept):
            gc.collect()
        for ref, func, line in kept:
            tensor = ref()
            if tensor is not None:
                what = f"a result of {func}" if func else f"an argument of shape {tuple(tensor.shape)}"
                headline = f"A jitted function must not keep {what} outside of itself: a traced tensor has no values."
                raise TracingError(headline, fix="Return it from the function instead.", where=line)

    def _check_recorded(self, values: Iterable[Any]) -> None:
        """Raise where a derivative would be lost silently: closed-over tensors are constants."""
        for tensor in tensors_in(values):
            inside = isinstance(tensor, FakeTensor) or id(tensor) in self._computed
            if tensor.requires_grad and not inside:
                headline = "A jitted function must not close over a tensor that requires grad: it would be a constant."
                fix = "Pass it as an argument, or detach it."
                raise InputError(headline, got=described(tensor), fix=fix, where=user_line())


@contextlib.contextmanager
def tracing_errors() -> Iterator[None]:
    """Turn internal errors of torch into a `TracingError` with the user's line; the user's own are unchanged.

    The error also has the class of what torch raises otherwise, such as IndexError, for code that catches it.
    """
    # An error that is raised need not be logged too.
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
        if package_of(frame) in _TRACERS or any(phrase in text for phrase in _PHRASES):
            raise _tracing_error(error) from error
        raise
    finally:
        logger.disabled = before


_TRACERS = ("torch", "functorch", "")

# Errors of torch about tensors without values.
_NUMBERS = ("not supported for tensor subclasses", "data is not allocated yet", "access data pointer")
_PHRASES = (*_NUMBERS, "FakeTensor", "in the TorchScript interpreter", "Can't pickle local object 'WeakValueDict")


def _tracing_error(error: Exception) -> TracingError:
    where = user_line(error)
    text = str(error).strip()
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return _value_needed(error.func, where)
    if any(phrase in text for phrase in _NUMBERS):
        headline = "A jitted function must not read the values of a tensor: a traced tensor has none."
        fix = "Use torch's functions of tensors; for copy.deepcopy(x), x.clone()."
        return TracingError(headline, got=text.partition("\n")[0], fix=fix, where=where)
    builtin = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    got = f"{type(error).__name__}: {text.partition(chr(10))[0]}"
    return _also(builtin)("A jitted function failed while it was traced.", got=got, where=where)


@functools.cache
def _also(kind: type) -> type[TracingError]:
    """Return a class of tracing errors that is also derived from a builtin exception."""
    if issubclass(TracingError, kind):
        return TracingError

    def reduce(error: TracingError) -> Any:
        return TracingError, (error.problem,), error.__dict__

    names = {"__module__": TracingError.__module__, "__reduce__": reduce}
    return type(TracingError.__name__, (TracingError, kind), names)


def _empty_mean_gradient(grad: Tensor, x: Tensor, y: Tensor, *_: Any) -> Any:
    return _aten.mul.Tensor(_aten.sub.Tensor(x, y), grad)


@functools.cache
def can_draw(func: Any) -> bool:
    """Tell whether an operator can draw random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a call of an operator draws random numbers; attention and RNNs do with dropout."""
    if not can_draw(func):
        return False
    given = arguments(func, args, kwargs)
    if given.get("train", given.get("training")) is False:
        return False
    return bool(given.get("dropout_p", given.get("dropout", given.get("p", 1.0))))


def _is_known(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator has closed-over tensors alone as inputs, or none: its result is a constant."""
    values = [*args, *kwargs.values()]
    tensors = tensors_in(values)
    return (
        (bool(tensors) or func in _MADE)
        and func not in EFFECTS
        and not any(map(_is_traced, tensors))
        and not any_symbol(values)
    )


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
            f"A jitted function must not call torch's own operator '{func.name()}'.",
            fix=f"Use {_LOOPS[func.name()]}, which works under every transform.",
            where=user_line(),
        )


def _value_needed(func: Any, where: str = "") -> TracingError:
    return TracingError(
        f"A jitted function must not depend on the value of a tensor, as by {func}: a traced tensor has none.",
        expected="the same operators for all values: no `if`, `float(...)`, `.item()` or `x[mask]` on a traced tensor",
        fix="Use torch.where, lt.cond or lt.while_loop, or pass the number as an argument: each value has a graph.",
        where=where or user_line(),
    )


def storage(tensor: Tensor) -> int:
    """Return an id that tensors have in common if they share memory."""
    return storage_id(tensor)
