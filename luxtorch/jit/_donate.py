"""Donation: the memory of arguments that are given away takes the results, and who uses them later hears of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import LuxtorchError

from ._flatten import Spec
from ._sizes import any_symbol
from ._trace import Trace, aliases

Pair: TypeAlias = tuple[int, int]
"""An input and the output that is written into it."""


# To reuse less than this saves less time than it takes.
_WORTH_REUSE = 2**16  # bytes


class DonatedError(LuxtorchError, RuntimeError):
    """Report the use of a tensor that was given away.

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
        luxtorch.jit._donate.DonatedError: This tensor was donated to a jitted function, which may have reused it.
          expected: what the function returned
          fix:      Use the result in its place, `x = f(x)`, or leave `donate` out.
    """


class Donated(Tensor):
    """Be what is left of a tensor that was given away: each use of it is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        refuse()


def refuse() -> NoReturn:
    """Raise the error for the use of a donated tensor."""
    raise DonatedError(
        "This tensor was donated to a jitted function, which may have reused it.",
        expected="what the function returned",
        fix="Use the result in its place, `x = f(x)`, or leave `donate` out.",
    )


def pairs(trace: Trace, donated: Collection[int]) -> list[Pair]:
    """Choose which donated input takes which output of the same shape and dtype.

    A tree that comes back as a part of the result takes itself, leaf by leaf; what is left goes by order. An output
    that shares memory with something else stays where it is, and so do an input that is still seen in an output and a
    small one.

    Args:
        trace: The trace.
        donated: Which inputs are donated.
    """
    views_of, others = aliases(trace)
    fakes = trace.fakes
    outputs = trace.outputs()
    returned = {value for kind, value in trace.results if kind == "input"}
    free = [i for i in donated if i not in returned and not views_of[i] and _is_reusable(fakes[i])]
    # To compare a size that is a symbol would make a constant of it.
    fresh = {j for j, shared in enumerate(others) if not shared and not any_symbol(outputs[j].shape)}
    chosen: list[Pair] = []
    for i, j in [*_same_places(trace, free), *((i, j) for i in free for j in range(len(outputs)))]:
        alike = fakes[i].shape == outputs[j].shape and fakes[i].dtype == outputs[j].dtype
        if i in free and j in fresh and alike and fakes[i].device == outputs[j].device:
            chosen.append((i, j))
            free = [other for other in free if other != i]
            fresh.remove(j)
    return sorted(chosen)


def own(tensors: list[Tensor], donated: Sequence[int]) -> None:
    """Replace donated tensors that share memory with another argument by copies, in place in the list."""
    addresses = list(map(Tensor.data_ptr, tensors))
    if len(set(addresses)) == len(addresses):
        return
    for i in donated:
        if addresses[i] != 0 and addresses.count(addresses[i]) > 1:
            tensors[i] = tensors[i].detach().clone()


def give_up(tensors: Iterable[Tensor]) -> None:
    """Turn tensors into donated ones."""
    for tensor in tensors:
        tensor.__class__ = Donated


def _is_reusable(fake: Tensor) -> bool:
    return fake.nbytes >= _WORTH_REUSE and bool(torch.ops.aten.is_non_overlapping_and_dense(fake))


def _same_places(trace: Trace, donated: Collection[int]) -> list[Pair]:
    """Pair the leaves of each argument with those of the first part of the result that has its structure."""
    found: list[Pair] = []
    places = {place: n for n, place in enumerate(trace.signature.places)}
    results = list(_parts(trace.out_spec))
    for spec, leaves in _parts(trace.signature.spec):
        if spec.num_leaves and any(places.get(leaf) in donated for leaf in leaves):
            match = next((there for other, there in results if other == spec), None)
            for here, there in zip(leaves, match or (), strict=False):
                kind, value = trace.results[there]
                if kind == "output" and here in places:
                    found.append((places[here], value))
    return found


def _parts(spec: Spec, start: int = 0, depth: int = 0) -> Iterable[tuple[Spec, range]]:
    """Yield the structures down to the third level, the arguments themselves, with their leaves."""
    yield spec, range(start, start + spec.num_leaves)
    if depth < 2:
        for child in spec.children():
            yield from _parts(child, start, depth + 1)
            start += child.num_leaves
