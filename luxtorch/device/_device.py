"""Devices for trees: choose one, move trees there, tell where they are; and cast them to a precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import DTypeError, InputError, Layer, LuxtorchError, named_leaves, tree_leaves, tree_map, wrong_type

_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree, once to a tensor that the tree holds several times.

    Args:
        function: Takes a tensor to a tensor.
        tree: A tree. Leaves that are not tensors are left as they are.

    Raises:
        InputError: The tree holds a layer or a module, in which there is nothing to map.
    """
    results: dict[int, Tensor] = {}

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in results:
                results[id(leaf)] = function(leaf)
            return results[id(leaf)]
        if isinstance(leaf, (Layer, nn.Module)):
            _refuse(leaf, tree)
        return leaf

    return tree_map(apply, tree)


def own_numbers(tree: Any, dtype: torch.dtype) -> set[int]:
    """Return which tensors of a tree a cast to a dtype leaves alone, by their ids.

    A node may have numbers that follow no precision, such as the hyperparameters of an optimizer: it then has a method
    `own_numbers(dtype)`, which lists them.
    """
    nodes = filter(_has_numbers, tree_leaves(tree, is_leaf=_has_numbers))
    return {id(number) for node in nodes for number in node.own_numbers(dtype)}


def _has_numbers(node: Any) -> bool:
    return hasattr(type(node), "own_numbers")


def _refuse(leaf: Layer | nn.Module, tree: Any) -> None:
    path = next(path for path, other in named_leaves(tree) if other is leaf)
    is_layer = isinstance(leaf, Layer)
    raise InputError(
        "A layer holds no tensors: there is nothing to move or cast."
        if is_layer
        else "A torch.nn.Module is not a tree of tensors.",
        expected="a tree of tensors, such as parameters or states",
        got=f"{type(leaf).__name__}" + (f" at '{path}'" if path else ""),
        fix="Pass its parameters and states, as in `ps, st = device((ps, st))`."
        if is_layer
        else "Call its own .to(...), or convert it to a layer, parameters and states.",
    )


def in_precision(tensor: Tensor, precision: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in some precision: its own where it is neither real nor complex."""
    if tensor.is_floating_point():
        return precision
    if not tensor.is_complex():
        return tensor.dtype
    if precision not in _COMPLEX:
        raise DTypeError(
            "torch has no complex dtype of this precision.",
            expected="float16, float32 or float64",
            got=str(precision).removeprefix("torch."),
            fix="Cast to one of these, or split the tensor with torch.view_as_real.",
        )
    return _COMPLEX[precision]


def _cast(tree: Any, precision: torch.dtype) -> Any:
    kept = own_numbers(tree, precision)
    return map_tensors(
        lambda tensor: tensor if id(tensor) in kept else tensor.to(in_precision(tensor, precision)), tree
    )


def f16(tree: Any) -> Any:
    """Cast the floating point and complex tensors of a tree to half precision.

    Integers, booleans, random keys and whatever is not a tensor are left as they are. A tensor that already has the
    precision is not copied, and one that the tree holds twice is still one tensor afterwards. Of an optimizer's state,
    or of a whole `TrainState`, what there is of each element of a parameter is cast, and no hyperparameter or count;
    averages of gradients are not cast to float16, which has no room for their squares.

    Args:
        tree: A tree of tensors.

    Returns:
        A tree of the same structure.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.f16({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.float16), 'count': tensor(3)}

    Source:
        `Lux.f16`.
    """
    return _cast(tree, torch.float16)


def bf16(tree: Any) -> Any:
    """Cast the floating point tensors of a tree to bfloat16; otherwise like `f16`.

    Args:
        tree: A tree of tensors, none of them complex.

    Returns:
        A tree of the same structure.

    Raises:
        DTypeError: The tree holds a complex tensor, for which there is no such precision.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.bf16({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.bfloat16), 'count': tensor(3)}

    Source:
        `Lux.bf16`.
    """
    return _cast(tree, torch.bfloat16)


def f32(tree: Any) -> Any:
    """Cast the floating point and complex tensors of a tree to single precision; otherwise like `f16`.

    Args:
        tree: A tree of tensors.

    Returns:
        A tree of the same structure.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.f32({"weight": torch.ones(1, dtype=torch.float64), "count": torch.tensor(3)})
        {'weight': tensor([1.]), 'count': tensor(3)}

    Source:
        `Lux.f32`.
    """
    return _cast(tree, torch.float32)


def f64(tree: Any) -> Any:
    """Cast the floating point and complex tensors of a tree to double precision; otherwise like `f16`.

    Args:
        tree: A tree of tensors.

    Returns:
        A tree of the same structure.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.f64({"weight": torch.ones(1), "count": torch.tensor(3)})
        {'weight': tensor([1.], dtype=torch.float64), 'count': tensor(3)}

    Source:
        `Lux.f64`.
    """
    return _cast(tree, torch.float64)


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
