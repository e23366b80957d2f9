"""`vmap` in chunks or a loop in its place, and Jacobians by it: row by row or column by column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from luxtorch.core import InputError, tree_leaves, tree_map
from luxtorch.core._sharded import beside

from ._torch_func import Tree, WithAux, jvp

Blocks: TypeAlias = list[list[Tensor]]


def rows(
    vjp: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    chunk_size: int | None,
) -> Blocks:
    """Return the derivative of every output by every input, row by row, in reverse mode.

    Args:
        vjp: Takes a vector like the outputs to a vector like the inputs.
        ys: The outputs.
        xs: The inputs.
        chunk_size: How many rows are computed at once.
    """
    by_input = stack(lambda index: vjp(one_hot(index, ys)), numel(ys), xs, chunk_size)
    split = [torch.split(block, [y.numel() for y in ys]) for block in by_input]
    return [[parts[i].reshape(y.shape + x.shape) for parts, x in zip(split, xs, strict=True)] for i, y in enumerate(ys)]


def columns(f: WithAux, ys: Sequence[Tensor], xs: Sequence[Tensor], chunk_size: int | None) -> Blocks:
    """Return the derivative of every output by every input, column by column, in forward mode.

    Args:
        f: Takes the inputs to a tree of the outputs, and something auxiliary.
        ys: The outputs.
        xs: The inputs.
        chunk_size: How many columns are computed at once.
    """
    inputs = tuple(xs)

    def column(index: Tensor) -> Sequence[Tensor]:
        return tuple(tree_leaves(jvp(f, inputs, one_hot(index, inputs))[1]))

    by_output = stack(column, numel(xs), ys, chunk_size)
    split = [torch.split(block.movedim(0, -1), [x.numel() for x in xs], dim=-1) for block in by_output]
    return [
        [part.reshape(y.shape + x.shape) for part, x in zip(parts, xs, strict=True)]
        for parts, y in zip(split, ys, strict=True)
    ]


def numel(tensors: Sequence[Tensor]) -> int:
    """Return the number of elements of some tensors together."""
    return sum(tensor.numel() for tensor in tensors)


def one_hot(index: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the basis vector of an index, cut to the shapes of some tensors.

    The index may carry a vmap: no more of the basis exists at a time than is in use.
    """
    vectors, start = [], 0
    for tensor in like:
        places = torch.arange(start, start + tensor.numel(), device=tensor.device)
        vector = (places == index.to(tensor.device)).to(tensor.dtype).view(tensor.shape)
        vectors.append(beside(vector, tensor))
        start += tensor.numel()
    return tuple(vectors)


def stack(
    product: Callable[[Tensor], Sequence[Tensor]], count: int, like: Sequence[Tensor], chunk_size: int | None
) -> list[Tensor]:
    """Return the product of every basis index, stacked along a new first dimension.

    Args:
        product: Takes an index to tensors of the shapes of `like`.
        count: The number of indices.
        like: Stand-ins for a product.
        chunk_size: How many indices `vmap` takes at once, None for all; with 1 a loop takes them, without `vmap`.
    """
    if count == 0 or not like:
        return [tensor.new_zeros((count, *tensor.shape)) for tensor in like]
    return list(batched(product, chunk_size, torch.arange(count, device=like[0].device)))


def total(f: Callable[[Tensor], Tree], count: int, device: torch.device, chunk_size: int | None) -> Tree:
    """Return the sum of the trees that a function takes the indices below a count to, with no more at once than asked.

    Args:
        f: Takes an index to a tree.
        count: The number of indices, not zero.
        device: The device of the indices.
        chunk_size: How many indices `vmap` takes at once, as for `stack`.
    """
    chunks = torch.split(torch.arange(count, device=device), chunk_size or count)
    sums = (tree_map(lambda leaf: leaf.sum(0), batched(f, chunk_size, chunk)) for chunk in chunks)
    return reduce(partial(tree_map, torch.add), sums)


def batched(f: Callable[..., Tree], chunk_size: int | None, *trees: Tree) -> Tree:
    """Call a function along the first dimension of trees: by `vmap`, or with a chunk size of 1 by a loop without it."""
    if chunk_size != 1:
        mapped = torch.func.vmap(f, chunk_size=chunk_size)
        try:
            return mapped(*trees)
        except Exception as error:
            if not _reads_values(error):
                raise
        with _WithoutValues():
            return mapped(*trees)
    numbers = range(len(tree_leaves(trees)[0]))
    results = [f(*tree_map(lambda leaf, i=i: leaf[i], trees)) for i in numbers]
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


class _WithoutValues(TorchFunctionMode):
    """Name the function that reads values of a batched tensor; replace `one_hot` and `table[label]`, which need not.

    It is entered only after a call has failed, so that calls without such functions cost nothing.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.one_hot and (classes := _classes(*args, **kwargs)) > 0:
            index = args[0] if args else kwargs["input"]
            return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).long()
        if func is Tensor.__getitem__ and _is_label(args[1]):
            table, label = args
            return table.index_select(0, torch.where(label < 0, label + table.shape[0], label).reshape(1)).squeeze(0)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not _reads_values(error):
                raise
            name = "one_hot without num_classes" if func is F.one_hot else resolve_name(func) or str(func)
            raise InputError(
                "Under vmap, neither control flow nor shapes may depend on the values of a sample.",
                expected="the same operations and shapes for all samples",
                got=name,
                fix="Write it with torch.where, or pass num_classes, minlength or output_size; "
                "or take one sample after another: chunk_size=1.",
            ) from error


def _is_label(index: object) -> bool:
    """Tell whether an index is a scalar integer tensor, of which torch reads the value if a gradient tracks it."""
    return isinstance(index, Tensor) and index.ndim == 0 and index.dtype in (torch.int64, torch.int32)


def _classes(input: Tensor | None = None, num_classes: int = -1) -> int:
    """Return an argument of `one_hot`, however it was passed."""
    return num_classes


def _reads_values(error: Exception) -> bool:
    """Tell whether an error is torch's about values or shapes that depend on data under vmap."""
    return any(part in str(error) for part in _VALUE_ERRORS) and "randomness" not in str(error)


_VALUE_ERRORS = (
    "vmap: It looks like you're",
    "vmap: We do not support batching operators that can",
    "vmap: Attempted to vmap over",
    "vmap: Attempting to",
    "When vmap-ing torch.nn.functional.one_hot",
    "data pointer of Tensor that doesn't have storage",
    "vmapping over the `repeats`",
    "Batching rule not implemented",
    "vmap over torch.",
    "Attempted to vmap over `mask`",
    "stack expects each tensor to be equal size",
)
