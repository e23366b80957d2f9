"""One compiled function: from the leaves of a call to its result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from threading import RLock, Thread
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from luxtorch.core import DTypeError

from ._cuda_graph import CudaGraph
from ._donate import Donated, Pair, give_up, own, pairs, refuse
from ._flatten import Spec
from ._replay import Program, replay
from ._signature import static_value
from ._strides import Strides, other_strides, restrided, settled
from ._trace import Trace, trace

Backend: TypeAlias = "str | Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] | None"

# torch's compiler keeps much in global variables: one compilation at a time.
_COMPILING = RLock()


class Compiled:
    """Hold the program for one signature.

    Args:
        fn: Takes `(args, kwargs)`.
        leaves: The leaves of the first call.
        spec: Their structure.
        donated: Which leaves are donated.
        dynamic: Which leaves may have another first dimension later.
        backend: What runs the graph.
        options: Settings of inductor.
        background: Whether to begin by replay, and compile meanwhile.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: Spec,
        donated: Collection[int],
        dynamic: Collection[int],
        backend: Backend,
        options: Mapping[str, Any],
        background: bool,
    ) -> None:
        _check_leaves(leaves)
        with _COMPILING:
            self.trace = trace(fn, leaves, spec, dynamic)
            self.settled = settled(self.trace)
            if self.settled:
                leaves = self._restrided(leaves, self.settled)
                self.trace = trace(fn, leaves, spec, dynamic)
        self.signature = self.trace.signature
        self.code = ""
        self._unflatten = self.trace.out_spec.unflatten
        self._statics = [value for kind, value in self.trace.results if kind == "static"]
        self._autocast = torch._C._is_any_autocast_enabled()
        self._donated = [n for n, i in enumerate(self.signature.places) if i in donated]
        tensors = self.signature.tensors(leaves)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self._donated = []  # the tape holds on to what it has recorded
            self._set(self._recorded(tensors, backend, options), [])
        elif backend == "inductor" and background:
            self._set(replay(self.trace.graph), [])
            Thread(target=self._compile_later, args=(options,), daemon=True).start()
        elif backend == "inductor":
            self._compile(options)
        elif backend == "replay":
            self._set(replay(self.trace.graph), [])
        else:
            self._set(_called(backend, self.trace), [])

    def __call__(self, leaves: list[Any]) -> Any:
        """Return the result of a call whose leaves fit the signature."""
        tensors = self.signature.tensors(leaves) if self.signature.statics else leaves
        run, order, written = self._run
        if self._donated:
            return self._unflatten(self._give(tensors, run, order, written))
        if order is None:
            return self._unflatten(run(tensors))
        pool = [*tensors, *run(list(tensors)), *self._statics]
        return self._unflatten([pool[i] for i in order])

    def fitted(self, leaves: list[Any], spec: Spec, settled: bool) -> list[Any] | None:
        """Return the leaves of a call with the strides that this was compiled for, or None if more is different.

        Args:
            leaves: The leaves.
            spec: Their structure.
            settled: Whether to do so only for inputs that this was not compiled for as they came.
        """
        strides = other_strides(self.trace, self.signature.tensors(leaves)) if spec == self.signature.spec else None
        if not strides or (settled and not strides.keys() <= self.settled.keys()):
            return None
        leaves = self._restrided(leaves, strides)
        return leaves if self.signature.fits(leaves, spec) else None

    def _restrided(self, leaves: list[Any], strides: Mapping[int, Strides]) -> list[Any]:
        leaves = list(leaves)
        for n, new in strides.items():
            place = self.trace.signature.places[n]
            leaves[place] = restrided(leaves[place], new)
        return leaves

    def _give(self, tensors: list[Tensor], run: Program, order: Any, written: list[int]) -> list[Any]:
        given = [tensors[n] for n in self._donated]
        tensors = list(tensors)
        if written:
            own(tensors, written)
        pool = [*tensors, *run(list(tensors)), *self._statics]
        picked = [pool[i] for i in order]
        # What was written or is returned lives on under a new name; a compiler also returns `x + 0` as it is.
        held = set(map(id, picked))
        kept = {id(tensor): tensor.detach() for tensor in given if id(tensor) in held}
        give_up(given)
        return [kept.get(id(leaf), leaf) for leaf in picked] if kept else picked

    def _set(self, program: Program, chosen: list[Pair]) -> None:
        """Use a program from now on; all that belongs to it changes at once, since other threads may be calling."""
        if self._autocast:
            program = _without_autocast(program)
        written = {output: n for n, output in chosen}
        results, inputs = self.trace.results, len(self.trace.fakes)
        remaining = [value for kind, value in results if kind == "output" and value not in written]
        # Where each leaf of the result is, in the list of the inputs, the outputs and the constants.
        order, statics = [], 0
        for kind, value in results:
            if kind == "static":
                order.append(inputs + len(remaining) + statics)
                statics += 1
            elif kind == "input" or value in written:
                order.append(value if kind == "input" else written[value])
            else:
                order.append(inputs + remaining.index(value))
        plain = not self._donated and len(remaining) == len(results)
        self._run: tuple[Program, list[int] | None, list[int]] = program, None if plain else order, [*written.values()]

    def _compile(self, options: Mapping[str, Any]) -> None:
        from ._inductor import compile_trace

        options = dict(options)
        as_graph = options.pop("triton.cudagraphs", False) and _is_on_one_gpu(self.trace)
        # A CUDA graph has memory of its own, so nothing is written into what was donated.
        chosen = pairs(self.trace, self._donated) if self._donated and not as_graph else []
        with _COMPILING:
            program, self.code = compile_trace(self.trace, chosen, options)
        self._set(CudaGraph(program) if as_graph else program, chosen)

    def _compile_later(self, options: Mapping[str, Any]) -> None:
        try:
            self._compile(options)
        except Exception as error:  # it is the replay that the user gets then
            warnings.warn(f"Compiling in the background failed, replay goes on: {error}", RuntimeWarning, stacklevel=1)

    def _recorded(self, tensors: list[Tensor], backend: Backend, options: Mapping[str, Any]) -> Program:
        from ._inductor import compiling
        from ._recorded import recorded

        with _COMPILING, compiling(self.trace, options if backend == "inductor" else {}), torch.enable_grad():
            return recorded(self.trace, tensors, "inductor" if backend == "inductor" else "replay", options)


