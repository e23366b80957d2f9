"""`Jitted`: the callable that `jit` returns, with its cache of compiled programs."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from threading import Lock, RLock
from types import MethodType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.compiler import is_compiling
from typing_extensions import ParamSpec

from luxtorch._errors import user_line
from luxtorch._transforms import functional, watched
from luxtorch.core import InputError, Static, described, unknown_name

from ._compiled import Compiled, check_leaves, default_backend
from ._constants import (
    ComparedByIdentity,
    Constant,
    NotComparable,
    fingerprint,
    is_mutable,
    not_comparable_error,
    wrap_static,
)
from ._export import export
from ._flatten import deferred_leaves, flatten, flatten_torch_nodes, leaf_ranges, leaves_with_paths, path_text
from ._options import Backend, Options
from ._purity import TracingError

P = ParamSpec("P")
R = TypeVar("R")

_MANY = 16


class CacheInfo(NamedTuple):
    """Hold the statistics of a jitted function's cache.

    Attributes:
        hits: The number of calls that found a compiled program.
        misses: The number of calls that compiled one.
        maxsize: The largest number of programs that are kept; the least recently used is dropped first.
        currsize: The number of programs.
    """

    hits: int
    misses: int
    maxsize: int
    currsize: int


class Lowered(NamedTuple):
    """Hold the graph and the code of a compiled function, as text.

    Attributes:
        graph: The operators.
        code: The code that inductor generated; empty for other backends.
    """

    graph: str
    code: str

    def __str__(self) -> str:
        return f"{self.graph}\n{self.code}".rstrip()


class Jitted(ComparedByIdentity, Generic[P, R]):
    """A compiled function that `jit` returns; it is called as the function itself."""

    def __init__(self, fn: Callable[P, R], options: Options) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._options = options
        self._names = _parameters(fn, options.named)
        self._static = options.static
        self._known: tuple[Compiled, ...] = ()
        self._strides: set[Any] = set()  # strides of arguments that were copied
        self._compiling = RLock()  # a function may call itself while it is traced
        self._lock = Lock()  # held briefly, never while compiling
        self._warned: set[tuple[str, int]] = set()
        self._hits = self._misses = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # Transforms and tracers run the function itself.
        if is_compiling() or functional() or watched():
            return self._fn(*args, **kwargs)
        known = self._known
        if known and not (kwargs or self._static):
            deferred = deferred_leaves(args, known[0].signature.args)
            if deferred is not None and known[0].signature.fits_leaves(deferred):
                self._hits += 1
                return known[0](deferred)  # type: ignore[no-any-return]
        leaves, spec = flatten(self._wrap_static(args, kwargs) if self._static else (args, kwargs))
        for compiled in self._known:
            if compiled.signature.fits(leaves, spec):
                self._hits += 1
                if compiled is not self._known[0]:
                    self._to_front(compiled)
                return compiled(leaves)  # type: ignore[no-any-return]
        compiled, leaves = self._find_or_compile(leaves, spec)
        return compiled(leaves)  # type: ignore[no-any-return]

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> str | tuple[Any, ...]:
        name: str = getattr(self, "__qualname__", "")
        try:
            found = attrgetter(name)(sys.modules[self.__module__])
        except (AttributeError, KeyError):
            found = None
        if found is self:
            return name  # as a function is pickled
        return type(self), (self._fn, self._options)  # compiled programs are not pickled

    def __repr__(self) -> str:
        return f"jit({getattr(self._fn, '__qualname__', self._fn)})"

    def cache_info(self) -> CacheInfo:
        """Return the statistics of the cache."""
        return CacheInfo(self._hits, self._misses, self._options.maxsize, len(self._known))

    @property
    def compiling(self) -> int:
        """How many programs are compiled in the background at the moment, while their graphs are replayed."""
        return sum(compiled.compiling for compiled in self._known)

    def cache_clear(self) -> None:
        """Clear the cache of compiled programs."""
        with self._lock:
            self._known = ()
            self._strides = set()
            self._hits = self._misses = 0

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """Compile a call with these arguments, without running it, and return its graph and code as text.

        Example:
            >>> import torch
            >>> from luxtorch.jit import jit
            >>> print(jit(lambda x: x.sin() + 1, backend="replay").lower(torch.ones(2)).graph)
            def forward(self, arg0_1):
                sin = torch.ops.aten.sin.default(arg0_1);  arg0_1 = None
                add = torch.ops.aten.add.Tensor(sin, 1);  sin = None
                return [add]
        """
        if watched():
            headline, fix = (
                f"{self!r}.lower must not be called while tracing.",
                "Call lower outside, with plain tensors.",
            )
            raise TracingError(headline, fix=fix, where=user_line())
        compiled, _ = self._find_or_compile(*flatten(self._wrap_static(args, kwargs)))
        return Lowered(str(compiled.trace.graph.code).strip(), compiled.code)

    def export(self, path: str | Path, *args: P.args, **kwargs: P.kwargs) -> Path:
        """Compile a call with these arguments by AOTInductor, without running it, and write the program to a file.

        `lt.load_jitted` runs it in another process, without tracing or compiling anything; Python code of the function
        is not needed there, but the classes of its arguments and results are. Closed-over tensors are in the file.
        Arguments are not donated.

        Args:
            path: The file, whose name ends with .pt2.
            args: The arguments, of the shapes, dtypes and devices of later calls. Without any, those of the latest
                program: call the function first.
            kwargs: Arguments by name.

        Returns:
            The file.

        Raises:
            InputError: If the function has a loop or branch of luxtorch in it, computes nothing, or has constants
                among its arguments or results that are not pickled; or if there are no arguments and no call before.
            TracingError: If it cannot be traced.

        Example:
            >>> import torch, luxtorch as lt
            >>> from luxtorch.jit import jit
            >>> model = lt.Dense(3, 2)
            >>> ps, st = lt.setup(0, model)
            >>> predict = jit(lambda ps, x: model(x, ps, st)[0], dynamic="x")
            >>> predict.export("dense.pt2", ps, torch.zeros(8, 3))  # doctest: +SKIP
            >>> y = lt.load_jitted("dense.pt2")(ps, torch.zeros(100, 3))  # doctest: +SKIP
        """
        if args or kwargs:
            leaves, spec = flatten_torch_nodes(*flatten(self._wrap_static(args, kwargs)))
            check_leaves(leaves)
            leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in _distinct(leaves)]
            found = self._find(leaves, spec) or self._new(leaves, spec, "replay")
        elif self._known:
            found = self._known[0]
        else:
            fix = "Call the function first, or pass arguments after the path."
            raise InputError("A function is exported for arguments, of which there are none yet.", fix=fix)
        name = getattr(self, "__qualname__", repr(self))
        return export(found.trace, name, self._names, self._static, path, self._options.inductor)

    def _new(self, leaves: list[Any], spec: Any, backend: Backend) -> Compiled:
        """Trace and compile a call, without keeping the program."""
        donated = self._leaves_of(spec, self._options.donate)
        dynamic = self._dynamic_dims(leaves, spec, donated)
        constants = self._constants(leaves, spec)
        options = replace(self._options, backend=backend)
        compiled = Compiled(self._call_unwrapped, leaves, spec, donated, dynamic, options)
        self._check_unchanged(constants, self._constants(leaves, spec))
        return compiled

    def _find_or_compile(self, leaves: list[Any], spec: Any) -> tuple[Compiled, list[Any]]:
        """Return the program for these leaves, and the leaves to call it with."""
        leaves, spec = flatten_torch_nodes(leaves, spec)
        check_leaves(leaves)
        # Guards of torch refuse the same tensor twice.
        if len(set(map(id, leaves))) < len(leaves):
            leaves = _distinct(leaves)
        compiled = self._find(leaves, spec)
        if compiled is None:
            compiled, leaves = self._find_restrided(leaves, spec)
        if compiled is None:
            compiled = self._compile(leaves, spec)
            return compiled, compiled.restrided(leaves, spec, only_stable=True) or leaves
        self._hits += 1
        return compiled, leaves

    def _find_restrided(self, leaves: list[Any], spec: Any) -> tuple[Compiled | None, list[Any]]:
        """Return a program for other strides, and leaves that are copied to these.

        Strides that occur for the second time get a graph of their own.
        """
        strides = (spec, *(leaf.stride() for leaf in leaves if isinstance(leaf, torch.Tensor)))
        again = strides in self._strides
        for compiled in self._known:
            if (other := compiled.restrided(leaves, spec, only_stable=again)) is not None:
                if len(self._strides) == self._options.maxsize:
                    self._strides.clear()
                self._strides.add(strides)
                return compiled, other
        return None, leaves

    def _find(self, leaves: list[Any], spec: Any) -> Compiled | None:
        return next((compiled for compiled in self._known if compiled.signature.fits(leaves, spec)), None)

    def _compile(self, leaves: list[Any], spec: Any) -> Compiled:
        with self._compiling:
            # Another thread may have compiled it meanwhile.
            found = self._find(leaves, spec)
            if found is not None:
                return found
            backend = self._options.backend
            compiled = self._new(leaves, spec, default_backend() if backend is None else backend)
            self._misses += 1
            self._warn_of_fixed_sizes(compiled)
            if self._misses == _MANY:
                last = self._known[0].signature.difference(compiled.signature) if self._known else "the first call"
                warnings.warn(
                    f"{self!r} was compiled {_MANY} times. What was new this time: {last}. Numbers that change belong "
                    "in tensors; for batches of many sizes there is `dynamic`.",
                    RuntimeWarning,
                    stacklevel=5,
                )
            with self._lock:
                self._known = (compiled, *self._known)[: self._options.maxsize]
            return compiled

    def _dynamic_dims(self, leaves: list[Any], spec: Any, donated: set[int]) -> dict[int, set[int]]:
        """Return the dynamic dimensions of leaves."""
        found: dict[int, set[int]] = {}
        dynamic = self._options.dynamic
        named = dynamic if isinstance(dynamic, Mapping) else dict.fromkeys(["*"] if dynamic else [])
        for name, dims in named.items():
            own = self._leaves_of(spec, dynamic is True or (name,)) - donated
            tensors = {i: leaves[i] for i in sorted(own) if isinstance(leaves[i], torch.Tensor)}
            for dim in (0,) if dims is None else dims:
                having = [i for i, tensor in tensors.items() if -tensor.dim() <= dim < tensor.dim()]
                if tensors and not having and dims is not None:
                    headline = (
                        f"A tensor of the argument '{name}' must have the dimension {dim}, which was named dynamic."
                    )
                    got, fix = ", ".join(map(described, tensors.values())), f"Change dynamic={{'{name}': ...}} of jit."
                    raise InputError(headline, got=got, fix=fix)
                for i in having:
                    found.setdefault(i, set()).add(dim % tensors[i].dim())
        return found

    def _warn_of_fixed_sizes(self, compiled: Compiled) -> None:
        """Warn once about each dynamic dimension that is needed as a number, so that each size has its own graph."""
        trace = compiled.trace
        for (place, dim), (line, reason) in trace.sizes.fixed().items():
            (by_name, first, *rest) = trace.signature.spec.paths()[trace.signature.places[place]]
            name = first if by_name else (*self._names[first : first + 1], f"argument {first}")[0]
            name = f"{name}{''.join(f'[{entry!r}]' for entry in rest)}"
            if (name, dim) not in self._warned:
                self._warned.add((name, dim))
                warnings.warn(
                    f"{line}: {self!r} needs the size of dimension {dim} of {name} as a number, so it is compiled for "
                    f"each size, though it is named dynamic{f' ({reason})' if reason else ''}. That is so for len(x), "
                    "float(n), math.sqrt(n), range(n), torch.tensor(n), loops over x, and text with n in it; "
                    "x.shape[0], n**0.5, torch.full((), n) and arithmetic leave it open.",
                    RuntimeWarning,
                    stacklevel=5,
                )

    def _to_front(self, compiled: Compiled) -> None:
        # An optimization: it is skipped if the lock is taken.
        if self._lock.acquire(blocking=False):
            try:
                if compiled in self._known:
                    self._known = (compiled, *(other for other in self._known if other is not compiled))
            finally:
                self._lock.release()

    def _constants(self, leaves: list[Any], spec: Any) -> dict[str, Any]:
        """Return the fingerprints of arguments that are not tensors, by their places.

        Raises:
            DTypeError: If one cannot be compared.
        """
        constants = {}
        for (kind, name, *path), leaf in leaves_with_paths(spec.unflatten(leaves), Static):
            if isinstance(leaf, torch.Tensor):
                continue
            if kind == 0:
                name = self._names[name] if name < len(self._names) else f"args[{name}]"
            where = f"{name}{path_text(path)}"
            value = leaf.value if isinstance(leaf, Static) else leaf
            given = isinstance(value, Constant)  # an argument named in `static`
            value = value.value if given else value
            try:
                constants[where] = fingerprint(value)
                if isinstance(leaf, Static) and not given and is_mutable(value):
                    raise NotComparable("", "a mutable value")
            except NotComparable as error:
                raise not_comparable_error(error, value, where) from None
        return constants

    def _check_unchanged(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        for where, key in before.items():
            if after[where] != key:
                headline = f"A jitted function must not change its argument {where}: later calls would not."
                raise TracingError(headline, fix="Return the new values instead.", where=user_line())

    def _wrap_static(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return wrap_static(args, kwargs, self._names, self._static)

    def _call_unwrapped(self, args: Any, kwargs: Any) -> Any:
        if self._static:
            args = tuple(
                value.value.value if i < len(self._names) and self._names[i] in self._static else value
                for i, value in enumerate(args)
            )
            kwargs = {name: v.value.value if name in self._static else v for name, v in kwargs.items()}
        return self._fn(*args, **kwargs)

    def _leaves_of(self, spec: Any, names: bool | Collection[str]) -> set[int]:
        """Return the leaves of the arguments with these names; of all arguments for True."""
        if not names:
            return set()
        args, kwargs = spec.children()
        called = [
            *(self._names[i] if i < len(self._names) else "" for i in range(args.num_children)),
            *kwargs.entries(),
        ]
        ranges = [*leaf_ranges(args), *leaf_ranges(kwargs, args.num_leaves)]
        return {
            i for name, leaves in zip(called, ranges, strict=True) if names is True or name in names for i in leaves
        }


def _parameters(fn: Any, used: Collection[str]) -> list[str]:
    """Return the names of the positional parameters, after a check of the names that options refer to."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    for name in used:
        if name not in parameters:
            raise unknown_name(name, parameters, "argument")
        if parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise InputError(f"'{name}' must be a single argument, not *args or **kwargs.")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in parameters.items() if parameter.kind in positional]


def _distinct(leaves: list[Any]) -> list[Any]:
    """Return the leaves with a view for each repeated tensor."""
    seen: set[int] = set()
    distinct = []
    for leaf in leaves:
        distinct.append(leaf.view_as(leaf) if id(leaf) in seen and isinstance(leaf, torch.Tensor) else leaf)
        seen.add(id(leaf))
    return distinct
