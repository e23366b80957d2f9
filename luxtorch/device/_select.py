"""Choosing a device: the CPU, or the accelerator that there is."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from luxtorch.core import LuxtorchError

from ._device import Device


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
