"""Memory of arguments: donated buffers that results reuse, and strides that graphs are compiled for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import add, le
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import LuxtorchError

from ._flatten import Spec
from ._sizes import any_symbol
from ._trace import Trace, aliases

Pair: TypeAlias = tuple[int, int]
"""The numbers of an input and of the output that is written into it."""


# Reusing less memory than this saves less time than it costs.
_LEAST_REUSE = 2**16  # bytes


class DonatedError(LuxtorchError, RuntimeError):
    """Report the use of a tensor after it was donated.

    Example:
        >>> import torch
        >>> from luxtorch.jit import jit
        >>> double = jit(lambda x: 2 * x, donate="x", backend="replay")
        >>> x = torch.ones(2)
        >>> double(x)
        tensor([2., 2.])
        >>> x + 1
        Traceback (most recent call last):
        ...
        luxtorch.jit._donate.DonatedError: A donated tensor must not be used, as its memory may be reused.
          fix:      Use the result in its place, `x = f(x)`, or leave `donate` out.
    """


class Donated(Tensor):
    """Mark a tensor that was donated: any use of it raises an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise_donated()


def raise_donated() -> NoReturn:
    """Raise the error for the use of a donated tensor."""
    raise DonatedError(
        "A donated tensor must not be used, as its memory may be reused.",
        fix="Use the result in its place, `x = f(x)`, or leave `donate` out.",
    )


def pairs(trace: Trace, donated: Collection[int]) -> list[Pair]:
    """Choose the output that is written into each donated input, of the same shape and dtype.

    A tree whose structure is also a part of the result is paired leaf by leaf; other inputs are paired in order.
    Outputs that share memory, inputs that an output shares memory with, and small ones are not paired.

    Args:
        trace: The trace.
        donated: The inputs that are donated.
    """
    views_of, others = aliases(trace)
    fakes = trace.fakes
    outputs = trace.outputs()
    returned = {value for kind, value in trace.results if kind == "input"}
    free = [i for i in donated if i not in returned and not views_of[i] and _is_reusable(fakes[i])]
    # Comparing a symbolic size would make it a constant.
    fresh = {j for j, shared in enumerate(others) if not shared and not any_symbol(outputs[j].shape)}
    chosen: list[Pair] = []
    for i, j in [*same_places(trace, free), *((i, j) for i in free for j in range(len(outputs)))]:
        alike = fakes[i].shape == outputs[j].shape and fakes[i].dtype == outputs[j].dtype
        if i in free and j in fresh and alike and fakes[i].device == outputs[j].device:
            chosen.append((i, j))
            free = [other for other in free if other != i]
            fresh.remove(j)
    return sorted(chosen)


class AliasGuard:
    """Copy donated tensors that share memory with other arguments, before they are written into.

    Args:
        fakes: The fake tensors of the arguments; their sizes and strides tell how much memory each spans.
        constants: The tensors that the graph closes over.
        written: The arguments that are written into; each is dense.
    """

    def __init__(self, fakes: Sequence[Tensor], constants: Sequence[Tensor], written: Sequence[int]) -> None:
        self._written = written
        self._constants = list(constants)  # which keeps their memory alive
        self._fixed = [tensor.data_ptr() for tensor in constants]
        spans = [None if _is_symbolic(fake) else _span(fake) for fake in fakes]
        self._spans = None if None in spans else [*spans, *map(_span, constants)]

    def copy_aliased(self, tensors: list[Tensor]) -> None:
        """Replace tensors that are written into and share memory with others by copies, in place in the list."""
        starts = [*map(Tensor.data_ptr, tensors), *self._fixed]
        spans: Any = self._spans or [*map(_span, tensors), *map(_span, self._constants)]
        stops = list(map(add, starts, spans))
        # No ranges overlap if each begins after all that began before it have ended.
        begun = sorted(starts)
        del begun[:1]
        if all(map(le, sorted(stops), begun)):
            return
        shared: set[int] = set()
        furthest = -1  # the range with the largest end so far
        for i in sorted((i for i, span in enumerate(spans) if span), key=starts.__getitem__):
            if furthest >= 0 and starts[i] < stops[furthest]:
                shared |= {i, furthest}
            if furthest < 0 or stops[i] > stops[furthest]:
                furthest = i
        for i in shared.intersection(self._written):
            tensors[i] = tensors[i].detach().clone()


