"""Calls of Python functions by programs: the operator, which finds a function by name, `callback` and `breakpoint`."""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, in_compiled_body
from luxtorch._transforms import functional, is_silenced, traced
from luxtorch.core import (
    InputError,
    LuxtorchError,
    map_tensors,
    tensors,
    tree_flatten,
    tree_map,
    tree_unflatten,
    wrong_type,
)
from luxtorch.jit._bodies import hold, keep
from luxtorch.jit._effects import register_effect

Place: TypeAlias = "tuple[int, ...]"
"""Which member of the batches of vmap, the outermost first; empty outside of vmap."""

_CALLS: WeakValueDictionary[str, Call] = WeakValueDictionary()
_FOREVER: dict[str, Call] = {}
"""Those of torch.compile, which does not tell when a program of its is gone."""


class Call:
    """Hold what a program calls: a function, and its arguments but for the values of tensors.

    Args:
        name: What it is called by. Equal calls have one name, unless they call a user's function.
        f: Takes the options, the tree, and the place in a batch.
        options: Its first arguments.
        tree: The tree, with `Call` for each tensor.
    """

    def __init__(self, name: str, f: Callable[..., object], options: tuple[Any, ...], tree: Any) -> None:
        self.name = name
        self._f, self._options = f, options
        self._leaves, self._spec = tree_flatten(tree)

    def run(self, values: Sequence[Tensor], place: Place) -> None:
        """Call the function with these tensors in its tree."""
        given = iter(values)
        leaves = [next(given) if leaf is Call else leaf for leaf in self._leaves]
        self._f(*self._options, tree_unflatten(leaves, self._spec), place)

    def does_as(self, other: Call) -> bool:
        """Tell whether another call certainly does the same."""
        if (self._f, self._options, self._spec) != (other._f, other._options, other._spec):
            return False
        return all(map(_same, self._leaves, other._leaves))


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) in _PLAIN and type(one) is type(other) and one == other)


_PLAIN = (bool, int, float, complex, str)


def _call(f: Callable[..., object], options: tuple[Any, ...], tree: Any) -> Call:
    """Return the call of a function, by the name that equal ones have."""
    name = uuid.uuid4().hex
    # Equal ones are one.
    if all(isinstance(option, str) for option in options):
        name = hashlib.sha256(repr((f.__qualname__, options, tree)).encode()).hexdigest()[:32]
    call = Call(name, f, options, tree)
    known = _CALLS.setdefault(name, call)
    if not known.does_as(call):
        call.name = uuid.uuid4().hex
        known = _CALLS.setdefault(call.name, call)
    return known


@compile_constant
def _name_forever(f: Callable[..., object], options: tuple[Any, ...], tree: Any) -> str:
    if in_compiled_body():
        raise InputError(
            "Inside of torch.compile, bodies of loops and branches must not call lt.debug: they would drop it.",
            fix="Compile by lt.jit, where they do not; or call it outside of the loop.",
        )
    call = _call(f, options, tree)
    _FOREVER[call.name] = call
    return call.name


def _named(name: str) -> Call:
    call = _CALLS.get(name)
    if call is None:
        raise LuxtorchError(
            "What lt.debug is to call is gone: a graph lives on that was traced with it.",
            fix="Keep what was traced first, or trace by lt.jit.",
        )
    return call


@torch.library.custom_op("luxtorch::callback", mutates_args=())
def _callback(name: str, batch: Sequence[int], values: Sequence[Tensor]) -> Tensor:
    """Call a function of Python.

    Args:
        name: Its name.
        batch: The sizes of the batches that come first in all values; it is called for each member in turn.
        values: What it is called with.

    Returns:
        A tensor without elements, since torch orders operators by what they return.
    """
    call = _named(name)
    for place in product(*map(range, batch)):
        call.run([value.detach()[place] for value in values], place)
    return torch.empty(0)


@_callback.register_fake
def _(name: str, batch: Sequence[int], values: Sequence[Tensor]) -> Tensor:
    keep(_named(name))  # for whoever traces it
    return torch.empty(0)


@_callback.register_vmap
def _(
    info: Any, dims: tuple[Any, ...], name: str, batch: Sequence[int], values: Sequence[Tensor]
) -> tuple[Tensor, None]:
    size = info.batch_size
    values = [
        value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        for value, dim in zip(values, dims[2], strict=True)
    ]
    return _callback(name, [size, *batch], values), None


_OPERATOR = torch.ops.luxtorch.callback.default
register_effect(_OPERATOR)


def staged() -> bool:
    """Tell whether tensors may have no values here, or stand for batches, so that an operator has to look at them."""
    return traced() or functional()


