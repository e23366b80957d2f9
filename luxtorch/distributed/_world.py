"""The process group: joining it, rank and world size, the share of the data, and the error if processes fail."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import Subset

from luxtorch.core import InputError, LuxtorchError, named_leaves, out_of_range, tree_leaves, tree_map, wrong_type


def initialize(
    backend: str | None = None,
    *,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: float = 600.0,
) -> None:
    """Join the other processes of this run.

    Under `torchrun` no argument is needed. A script that was started without it is a world of one, in which all of
    `luxtorch.distributed` leaves what it is given as it is: the same script runs alone. A second call does nothing,
    nor does one after `torch.distributed.init_process_group`.

    Where there are GPUs, the current one becomes that of the process: the first process of a machine takes the first
    GPU, and so on, from the beginning again where there are too few. `lt.gpu_device()` is that GPU.

    Args:
        backend: "gloo", "nccl" or another backend of torch. By default gloo, and NCCL for tensors on GPUs; both are
            needed there, for an optimizer's hyperparameters stay on the CPU.
        init_method: Where the processes meet, such as "file:///shared/meet"; by default where torchrun says.
        rank: The number of this process, if there is an `init_method`.
        world_size: The number of processes, if there is an `init_method`.
        timeout: After how many seconds a collective that a rank does not join is an error. With gloo, every rank
            that waits then raises a `DistributedError`; with NCCL, which does not let the CPU wait, torch ends the
            process, unless the environment variable TORCH_NCCL_BLOCKING_WAIT is 1.

    Raises:
        InputError: If the arguments do not belong together.
        DistributedError: If the processes do not meet.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.initialize()
        >>> distributed.rank(), distributed.world_size()
        (0, 1)

    Source: `DistributedUtils.initialize` of Lux; `torch.distributed.init_process_group`.
    """
    _check(init_method, rank, world_size, timeout)
    if initialized() or (init_method is None and "RANK" not in os.environ):
        return
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", rank or 0))
        torch.cuda.set_device(number % torch.cuda.device_count())
        backend = backend or "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    with collective("meeting"):
        try:
            restarts, store = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), None
            if init_method is None and restarts != "0":
                # torchrun may keep its store, in which processes that have died have left their addresses.
                store, rank, world_size = next(rendezvous("env://", timeout=limit))
                store = PrefixStore(f"restart {restarts}", store)
            dist.init_process_group(
                backend or "gloo",
                init_method=init_method,
                store=store,
                rank=-1 if rank is None else rank,
                world_size=-1 if world_size is None else world_size,
                timeout=limit,
            )
        except ValueError as error:  # a part of torchrun's environment is missing, or a backend is unknown
            raise InputError(
                "The processes cannot meet.",
                expected="a start by torchrun, or init_method, rank and world_size",
                got=str(error),
                fix="Start by `torchrun --nproc-per-node 2 script.py`.",
            ) from error


def _check(init_method: str | None, rank: int | None, world_size: int | None, timeout: float) -> None:
    given = [value is not None for value in (init_method, rank, world_size)]
    if any(given) != all(given):
        raise InputError(
            "init_method, rank and world_size must be passed together.",
            expected="all of them, or under torchrun none of them",
            got=f"init_method={init_method!r}, rank={rank}, world_size={world_size}",
        )
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise out_of_range("rank", rank, f"at least 0 and below world_size, which is {world_size}")
    if not timeout > 0:
        raise out_of_range("timeout", timeout, "positive, in seconds")


def shutdown() -> None:
    """Leave the other processes; without `initialize` before, nothing happens.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.shutdown()
        >>> distributed.initialized()
        False

    Source: `torch.distributed.destroy_process_group`.
    """
    if initialized():
        dist.destroy_process_group()


def initialized() -> bool:
    """Return whether this process has joined others, by `initialize` or by torch's own means.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.initialized()
        False

    Source: `DistributedUtils.initialized` of Lux.
    """
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0; it is 0 in a process of its own.

    Only one rank should print, draw and save what all have: `if distributed.rank() == 0: ...`.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.rank()
        0

    Source: `local_rank` of Lux's DistributedUtils, which is the rank among all processes.
    """
    return dist.get_rank() if initialized() else 0


def local_rank() -> int:
    """Return the number of this process on its own machine, as torchrun says; without torchrun, its rank.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.local_rank()
        0
    """
    return int(os.environ.get("LOCAL_RANK", rank()))


def world_size() -> int:
    """Return the number of processes; it is 1 in a process of its own.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.world_size()
        1

    Source: `total_workers` of Lux's DistributedUtils.
    """
    return dist.get_world_size() if initialized() else 1


class DistributedError(LuxtorchError, RuntimeError):
    """Report that processes failed to work together: one has died, does not answer, or does something else."""


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Explain an error of torch.distributed in what is done inside.

    Args:
        what: The collective, such as "all-reduce".
    """
    try:
        yield
    except LuxtorchError:
        raise
    except RuntimeError as error:
        # The message starts with a C++ source location, and ends with advice and a stack trace.
        message = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).splitlines() or [""]
        raise DistributedError(
            f"The {what} of all ranks failed.",
            expected="every rank to take part, with tensors of the same shapes and dtypes",
            got=f"{type(error).__name__}: {message[0].partition('. ')[0]:.300}",
            fix="Look for the first error of the other ranks: one has died, is too slow for the time-out of "
            "distributed.initialize, or does another thing. Restart from a checkpoint.",
        ) from error


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
