"""Move the batches of a data loader to a device, the next ones ahead of their use: `DeviceIterator`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import out_of_range, tensors

from ._device import Device, in_precision, map_tensors

Arrive = Callable[[], Any]
"""Waits for a batch to be there, and returns it."""


class DeviceIterator:
    """Go through the batches of a loader, moved to a device.

    It can be gone through as often as the loader can, and has its length. Each batch is moved as by `Device`: what is
    no tensor is left as it is. On a CUDA device the next batches are copied on a stream of their own while the model
    computes; for that to happen at the same time, their memory has to be pinned, as by
    `DataLoader(..., pin_memory=True)`. There are no threads: to prepare batches in parallel is for the loader's
    workers.

    Args:
        loader: A `torch.utils.data.DataLoader`, or any iterable of trees of tensors.
        device: Where to.
        prefetch: How many batches to fetch and move before they are asked for. So many are in memory besides the one
            in use, and so many are lost if a loader that can be gone through only once is left early. None is two on
            a CUDA device and none elsewhere, where there is nothing to gain. A loader that writes each batch into the
            memory of the last needs 0.

    Attributes:
        loader: The loader.
        device: The device.
        prefetch: How many batches are fetched before they are asked for.

    Raises:
        InputError: If `prefetch` is negative, or a batch holds a layer or a module. What the loader raises comes
            unchanged, after the batches before it.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from luxtorch.device import DeviceIterator, cpu_device
        >>> loader = DataLoader(TensorDataset(torch.arange(3.0), torch.tensor([0, 1, 0])), batch_size=2)
        >>> for x, y in DeviceIterator(loader, cpu_device(dtype=torch.float64)):
        ...     print(x, y)
        tensor([0., 1.], dtype=torch.float64) tensor([0, 1])
        tensor([2.], dtype=torch.float64) tensor([0])

    Source:
        `MLDataDevices.DeviceIterator`.
    """

    def __init__(
        self, loader: Iterable[Any], device: Device | torch.device | str, *, prefetch: int | None = None
    ) -> None:
        self.loader = loader
        self.device = device if isinstance(device, Device) else Device(device)
        self._copies = self.device.device.type == "cuda"
        self.prefetch = (2 if self._copies else 0) if prefetch is None else prefetch
        if self.prefetch < 0:
            raise out_of_range("prefetch", prefetch, "at least 0, or None")

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # its own TypeError, if it has none

    def __iter__(self) -> Iterator[Any]:
        start = _copier(self.device) if self._copies else _mover(self.device)
        started, moved = map(start, self.loader), deque[Arrive]()
        error: Exception | None = None
        while True:
            while error is None and len(moved) <= self.prefetch:
                try:
                    moved.append(next(started))
                except Exception as caught:  # kept until its turn comes
                    error = caught
            if moved:
                # No name is given to the batch: once it is used, it must be free to go.
                yield moved.popleft()()
            elif error is None or isinstance(error, StopIteration):
                return
            else:
                try:
                    raise error
                finally:
                    error = None  # it holds this frame, which would hold it

    def __repr__(self) -> str:
        return f"DeviceIterator({type(self.loader).__name__}, {self.device}, prefetch={self.prefetch})"


def _mover(device: Device) -> Callable[[Any], Arrive]:
    """Return what moves a batch and waits for it."""

    def start(batch: Any) -> Arrive:
        moved = device(batch)
        return lambda: moved

    return start


def _copier(device: Device) -> Callable[[Any], Arrive]:
    """Return what starts to copy a batch to a CUDA device, on a stream that is used for nothing else."""
    place = device.device
    stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]

    def copy(tensor: Tensor) -> Tensor:
        moved = tensor.to(place, non_blocking=True)
        # Cast after the copy: before, torch would cast on the CPU, into memory that is not pinned.
        return moved if device.dtype is None else moved.to(in_precision(moved, device.dtype))

    def start(batch: Any) -> Arrive:
        if not all(map(_is_plain, tensors(batch))):
            return _mover(device)(batch)
        with torch.cuda.stream(stream):
            copied = map_tensors(copy, batch)
            there = stream.record_event()

        def arrive() -> Any:
            current = torch.cuda.current_stream(place)
            current.wait_event(there)
            for tensor in tensors(copied):
                tensor.record_stream(current)  # its memory is not given to the next copy before this use ends
            return copied

        return arrive

    return start


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor can be copied on another stream: no stream is still computing it, and it is not sparse."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided
