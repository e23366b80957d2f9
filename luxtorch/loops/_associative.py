"""`associative_scan`: all prefixes of a sequence under an associative function, in logarithmically many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from luxtorch.core import (
    DTypeError,
    InputError,
    described,
    named_leaves,
    out_of_range,
    tree_flatten,
    tree_unflatten,
    wrong_type,
)

X = TypeVar("X")
Combine: TypeAlias = "Callable[[list[Tensor], list[Tensor]], list[Tensor]]"


def associative_scan(combine: Callable[[X, X], X], xs: X, *, reverse: bool = False, dim: int = 0) -> X:
    """Combine the elements of a sequence from the first up to each one, many pairs at a time.

    Element i of the result is `combine(... combine(combine(x[0], x[1]), x[2]) ..., x[i])`, of `xs` the element itself
    where i is 0. Neighbors are combined first, then what came of these, and so on: a sequence of length n takes less
    than 2 log2(n) calls of `combine`, which combine less than 2 n pairs in all. They are ordinary operators, so every
    transform and every compiler takes them; a compiler sees as many calls as there are.

    Args:
        combine: A function of two trees like `xs`, which returns a tree like these. It is called with many pairs at a
            time: the leaves of both arguments are those of `xs` at some places along `dim`, equally many in both, so
            that `dim` is one more batch dimension, and stays where it is. What combines single elements `a` and `b`
            serves if it treats `dim` as a batch (elementwise functions and `@` for matrices do), else `torch.vmap` of
            it. The first argument is always the one that comes earlier (later if `reverse`). It has to be associative:
            `combine(a, combine(b, c))` must be `combine(combine(a, b), c)`, for which nothing is checked; it need not
            be commutative. It is not called for a sequence that is shorter than two.
        xs: A tree of tensors, all of one length along `dim`.
        reverse: Whether to begin with the last element, and to combine towards the first.
        dim: Along which dimension of each leaf the sequence goes.

    Returns:
        A tree like `xs`. Floating point numbers are rounded differently than by a loop.

    Raises:
        InputError: If there is no tensor in `xs`, if the lengths differ, or if `combine` changes structure or shape.
        DTypeError: If a leaf is not a tensor, or `combine` changes its dtype.

    Example:
        A linear recurrence h[t] = a[t] h[t - 1] + b[t], as in S5 and Mamba: what is combined are the maps h -> a h + b.

        >>> import torch, luxtorch as lt
        >>> a, b = torch.tensor([0.5, 0.5, 2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 3.0, 1.0])
        >>> def after(first, second):
        ...     return first[0] * second[0], second[0] * first[1] + second[1]
        >>> _, h = lt.associative_scan(after, (a, b))
        >>> h
        tensor([1.0000, 1.5000, 3.0000, 3.0000, 4.0000])

    Source:
        `jax.lax.associative_scan`, whose algorithm this is; Blelloch, "Prefix sums and their applications", 1990.
    """
    leaves, structure = tree_flatten(xs)
    dims = _check_leaves(xs, leaves, dim)
    if reverse:
        leaves = [leaf.flip(d) for leaf, d in zip(leaves, dims, strict=True)]

    def combined(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        result = combine(tree_unflatten(a, structure), tree_unflatten(b, structure))
        found, outline = tree_flatten(result)
        if outline != structure:
            raise InputError(
                "What combines two elements must keep their structure.",
                expected=f"{structure}",
                got=f"{outline}",
                fix="Return a tree like each of the two arguments.",
            )
        _check_alike(result, b)
        return found

    leaves = _scan(combined, leaves, dims)
    if reverse:
        leaves = [leaf.flip(d) for leaf, d in zip(leaves, dims, strict=True)]
    return tree_unflatten(leaves, structure)  # type: ignore[no-any-return]


def _scan(combine: Combine, leaves: list[Tensor], dims: list[int]) -> list[Tensor]:
    """Return all prefixes: those of pairs give every second one, and one more element each those between them."""
    length = leaves[0].shape[dims[0]]
    if length < 2:
        return leaves

    def part(leaves: list[Tensor], start: int, stop: int, step: int = 2) -> list[Tensor]:
        every = slice(start, stop, step)
        return [leaf[(slice(None),) * d + (every,)] for leaf, d in zip(leaves, dims, strict=True)]

    pairs = combine(part(leaves, 0, length - 1), part(leaves, 1, length))
    odd = _scan(combine, pairs, dims)
    first = part(leaves, 0, 1)
    if length == 2:
        return [torch.cat(two, d) for *two, d in zip(first, odd, dims, strict=True)]
    between = combine(part(odd, 0, (length - 1) // 2, 1), part(leaves, 2, length))
    even = [torch.cat(two, d) for *two, d in zip(first, between, dims, strict=True)]
    return [_alternate(*each) for each in zip(even, odd, dims, strict=True)]


def _alternate(even: Tensor, odd: Tensor, d: int) -> Tensor:
    """Return the elements of both by turns; the first has as many, or one more."""
    number = odd.shape[d]
    both = torch.stack([even.narrow(d, 0, number), odd], d + 1).flatten(d, d + 1)
    return both if even.shape[d] == number else torch.cat([both, even.narrow(d, number, 1)], d)


def _check_leaves(xs: Any, leaves: list[Any], dim: int) -> list[int]:
    """Return the dimension of each leaf, counted from the front, or raise unless the leaves are of one length."""
    if not leaves:
        raise InputError("There is nothing to scan.", expected="a tree with a tensor at least", got=described(xs))
    dims = []
    for name, leaf in named_leaves(xs):
        place = f"'xs.{name}'" if name else "xs"
        if not isinstance(leaf, Tensor):
            raise wrong_type(place, leaf, "a tensor", fix="Make it one, or let combine close over it.")
        if not -leaf.dim() <= dim < leaf.dim():
            raise out_of_range("dim", dim, f"a dimension of each leaf, and {place} has {leaf.dim()}")
        dims.append(dim % leaf.dim())
    lengths = {leaf.shape[d] for leaf, d in zip(leaves, dims, strict=True)}
    if len(lengths) > 1:
        named = zip(named_leaves(xs), dims, strict=True)
        raise InputError(
            f"All leaves must have one length along dim {dim}.",
            got=", ".join(f"{leaf.shape[d]} in '{name}'" for (name, leaf), d in named),
        )
    return dims


def _check_alike(result: Any, expected: list[Tensor]) -> None:
    """Raise unless what came of combining has the shapes and dtypes of what was combined."""
    for (name, leaf), like in zip(named_leaves(result), expected, strict=True):
        place = f"at the leaf '{name}'" if name else "of combine"
        if not isinstance(leaf, Tensor):
            raise wrong_type(f"The result {place}", leaf, "a tensor")
        if leaf.shape != like.shape:
            raise InputError(
                f"What combines two elements must keep their shape, which the result {place} does not.",
                expected=str(tuple(like.shape)),
                got=str(tuple(leaf.shape)),
                fix="The dimension along which is scanned is a batch: combine one pair for each of its places.",
            )
        if leaf.dtype != like.dtype:
            raise DTypeError(
                f"What combines two elements must keep their dtype, which the result {place} does not.",
                expected=str(like.dtype),
                got=str(leaf.dtype),
                fix=f"Convert xs or the result with .to({like.dtype}).",
            )
