"""Devices for trees: choose one, move trees there, and tell where they are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, LuxtorchError, named_leaves, wrong_type

from ._cast import in_precision, map_tensors, own_numbers


@dataclass(frozen=True)
class Device:
    """Move trees of tensors to a device, by being called.

    A tensor that is there already is not copied, and one that the tree holds twice is still one tensor afterwards.
    Whatever is not a tensor is left as it is. For the batches of a data loader there is
    `DeviceIterator`.

    Args:
        device: A torch device, or its name.
        dtype: The precision to cast floating point and complex tensors to; None keeps theirs. Integers, booleans and
            random keys are never cast, nor are the hyperparameters and counts in the state of an optimizer; see `f16`.

    Raises:
        DTypeError: `dtype` is not a floating point dtype.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> device = lt.cpu_device(dtype=torch.float64)
        >>> device({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.float64), 'count': tensor(3)}

    Source:
        The devices of MLDataDevices.jl.
    """

    device: torch.device
    dtype: torch.dtype | None = None

    def __init__(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise wrong_type("dtype", dtype, "a floating point dtype or None", fix="Pass torch.float32, for instance.")
        object.__setattr__(self, "device", torch.device(device))
        object.__setattr__(self, "dtype", dtype)

    def __call__(self, tree: Any) -> Any:
        """Return a tree with all its tensors on the device.

        Raises:
            InputError: The tree holds a layer or a module.
        """
        device, dtype = self.device, self.dtype
        if dtype is None:
            return map_tensors(lambda tensor: tensor.to(device), tree)
        kept = own_numbers(tree, dtype)
        return map_tensors(
            lambda tensor: tensor.to(device, tensor.dtype if id(tensor) in kept else in_precision(tensor, dtype)), tree
        )


def to_device(tree: Any, device: Device | torch.device | str) -> Any:
    """Return a tree with all its tensors on a device; see `Device`.

    Args:
        tree: A tree of tensors.
        device: Where to.

    Returns:
        A tree of the same structure.

    Raises:
        InputError: The tree holds a layer or a module.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.to_device({"weight": torch.ones(1)}, "meta")
        {'weight': tensor(..., device='meta', size=(1,))}
    """
    return (device if isinstance(device, Device) else Device(device))(tree)


def get_device(tree: Any) -> Device | None:
    """Return the device on which all tensors of a tree are.

    Args:
        tree: A tree of tensors.

    Returns:
        The device, or None if the tree has no tensor.

    Raises:
        InputError: The tensors are on several devices.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.get_device({"weight": torch.ones(1)}) == lt.cpu_device()
        True

    Source:
        `MLDataDevices.get_device`.
    """
    places: dict[torch.device, list[str]] = {}
    for path, leaf in named_leaves(tree):
        if isinstance(leaf, Tensor):
            places.setdefault(leaf.device, []).append(path)
    if len(places) > 1:
        raise InputError(
            "The tensors of the tree are on several devices.",
            expected="one device",
            got="; ".join(f"{', '.join(paths)} on {device}" for device, paths in places.items()),
            fix="Move the whole tree, as in `gpu_device()(tree)`.",
        )
    return Device(next(iter(places))) if places else None


class DeviceError(LuxtorchError, RuntimeError):
    """Report a device that this machine does not have."""


def cpu_device(*, dtype: torch.dtype | None = None) -> Device:
    """Return the CPU.

    Args:
        dtype: The precision to cast to; None keeps each tensor's own.

    Returns:
        A `Device`, to be called on trees.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.cpu_device()({"weight": torch.ones(1)})
        {'weight': tensor([1.])}

    Source:
        `MLDataDevices.cpu_device`.
    """
    return Device("cpu", dtype)


def gpu_device(index: int | None = None, *, dtype: torch.dtype | None = None, force: bool = False) -> Device:
    """Return the accelerator of this machine (CUDA, ROCm, MPS, XPU), or the CPU where there is none.

    The first time that it has to fall back to the CPU it warns.

    Args:
        index: Which accelerator, from 0; None is torch's current one.
        dtype: The precision to cast to; None keeps each tensor's own, float64 included.
        force: Raise rather than fall back to the CPU.

    Returns:
        A `Device`, to be called on trees.

    Raises:
        DeviceError: There is no accelerator with this index, or none at all and `force` is set.

    Example:
        >>> import warnings
        >>> import luxtorch as lt
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # not every machine has an accelerator
        ...     device = lt.gpu_device()
        >>> ps, st = device(lt.setup(0, lt.Dense(2, 3)))
        >>> lt.get_device(ps) == device
        True

    Source:
        `MLDataDevices.gpu_device`.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        if force:
            raise DeviceError(
                "There is no accelerator.",
                expected="a CUDA, ROCm, MPS or XPU device that this build of torch supports",
                got="none",
                fix="Leave out force=True to run on the CPU, or install torch for your accelerator.",
            )
        _warn_once()
        return Device("cpu", dtype)
    count = torch.accelerator.device_count()
    if index is None:
        index = torch.accelerator.current_device_index()
    if not 0 <= index < count:
        raise DeviceError(
            f"There is no {accelerator.type} device {index}.",
            expected=f"an index from 0 to {count - 1}",
            got=str(index),
            fix="Indices count from 0; leave the index out to take the current device.",
        )
    return Device(torch.device(accelerator.type, index), dtype)


@cache
def _warn_once() -> None:
    warnings.warn("There is no accelerator: gpu_device() is the CPU.", UserWarning, stacklevel=3)
