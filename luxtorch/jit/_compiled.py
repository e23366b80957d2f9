"""`Compiled`: the program for one signature, from the leaves of a call to its result."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from operator import itemgetter
from threading import RLock, Thread
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError

from ._bodies import keeping
from ._donate import (
    AliasGuard,
    Donated,
    Pair,
    Strides,
    copy_strided,
    mark_donated,
    other_strides,
    pairs,
    raise_donated,
    stable_strides,
)
from ._effects import has_effects
from ._flatten import Spec, assembler
from ._options import Backend, Options
from ._purity import tracing_errors
from ._replay import CudaGraph, Program, replay
from ._sizes import Expression
from ._trace import Trace, trace

_LOGGER = logging.getLogger("luxtorch.jit")

# torch's compiler has global state: one compilation at a time.
COMPILING = RLock()


_COMPUTED = ("input", "output", "number")


class Assembled:
    """Call a program with the tensors of a call, and assemble the result.

    Args:
        places: The places of the tensors among the leaves of a call.
        constants: Whether there are other leaves too.
        out_spec: The structure of the result.
        results: Its leaves, as in `Trace`.
        numbers: A function of the tensors for results that depend on sizes alone; None if there are none.
    """

    def __init__(
        self,
        places: Sequence[int],
        constants: bool,
        out_spec: Spec,
        results: list[tuple[str, Any]],
        numbers: Expression | None,
    ) -> None:
        self._places, self._select = places, constants
        self._results, self._numbers = results, numbers
        self._unflatten = assembler(out_spec)
        self._fixed = [(kind, value) for kind, value in results if kind not in _COMPUTED]
        static = all(kind == "static" for kind, _ in self._fixed)
        self._statics = [value for _, value in self._fixed] if static else None
        self._donated: list[int] = []

    def __call__(self, leaves: list[Any]) -> Any:
        """Return the result of a call whose leaves fit the signature."""
        tensors = [leaves[i] for i in self._places] if self._select else leaves
        run, order, owner = self._run
        if order is None:
            return self._unflatten(run(tensors))
        statics = self._statics if self._statics is not None else self._constant_results(leaves)
        if self._donated:
            return self._unflatten(self._call_donating(tensors, run, order, owner, statics))
        pool = [*tensors, *run(list(tensors)), *statics]
        return self._unflatten(order(pool))

    def _constant_results(self, leaves: list[Any]) -> list[Any]:
        """Return the results that are not computed: leaves of the arguments, and copies of mutable constants."""
        copies = iter(copy.deepcopy([value for kind, value in self._fixed if kind == "copied"]))
        return [
            leaves[value] if kind == "argument" else next(copies) if kind == "copied" else value
            for kind, value in self._fixed
        ]

    def _call_donating(
        self, tensors: list[Tensor], run: Program, order: Any, owner: AliasGuard | None, statics: list[Any]
    ) -> list[Any]:
        given = [tensors[n] for n in self._donated]
        tensors = list(tensors)
        if owner is not None:
            owner.copy_aliased(tensors)
        pool = [*tensors, *run(list(tensors)), *statics]
        picked = order(pool)
        # Donated tensors that are returned get a new tensor object; compilers return `x + 0` as `x` itself.
        held = set(map(id, picked))
        kept = {id(tensor): tensor.detach() for tensor in given if id(tensor) in held}
        mark_donated(given)
        return [kept.get(id(leaf), leaf) for leaf in picked] if kept else picked

    def use(self, program: Program, chosen: list[Pair], owner: AliasGuard | None = None) -> None:
        """Use a program from now on; one assignment, since other threads may be calling.

        Args:
            program: The program.
            chosen: Inputs with the outputs that it writes into them, and does not return.
            owner: What copies those that share memory.
        """
        if self._numbers is not None:
            program = _with_numbers(program, self._numbers)
        written = {output: n for n, output in chosen}
        results, inputs = self._results, len(self._places)
        remaining = [value for kind, value in results if kind == "output" and value not in written]
        # The index of each leaf of the result in the list of inputs, outputs, numbers and constants.
        numbers = sum(kind == "number" for kind, _ in results)
        order, statics = [], 0
        for kind, value in results:
            if kind not in _COMPUTED:
                order.append(inputs + len(remaining) + numbers + statics)
                statics += 1
            elif kind == "number":
                order.append(inputs + len(remaining) + value)
            elif kind == "input" or value in written:
                order.append(value if kind == "input" else written[value])
            else:
                order.append(inputs + remaining.index(value))
        plain = not self._donated and len(remaining) == len(results)
        self._run: tuple[Program, Any, AliasGuard | None] = program, None if plain else _picker(order), owner


class Compiled(Assembled):
    """Compile a function for one signature, and call it.

    Args:
        fn: A function of `(args, kwargs)`.
        leaves: The leaves of the first call.
        spec: Their structure.
        donated: The leaves that are donated.
        dynamic: The dynamic dimensions of leaves.
        options: The options of `jit`, with a backend.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: Spec,
        donated: Collection[int],
        dynamic: Mapping[int, Collection[int]],
        options: Options,
    ) -> None:
        self._bodies: list[Any] = []  # what the operators of the program call
        with keeping(self._bodies):
            with COMPILING:
                self.trace = trace(fn, leaves, spec, dynamic)
                self.stable_strides = stable_strides(self.trace)
                if self.stable_strides:
                    leaves = self._restrided(leaves, self.stable_strides)
                    self.trace = trace(fn, leaves, spec, dynamic)
            backend = options.backend
            if backend == "inductor" and has_effects(self.trace.graph):
                backend = "replay"  # Inductor keeps no order of operators without a common tensor
            self.signature = self.trace.signature
            self.code = ""
            self.compiling = False
            places, constants = self.signature.places, bool(self.signature.statics)
            super().__init__(places, constants, self.trace.out_spec, self.trace.results, self.trace.numbers)
            self._autocast = torch._C._is_any_autocast_enabled()
            self._donated = [n for n, i in enumerate(self.signature.places) if i in donated]
            tensors = self.signature.tensors(leaves)
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                self._donated = []  # autograd saves tensors, which cannot be overwritten
                self._use(self._compile_recorded(tensors, backend, options.inductor), [])
            elif backend == "inductor" and options.background:
                self._use(replay(self.trace.graph), [])
                self.compiling = True
                Thread(target=self._compile_later, args=(options.inductor,), daemon=True).start()
            elif backend == "inductor":
                self._compile(options.inductor)
            elif backend == "replay":
                self._use(replay(self.trace.graph), [])
            else:
                self._use(_by_backend(backend, self.trace), [])

    def restrided(self, leaves: list[Any], spec: Spec, only_stable: bool) -> list[Any] | None:
        """Return the leaves of a call copied to the strides of this program, or None if other guards fail.

        Args:
            leaves: The leaves.
            spec: Their structure.
            only_stable: Whether to copy only inputs whose first strides were replaced by stable ones.
        """
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if spec != self.signature.spec or places != self.signature.places:
            return None
        strides = other_strides(self.trace, [leaves[i] for i in places])
        if not strides or (only_stable and not strides.keys() <= self.stable_strides.keys()):
            return None
        leaves = self._restrided(leaves, strides)
        return leaves if self.signature.fits(leaves, spec) else None

    def _restrided(self, leaves: list[Any], strides: Mapping[int, Strides]) -> list[Any]:
        leaves = list(leaves)
        for n, new in strides.items():
            place = self.trace.signature.places[n]
            leaves[place] = copy_strided(leaves[place], new)
        return leaves

    def _use(self, program: Program, chosen: list[Pair]) -> None:
        # A compiler adds guards on sizes.
        self.signature.assume(self.trace.sizes.condition(self.trace.fakes))
        if self._autocast:
            program = _without_autocast(program)
        written = [n for n, _ in chosen]
        owner = AliasGuard(self.trace.fakes, self.trace.constants(), written) if written else None
        self.use(program, chosen, owner)

    def _compile(self, options: Mapping[str, Any]) -> None:
        from ._inductor import compile_trace

        options = dict(options)
        as_graph = options.pop("triton.cudagraphs", False) and _is_on_one_gpu(self.trace)
        # A CUDA graph has memory of its own, so it cannot write into donated tensors.
        chosen = pairs(self.trace, self._donated) if self._donated and not as_graph else []
        with COMPILING, keeping(self._bodies):
            program, self.code = compile_trace(self.trace, chosen, options)
        self._use(CudaGraph(program) if as_graph else program, chosen)

    def _compile_later(self, options: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        try:
            self._compile(options)
            _LOGGER.info("A compiled program takes over, after %.1f s of replay.", time.perf_counter() - start)
        except Exception as error:  # the program stays the replay
            warnings.warn(f"Compiling in the background failed, replay goes on: {error}", RuntimeWarning, stacklevel=1)
        finally:
            self.compiling = False

    def _compile_recorded(self, tensors: list[Tensor], backend: Backend, options: Mapping[str, Any]) -> Program:
        from ._inductor import compile_differentiable, compiling

        settings = compiling(self.trace, options if backend == "inductor" else {})
        with COMPILING, settings, torch.enable_grad(), tracing_errors():
            return compile_differentiable(
                self.trace, tensors, "inductor" if backend == "inductor" else "replay", options
            )


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that takes the items at some places."""
    if len(places) < 2:
        return lambda items: [items[i] for i in places]
    return itemgetter(*places)


def _by_backend(backend: Any, trace: Trace) -> Program:
    compiled = backend(trace.graph, trace.fakes)
    return lambda inputs: compiled(*inputs)


def _is_on_one_gpu(trace: Trace) -> bool:
    """Return whether a CUDA graph can be made; if not, warn."""
    devices = {fake.device for fake in (*trace.fakes, *trace.outputs())}
    if len(devices) == 1 and devices.pop().type == "cuda" and not trace.symbolic:
        return True
    warnings.warn(
        "No CUDA graph is made: all tensors must have fixed shapes and be on one GPU. `lt.to_device(ts, ...)` moves "
        "all of a training state, with the optimizer's numbers.",
        RuntimeWarning,
        stacklevel=7,
    )
    return False


def _without_autocast(program: Program) -> Program:
    # The casts of autocast are in the graph already.
    def run(inputs: list[Any]) -> Sequence[Tensor]:
        with torch._C._DisableAutocast():
            return program(inputs)

    return run


def _with_numbers(program: Program, numbers: Expression) -> Program:
    """Return a program that also returns sizes, and numbers derived from them."""

    def run(inputs: list[Any]) -> Sequence[Any]:
        found = numbers(inputs)
        return [*program(inputs), *found]

    return run


def check_leaves(leaves: list[Any]) -> None:
    """Raise if a tensor was donated, or has a class or layout that compilers do not support."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        if isinstance(leaf, Donated):
            raise_donated()
        kind = _kind(leaf)
        if kind:
            fix = "Pass x.resolve_neg()." if leaf.is_neg() else "Call the function itself, or under torch.compile."
            got = f"a {type(leaf).__name__}{kind}"
            raise DTypeError("Arguments of a jitted function must be plain dense tensors.", got=got, fix=fix)


def _kind(tensor: Tensor) -> str:
    """Describe why a tensor is not plain and dense; empty if it is."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return f" of layout {tensor.layout}"
    lazy = {"nested": tensor.is_nested, "negated": tensor.is_neg(), "without memory": tensor._is_zerotensor()}
    return f", quantized to {tensor.dtype}" if tensor.is_quantized else next((f", {k}" for k in lazy if lazy[k]), "")


@cache
def default_backend() -> str:
    """Return `"inductor"`, or with a warning `"replay"` if there is no C++ compiler."""
    from ._toolchain import has_compiler

    if has_compiler():
        return "inductor"
    warnings.warn(
        "There is no C++ compiler, so jitted functions replay their operators one by one: install g++ or clang++ for "
        'compiled kernels, or pass backend="replay" to silence this warning.',
        RuntimeWarning,
        stacklevel=4,
    )
    return "replay"