def _span(tensor: Tensor) -> int:
    """Return the number of bytes from the first element of a tensor to the end of the last."""
    if not tensor.numel():
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()


def _is_symbolic(fake: Tensor) -> bool:
    return any(isinstance(number, torch.SymInt) for number in (*fake.shape, *fake.stride()))


def mark_donated(tensors: Iterable[Tensor]) -> None:
    """Mark tensors as donated."""
    for tensor in tensors:
        tensor.__class__ = Donated


def _is_reusable(fake: Tensor) -> bool:
    return fake.nbytes >= _LEAST_REUSE and bool(torch.ops.aten.is_non_overlapping_and_dense(fake))


def same_places(trace: Trace, inputs: Collection[int], *, alone: bool = True) -> list[Pair]:
    """Pair the leaves of each argument with those of the first part of the result that has its structure.

    Args:
        trace: The trace.
        inputs: The inputs to pair.
        alone: Whether tensors that are arguments themselves, or items of one, are paired too.
    """
    found: list[Pair] = []
    places = {place: n for n, place in enumerate(trace.signature.places)}
    results = list(_parts(trace.out_spec))
    for spec, leaves in _parts(trace.signature.spec):
        if spec.num_leaves and (alone or not spec.is_leaf()) and any(places.get(leaf) in inputs for leaf in leaves):
            match = next((there for other, there in results if other == spec), None)
            for here, there in zip(leaves, match or (), strict=False):
                kind, value = trace.results[there]
                if kind == "output" and here in places:
                    found.append((places[here], value))
    return found


def _parts(spec: Spec, start: int = 0, depth: int = 0) -> Iterable[tuple[Spec, range]]:
    """Yield the subtrees of a structure down to its third level, each with its leaves."""
    yield spec, range(start, start + spec.num_leaves)
    if depth < 2:
        for child in spec.children():
            yield from _parts(child, start, depth + 1)
            start += child.num_leaves


Strides: TypeAlias = "tuple[int, ...]"


def stable_strides(trace: Trace) -> dict[int, Strides]:
    """Return the inputs that will have other strides at the next call, with these strides.

    They are parts of states that the function returns with other strides. For example, zeros that `torch.vmap` returns
    have stride 0, but their updates by an optimizer do not.

    Args:
        trace: The trace.
    """
    if trace.symbolic or trace.strides:
        return {}
    outputs = trace.outputs()
    found: dict[int, Strides] = {}
    for i, j in _successors(trace):
        if outputs[j].stride() != trace.fakes[i].stride() and is_dense(outputs[j]):
            found[i] = outputs[j].stride()
    return found


def state_outputs(trace: Trace) -> set[int]:
    """Return the outputs whose strides a compiler must preserve, since they are the next inputs."""
    return set() if trace.symbolic else {j for _, j in _successors(trace)}


def copy_strided(tensor: Tensor, strides: Strides) -> Tensor:
    """Return a differentiable copy with other strides."""
    empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def other_strides(trace: Trace, tensors: list[Tensor]) -> dict[int, Strides] | None:
    """Return the strides of a trace for tensors with other ones; None if shape, dtype or device differ too."""
    if trace.symbolic or trace.strides:
        return None
    found: dict[int, Strides] = {}
    for n, (tensor, fake) in enumerate(zip(tensors, trace.fakes, strict=True)):
        if tensor.shape != fake.shape or tensor.dtype != fake.dtype or tensor.device != fake.device:
            return None
        if tensor.stride() != fake.stride():
            if type(tensor) is not Tensor or not is_dense(fake):
                return None
            found[n] = fake.stride()
    return found


def _successors(trace: Trace) -> Iterator[tuple[int, int]]:
    outputs = trace.outputs()
    for i, j in same_places(trace, range(len(trace.fakes)), alone=False):
        one, other = trace.fakes[i], outputs[j]
        if one.shape == other.shape and one.dtype == other.dtype and one.device == other.device:
            yield i, j


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its memory, each element once."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
