"""`shard_data`: the share of the data that belongs to this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Subset

from luxtorch.core import InputError, named_leaves, out_of_range, tree_leaves, tree_map, wrong_type

from ._world import rank, world_size


def shard_data(dataset: Any, *, uneven: Literal["error", "drop", "repeat"] = "error") -> Any:
    """Return this rank's share of the data: a contiguous part, of the same size on every rank.

    Share out either the whole dataset once, or every batch: the shares of a batch, joined, are the batch, so that
    data-parallel training sees what a single process sees.

    Args:
        dataset: Tensors or NumPy arrays with a common first dimension, alone or in a tree such as `(x, y)`; or a
            dataset with a length, such as those of torch. A list of tensors is taken for a tree.
        uneven: What to do where the ranks do not divide the items. With shares of different sizes one rank would take
            more steps than the others, which would wait for it: so "error", "drop" the last items, or "repeat" the
            first ones.

    Returns:
        The share: a tree of slices, or a `torch.utils.data.Subset`. On a single process, what came.

    Raises:
        InputError: If the items are not shared out evenly and `uneven` is "error", if there are too few for a share,
            or if the first dimensions differ.
        DTypeError: If the dataset has no length.

    Example:
        >>> import torch
        >>> from luxtorch import distributed
        >>> x, y = distributed.shard_data((torch.zeros(8, 3), torch.zeros(8)))
        >>> x.shape[0] * distributed.world_size()
        8

    Source: `DistributedDataContainer` of Lux's DistributedUtils; `torch.utils.data.DistributedSampler`.
    """
    if uneven not in ("error", "drop", "repeat"):
        raise out_of_range("uneven", uneven, "'error', 'drop' or 'repeat'")
    arrays = [(name, leaf) for name, leaf in named_leaves(dataset) if _is_array(leaf)]
    in_tree = bool(arrays) and len(arrays) == len(tree_leaves(dataset))
    indices = _share(_common_size(arrays) if in_tree else _length(dataset), uneven)
    if world_size() == 1:
        return dataset
    return tree_map(lambda leaf: _rows(leaf, indices), dataset) if in_tree else Subset(dataset, indices)


def _share(total: int, uneven: str) -> Sequence[int]:
    """Return the indices of this rank's items."""
    ranks = world_size()
    size, rest = divmod(total, ranks)
    if rest and uneven == "error":
        fix = 'Pass uneven="drop" to leave out the last ones, or uneven="repeat" to use the first ones twice.'
        raise out_of_range("The number of items", total, f"a multiple of {ranks}, the number of ranks", fix=fix)
    if rest and uneven == "repeat":
        start = rank() * (size + 1)
        return [i % total for i in range(start, start + size + 1)]
    if size == 0 and ranks > 1:
        expected = f"at least {ranks}, the number of ranks"
        raise out_of_range("The number of items", total, expected, fix="Start fewer processes.")
    return range(rank() * size, (rank() + 1) * size)


def _is_array(leaf: object) -> bool:
    return bool(getattr(leaf, "shape", None)) and hasattr(leaf, "dtype")


def _common_size(arrays: list[tuple[str, Any]]) -> int:
    sizes = {name or "it": int(leaf.shape[0]) for name, leaf in arrays}
    if len(set(sizes.values())) > 1:
        raise InputError(
            "All tensors must have the same first dimension, the number of items.",
            got=", ".join(f"'{name}' has {size}" for name, size in sizes.items()),
        )
    return next(iter(sizes.values()))


def _length(dataset: Any) -> int:
    has_items = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not has_items or isinstance(dataset, (dict, Tensor)):
        expected = "tensors with a common first dimension, or a dataset with a length and with indices"
        fix = "Let each rank read its own part of a stream, by distributed.rank() and distributed.world_size()."
        raise wrong_type("dataset", dataset, expected, fix=fix)
    return len(dataset)


def _rows(leaf: Any, indices: Sequence[int]) -> Any:
    if isinstance(indices, range):
        return leaf[indices.start : indices.stop]
    return leaf[torch.tensor(indices, device=leaf.device) if isinstance(leaf, Tensor) else list(indices)]
