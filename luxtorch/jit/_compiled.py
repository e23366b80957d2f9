"""One compiled function: from the leaves of a call to its result."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from threading import RLock, Thread
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError

from ._bodies import keeping
from ._donate import Donated, Owner, Pair, give_up, pairs, refuse
from ._flatten import Spec
from ._options import Backend, Options
from ._purity import explained
from ._replay import CudaGraph, Program, replay
from ._sizes import OfArguments
from ._strides import Strides, other_strides, restrided, settled
from ._trace import Trace, trace

# torch's compiler keeps much in global variables: one compilation at a time.
_COMPILING = RLock()


_COMPUTED = ("input", "output", "number")


class Compiled:
    """Hold the program for one signature.

    Args:
        fn: Takes `(args, kwargs)`.
        leaves: The leaves of the first call.
        spec: Their structure.
        donated: Which leaves are donated.
        dynamic: Which dimensions of which leaves may have another size later.
        options: What `jit` was asked for, with a backend.
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
            self._make(fn, leaves, spec, donated, dynamic, options)

    def _make(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: Spec,
        donated: Collection[int],
        dynamic: Mapping[int, Collection[int]],
        options: Options,
    ) -> None:
        with _COMPILING:
            self.trace = trace(fn, leaves, spec, dynamic)
            self.settled = settled(self.trace)
            if self.settled:
                leaves = self._restrided(leaves, self.settled)
                self.trace = trace(fn, leaves, spec, dynamic)
        backend = options.backend
        self.signature = self.trace.signature
        self.code = ""
        self._unflatten = self.trace.out_spec.unflatten
        self._fixed = [(kind, value) for kind, value in self.trace.results if kind not in _COMPUTED]
        self._statics = None if any(kind != "static" for kind, _ in self._fixed) else [one for _, one in self._fixed]
        self._autocast = torch._C._is_any_autocast_enabled()
        self._donated = [n for n, i in enumerate(self.signature.places) if i in donated]
        tensors = self.signature.tensors(leaves)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self._donated = []  # the tape holds on to what it has recorded
            self._set(self._recorded(tensors, backend, options.inductor), [])
        elif backend == "inductor" and options.background:
            self._set(replay(self.trace.graph), [])
            Thread(target=self._compile_later, args=(options.inductor,), daemon=True).start()
        elif backend == "inductor":
            self._compile(options.inductor)
        elif backend == "replay":
            self._set(replay(self.trace.graph), [])
        else:
            self._set(_called(backend, self.trace), [])

    def __call__(self, leaves: list[Any]) -> Any:
        """Return the result of a call whose leaves fit the signature."""
        tensors = self.signature.tensors(leaves) if self.signature.statics else leaves
        run, order, owner = self._run
        if order is None:
            return self._unflatten(run(tensors))
        statics = self._statics if self._statics is not None else self._renewed(leaves)
        if self._donated:
            return self._unflatten(self._give(tensors, run, order, owner, statics))
        pool = [*tensors, *run(list(tensors)), *statics]
        return self._unflatten([pool[i] for i in order])

    def _renewed(self, leaves: list[Any]) -> list[Any]:
        """Return what is not computed: leaves of the arguments, and copies of what the caller may change."""
        copies = iter(copy.deepcopy([value for kind, value in self._fixed if kind == "copied"]))
        return [
            leaves[value] if kind == "argument" else next(copies) if kind == "copied" else value
            for kind, value in self._fixed
        ]

    def fitted(self, leaves: list[Any], spec: Spec, settled: bool) -> list[Any] | None:
        """Return the leaves of a call with the strides that this was compiled for, or None if more is different.

        Args:
            leaves: The leaves.
            spec: Their structure.
            settled: Whether to do so only for inputs that this was not compiled for as they came.
        """
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if spec != self.signature.spec or places != self.signature.places:
            return None
        strides = other_strides(self.trace, [leaves[i] for i in places])
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

    def _give(
        self, tensors: list[Tensor], run: Program, order: Any, owner: Owner | None, statics: list[Any]
    ) -> list[Any]:
        given = [tensors[n] for n in self._donated]
        tensors = list(tensors)
        if owner is not None:
            owner.own(tensors)
        pool = [*tensors, *run(list(tensors)), *statics]
        picked = [pool[i] for i in order]
        # What was written or is returned lives on under a new name; a compiler also returns `x + 0` as it is.
        held = set(map(id, picked))
        kept = {id(tensor): tensor.detach() for tensor in given if id(tensor) in held}
        give_up(given)
        return [kept.get(id(leaf), leaf) for leaf in picked] if kept else picked

    def _set(self, program: Program, chosen: list[Pair]) -> None:
        """Use a program from now on; all that belongs to it changes at once, since other threads may be calling."""
        # A compiler asks more of the sizes than the trace did.
        self.signature.assume(self.trace.sizes.condition(self.trace.fakes))
        if self._autocast:
            program = _without_autocast(program)
        if self.trace.numbers is not None:
            program = _with_numbers(program, self.trace.numbers)
        written = {output: n for n, output in chosen}
        results, inputs = self.trace.results, len(self.trace.fakes)
        remaining = [value for kind, value in results if kind == "output" and value not in written]
        # Where each leaf of the result is, in the list of the inputs, the outputs, the numbers, and the rest.
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
        owner = Owner(self.trace.fakes, self.trace.constants(), [*written.values()]) if written else None
        self._run: tuple[Program, list[int] | None, Owner | None] = program, None if plain else order, owner

    def _compile(self, options: Mapping[str, Any]) -> None:
        from ._inductor import compile_trace

        options = dict(options)
        as_graph = options.pop("triton.cudagraphs", False) and _is_on_one_gpu(self.trace)
        # A CUDA graph has memory of its own, so nothing is written into what was donated.
        chosen = pairs(self.trace, self._donated) if self._donated and not as_graph else []
        with _COMPILING, keeping(self._bodies):
            program, self.code = compile_trace(self.trace, chosen, options)
        self._set(CudaGraph(program) if as_graph else program, chosen)

    def _compile_later(self, options: Mapping[str, Any]) -> None:
        try:
            self._compile(options)
        except Exception as error:  # it is the replay that the user gets then
            warnings.warn(f"Compiling in the background failed, replay goes on: {error}", RuntimeWarning, stacklevel=1)

    def _recorded(self, tensors: list[Tensor], backend: Backend, options: Mapping[str, Any]) -> Program:
        from ._inductor import compiling, recorded

        settings = compiling(self.trace, options if backend == "inductor" else {})
        with _COMPILING, settings, torch.enable_grad(), explained():
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


def _with_numbers(program: Program, numbers: OfArguments) -> Program:
    """Return a program that returns sizes as well, and numbers made of them."""

    def run(inputs: list[Any]) -> Sequence[Any]:
        found = numbers(inputs)
        return [*program(inputs), *found]

    return run


def check_leaves(leaves: list[Any]) -> None:
    """Raise if a tensor was donated, or is of a class or layout that compilers misread."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        if isinstance(leaf, Donated):
            refuse()
        kind = _kind(leaf)
        if kind:
            raise DTypeError(
                "A jitted function takes plain dense tensors.",
                got=f"a {type(leaf).__name__}{kind}",
                fix="Pass x.resolve_neg()." if leaf.is_neg() else "Call the function itself, or under torch.compile.",
            )


def _kind(tensor: Tensor) -> str:
    """Say in which way a tensor is not what compilers take for granted; nothing if it is."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return f" of layout {tensor.layout}"
    lazy = {"nested": tensor.is_nested, "negated": tensor.is_neg(), "without memory": tensor._is_zerotensor()}
    return f", quantized to {tensor.dtype}" if tensor.is_quantized else next((f", {k}" for k in lazy if lazy[k]), "")


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