def run_with_values(f: Callable[..., object], options: tuple[Any, ...], tree: Any) -> None:
    """Call `f(*options, tree, place)` whenever the program runs, with the values that the tensors have then.

    Args:
        f: The function.
        options: Strings and numbers.
        tree: Any tree. Its tensors come without gradients, and symbols of sizes as tensors.
    """
    if torch.compiler.is_dynamo_compiling():
        _callback(_name_forever(f, options, _without_tensors(tree)), [], [one.detach() for one in tensors(tree)])
        return
    if is_silenced():
        return
    tree = tree_map(lambda leaf: torch.full((), leaf) if isinstance(leaf, SYMBOLS) else leaf, tree)
    values = [tensor.detach() for tensor in tensors(tree)]
    if any(value.is_meta for value in values):
        return  # there are no numbers
    call = _call(f, options, _without_tensors(tree))
    if staged():
        _callback(call.name, [], values)
        hold(_OPERATOR, [call])
    else:
        call.run(values, ())


def _without_tensors(tree: Any) -> Any:
    return tree_map(lambda leaf: Call if isinstance(leaf, Tensor) else leaf, tree)


SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that depend on the sizes of tensors, which are not known while a function is traced."""


def callback(f: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Call a function of Python with the values of tensors, whenever the program runs.

    In eager code that is a plain call. Inside of `lt.jit`, and in bodies of `lt.scan` and the like there, it is called
    each time that the program gets there, in the order of the code, whether or not anything is made of it. The tensors
    that it gets are copies without gradients, so it may keep them. What it returns is dropped; what it raises ends the
    program.

    Under vmap it is called for each member in turn, if any of the arguments differs between members. Derivatives call
    it once, in the forward pass, with the values alone. Where vmap runs both branches of `lt.cond`, or a loop on for
    members that are done, it is called there too. On a GPU it waits for the values.

    A program that calls Python replays its operators one by one, as with `backend="replay"`, and is not exported. In
    torch.compile the graph breaks there, so not with `fullgraph=True`; `lt.debug.print` and `lt.debug.check` stay in
    the graph, but for bodies of loops and branches, where they are an error.

    Args:
        f: The function.
        args: Any trees. What is not a tensor is passed as it is when the function is traced.
        kwargs: Arguments by name.

    Raises:
        DTypeError: If `f` is not a function.

    Example:
        >>> import torch, luxtorch as lt
        >>> seen = []
        >>> def step(c, x):
        ...     lt.debug.callback(lambda c: seen.append(float(c)), c)
        ...     return c + x, None
        >>> lt.jit(lambda xs: lt.scan(step, torch.tensor(0.0), xs)[0], backend="replay")(torch.ones(3))
        tensor(3.)
        >>> seen
        [0.0, 1.0, 2.0]

    Source: `jax.debug.callback`, always ordered.
    """
    if torch.compiler.is_dynamo_compiling():
        # As a constant of a graph, a function that was made in there would get copies of what it closes over.
        uncompiled: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
            _callback_now, reason="lt.debug.callback calls Python; lt.debug.print and check stay in the graph."
        )
        uncompiled(f, args, kwargs)
    else:
        _callback_now(f, args, kwargs)


def _callback_now(f: Callable[..., object], args: Any, kwargs: Any) -> None:
    if not callable(f):
        raise wrong_type("f", f, "a function")
    run_with_values(_with_copies, (f,), (args, kwargs))


def _with_copies(f: Callable[..., object], tree: Any, place: Place) -> None:
    args, kwargs = map_tensors(torch.clone, tree)
    f(*args, **kwargs)


def breakpoint(**values: Any) -> None:
    """Stop in Python's debugger, whenever the program runs.

    In eager code it stops in the caller's frame, as Python's `breakpoint()` does. Inside of `lt.jit`, and under
    transforms, where the names of the function stand for no values, it stops when the program gets there, and has the
    values that were passed under their names; see `lt.debug.callback`. `sys.breakpointhook`, and with it
    `PYTHONBREAKPOINT`, choose another debugger or none.

    Args:
        values: What to look at, any trees.

    Example:
        >>> import sys, torch, luxtorch as lt
        >>> def look():  # in place of a debugger, which would wait for commands
        ...     print(sys._getframe(1).f_locals["loss"])
        >>> before, sys.breakpointhook = sys.breakpointhook, look
        >>> @lt.jit(backend="replay")
        ... def double(x):
        ...     lt.debug.breakpoint(loss=2 * x)
        ...     return 2 * x
        >>> double(torch.tensor(3.0))
        tensor(6.)
        tensor(6.)
        >>> sys.breakpointhook = before

    Source: `jax.debug.breakpoint`; the debugger is Python's own.
    """
    if not staged():
        frame = sys._getframe(1)
        if sys.breakpointhook is sys.__breakpointhook__ and not os.environ.get("PYTHONBREAKPOINT"):
            from pdb import Pdb

            Pdb().set_trace(frame)
        else:
            _stop({**frame.f_locals, **values}, frame.f_globals)
        return
    run_with_values(_stop_with, (), values)


def _stop_with(values: Any, place: Place) -> None:
    _stop(values, {})


def _stop(names: dict[str, Any], scope: dict[str, Any]) -> None:
    exec(_CODE, dict(scope), names)


_CODE = compile("breakpoint()", "<lt.debug.breakpoint>", "exec")
