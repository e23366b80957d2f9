"""The same values on all ranks, by a broadcast, and different random keys."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, named_leaves, out_of_range, tree_flatten, tree_map, tree_unflatten
from luxtorch.core._sharded import is_sharded
from luxtorch.random import fold_in
from luxtorch.random._key import is_key

from ._world import collective, rank, world_size

T = TypeVar("T")


def synchronize(tree: T, root: int = 0) -> T:
    """Return a tree with the values of one rank, on every rank.

    Call it once before training, on parameters, states and optimizer states, or on a whole TrainState. Models that
    are set up from the same seed are equal anyhow. Random keys become equal, too: see `fold_in_rank`.

    Args:
        tree: A tree of tensors of the same names, shapes and dtypes on every rank, and on the same kind of device.
            What is not a tensor is kept, and so are sharded tensors, of which every rank has its own part.
        root: The rank whose values are taken.

    Returns:
        A tree of the same structure, with tensors of its own; on a single process, the one that came.

    Raises:
        InputError: If the trees of the ranks differ in structure, which all ranks report; if there is no such root;
            or inside of a transform or a compiled function.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = distributed.synchronize(lt.setup(distributed.rank(), lt.Dense(2, 3)))

    Source: `synchronize!!` of Lux's DistributedUtils.
    """
    if not 0 <= root < world_size():
        raise out_of_range("root", root, f"at least 0 and below the number of ranks, {world_size()}")
    if transformed():
        raise InputError(
            "synchronize must be called outside of transforms and compiled functions.",
            fix="Call synchronize once, before training.",
        )
    if world_size() == 1:
        return tree
    _check_alike(tree, root)
    leaves, spec = tree_flatten(tree)
    by_device: dict[torch.device, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and not is_sharded(leaf):
            by_device.setdefault(leaf.device, []).append(i)
    for members in by_device.values():
        for i, leaf in zip(members, _broadcast([leaves[i] for i in members], root), strict=True):
            leaves[i] = leaf
    alike: T = tree_unflatten(leaves, spec)
    return alike


def fold_in_rank(tree: T) -> T:
    """Return a tree in which this rank's number is folded into every random key.

    Without it all ranks, which start from the same seed, would draw the same dropout masks. Call it once, after the
    setup; the layers then derive their next keys from these.

    Args:
        tree: A key, states, or any other tree. What is not a key is kept: a key is a uint64 tensor of shape (..., 2).

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = lt.setup(0, lt.Dropout(0.5))
        >>> st = distributed.fold_in_rank(st)
        >>> st["rng"].shape
        torch.Size([2])
    """
    if world_size() == 1:
        return tree
    folded: T = tree_map(lambda leaf: fold_in(leaf, rank()) if is_key(leaf) else leaf, tree)
    return folded


def _broadcast(tensors: list[Tensor], root: int) -> list[Tensor]:
    """Return the tensors of the root, in one broadcast of their bytes, so that any dtype can be sent, keys included."""
    raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    joined = torch.cat(raw)
    with collective("broadcast"):
        dist.broadcast(joined, root)
    # Cloned, because the memory of a tensor must be aligned to the size of its elements.
    pieces = joined.split_with_sizes([piece.numel() for piece in raw])
    return [
        piece.clone().view(tensor.dtype).view(tensor.shape).requires_grad_(tensor.requires_grad)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def _check_alike(tree: Any, root: int) -> None:
    """Raise on all ranks unless their trees have the same structure: otherwise some would wait forever."""
    own = [f"'{name}' {_outline(leaf)}" for name, leaf in named_leaves(tree)]
    outlines: list[list[str]] = [[] for _ in range(world_size())]
    with collective("comparison of the trees"):
        dist.all_gather_object(outlines, own)
    other = next((i for i, outline in enumerate(outlines) if outline != outlines[root]), None)
    if other is None:
        return
    wanted, came = outlines[root], outlines[other]
    place = next((i for i, pair in enumerate(zip(wanted, came, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        place = min(len(wanted), len(came))
    raise InputError(
        f"All ranks must have the same tree, and that of rank {other} differs from that of rank {root}.",
        expected=wanted[place] if place < len(wanted) else "no more leaves",
        got=came[place] if place < len(came) else "no more leaves",
        fix="Build the same model, with the same options, on every rank.",
    )


def _outline(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{leaf.dtype} of shape {tuple(leaf.shape)} on {leaf.device.type}"