def _called(backend: Any, trace: Trace) -> Program:
    compiled = backend(trace.graph, trace.fakes)
    return lambda inputs: compiled(*inputs)


def _is_on_one_gpu(trace: Trace) -> bool:
    """Tell whether a CUDA graph can be made; if not, warn."""
    devices = {fake.device for fake in (*trace.fakes, *trace.outputs())}
    if len(devices) == 1 and devices.pop().type == "cuda" and not trace.symbolic:
        return True
    warnings.warn(
        "No CUDA graph is made: it takes tensors of fixed shapes on one GPU. `lt.to_device(ts, ...)` moves all of a "
        "training state, the optimizer's numbers too.",
        RuntimeWarning,
        stacklevel=6,
    )
    return False


def _without_autocast(program: Program) -> Program:
    # The casts are in the graph, and must not be made twice.
    def run(inputs: list[Any]) -> Sequence[Tensor]:
        with torch._C._DisableAutocast():
            return program(inputs)

    return run


def _check_leaves(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            static_value(leaf)
        elif isinstance(leaf, Donated):
            refuse()
        elif type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout is not torch.strided:
            raise DTypeError(
                "A jitted function takes plain dense tensors.",
                got=f"a {type(leaf).__name__} of layout {leaf.layout}",
                fix="Call the function itself, or under torch.compile.",
            )


@cache
def default_backend() -> str:
    """Return `"inductor"`, or with a warning `"replay"` where there is no C++ compiler."""
    from ._inductor import has_compiler

    if has_compiler():
        return "inductor"
    warnings.warn(
        "There is no C++ compiler, so jitted functions replay their operators one by one: install g++ or clang++ for "
        'compiled kernels, or pass backend="replay" to have no warning.',
        RuntimeWarning,
        stacklevel=4,
    )
    return "replay"
