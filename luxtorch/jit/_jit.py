"""`jit`: trace and compile a pure function once per signature of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar, overload

import torch
from typing_extensions import ParamSpec, Unpack

from luxtorch.core import InputError, Layer

from ._jitted import Jitted
from ._options import Backend, Dynamic, JitOptions, Options

P = ParamSpec("P")
R = TypeVar("R")


@overload
def jit(fn: Callable[P, R], /, **options: Unpack[JitOptions]) -> Jitted[P, R]: ...
@overload
def jit(**options: Unpack[JitOptions]) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...
def jit(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    donate: str | Sequence[str] = (),
    static: str | Sequence[str] = (),
    dynamic: Dynamic = False,
    backend: Backend = None,
    options: Mapping[str, Any] | None = None,
    background: bool = False,
    maxsize: int = 64,
) -> Any:
    """Compile a pure function; use it as a decorator, or call it.

    The first call traces the function: it runs once with tensors that have shapes but no values, and the operators
    that it calls become a graph. Later calls run the graph, and none of the function's Python code. They only check
    guards: the structure of the arguments, the shape, strides, dtype and device of each tensor, the values of numbers
    and strings, and torch's settings (grad mode, autocast, threads and the like). If one fails, the function is traced
    again.

    What is not an argument is a constant of the graph: tensors and other values that the function closes over have
    their values at the first call, and must not change after that. A number that is an argument is a constant too, and
    each value has a graph of its own: what changes from step to step, such as a learning rate, should be a tensor.

    Inside of transforms of `torch.func`, `torch.vmap`, `torch.compile`, an outer `jit` and other tracers, the function
    itself runs, so that these see all of it.

    If autograd records the call, because a tensor requires grad and grad mode is on, forward and backward are compiled
    together, and the result can be differentiated once: a recorded call has no second derivative (take it inside of
    the function instead).

    Args:
        fn: A pure function of any pytrees to any pytree: nested dicts, a `ComponentVector`, a `TrainState`, nodes
            registered with `torch.utils._pytree` (dataclasses, the outputs of many models) or with optree. What is
            not a node and holds no tensor is a constant: numbers, strings, functions, layers, and other objects are
            compared by all that they hold, at each call. (Classes, modules and layers are assumed not to change.) An
            object, a closure or an iterator that holds a tensor is refused, as an argument and as a result.
        donate: The names of arguments whose memory may be reused for the results, such as parameters and the state of
            an optimizer. Any later use of their tensors is an error, and tensors that share their memory hold other
            numbers, except for other arguments of the call. Calls that autograd records, and inner calls, do not
            donate.
        static: The names of arguments that are compared by their values as a whole, such as a tuple of sizes. Numbers,
            strings, functions and layers are always static.
        dynamic: The names of arguments whose tensors may have any first dimension, such as a batch, without a new
            graph for each size above 1; True for all arguments that are not donated. Other dimensions are named by a
            mapping, `{"x": (0, 1), "y": -1}`, which in a tree applies to each tensor that has such a dimension. Sizes
            0 and 1 have graphs of their own, and so have both branches of an `if` on a size. A size that is returned,
            also as a part of a number such as `1 / n`, is that of the call. Where the function needs the number
            itself, as for `len(x)`, `float(n)`, `range(n)` or a recurrence over time, there is a graph for each size,
            and a warning with the line.
        backend: `"inductor"` compiles kernels. `"replay"` runs the operators one by one, without the function's Python
            code; it compiles in milliseconds. A function is called with the graph and its inputs, and returns the
            program (calls that autograd records are replayed then). None means inductor if there is a C++ compiler,
            and otherwise replay, with a warning.
        options: Settings of inductor, as for `torch.compile`. With `{"triton.cudagraphs": True}` on one GPU, all
            kernels are started by one call, a CUDA graph, which pays for many small ones. Results are copied out of
            the graph, so the next call does not overwrite them, unlike with `torch.compile(mode="reduce-overhead")`.
        background: Whether to replay at first, and compile in another thread meanwhile. The attribute `compiling` tells
            for how many programs, and the logger `luxtorch.jit` at level INFO when a compiled one takes over. From then
            on results may differ in the last bits; without this option all calls run the same program.
        maxsize: The number of graphs to keep; the least recently used is dropped first.

    Returns:
        A function like `fn`, with `cache_info()`, `cache_clear()`, `lower(*args)`, which returns graph and code, and
        `export(path, *args)`, which writes the program into a file for `load_jitted`.

    Raises:
        TracingError: At the first call: if the function draws from a global generator, changes an argument in place,
            keeps a traced tensor, hides one in its result, or needs the value of one; and if torch cannot trace
            it. Errors that the function raises itself are not changed.
        DTypeError: If an argument is neither a tensor nor a constant.
        DonatedError: If a tensor is used after it was donated.
        KeyNameError: If the function has no argument of a name.
        InputError: If an argument is named twice, or the backend is unknown.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch.jit import jit
        >>> @jit(donate="ps", backend="replay")
        ... def step(ps, x):
        ...     grads = lt.gradient(lambda ps: (ps["scale"] * x).square().sum(), ps)
        ...     return {name: p - 0.1 * grads[name] for name, p in ps.items()}
        >>> ps = {"scale": torch.ones(1)}
        >>> for _ in range(3):
        ...     ps = step(ps, torch.ones(2))
        >>> ps, step.cache_info()
        ({'scale': tensor([0.2160])}, CacheInfo(hits=2, misses=1, maxsize=64, currsize=1))

    Source: `jax.jit`; inductor and AOTAutograd are those of `torch.compile`. In Lux it is `@compile` of Reactant.
    """
    chosen = Options.of(donate, static, dynamic, backend, options, background, maxsize)

    def jitted(fn: Callable[..., Any]) -> Any:
        owner = getattr(fn, "__self__", None)
        if isinstance(fn, torch.nn.Module) or isinstance(owner, torch.nn.Module):
            headline = (
                "A jitted function must be pure: parameters of a torch.nn.Module would be constants of the graph."
            )
            fix = "Make it a layer: layer, ps, st = lt.from_torch(module), and jit a function that calls it."
            raise InputError(headline, got=f"a {type(owner or fn).__name__}", fix=fix)
        if isinstance(fn, MethodType) and not isinstance(owner, (type, Layer)):
            # The object of a method is an argument like others: it may change from call to call.
            return MethodType(jitted(fn.__func__), owner)
        return Jitted(fn, chosen)

    return jitted if fn is None else jitted(fn)
