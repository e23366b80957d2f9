"""Strides of arguments: graphs are compiled for those that states will have; other strides are copied to these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from ._donate import same_places
from ._trace import Trace

Strides: TypeAlias = "tuple[int, ...]"


def stable_strides(trace: Trace) -> dict[int, Strides]:
    """Return the inputs that will have other strides at the next call, with these strides.

    They are parts of states that the function returns with other strides. For example, zeros that `torch.vmap` returns
    have stride 0, but their updates by an optimizer do not.

    Args:
        trace: The trace.
    """
    if trace.symbolic or trace.strides:
        return {}
    outputs = trace.outputs()
    found: dict[int, Strides] = {}
    for i, j in _successors(trace):
        if outputs[j].stride() != trace.fakes[i].stride() and is_dense(outputs[j]):
            found[i] = outputs[j].stride()
    return found


def state_outputs(trace: Trace) -> set[int]:
    """Return the outputs whose strides a compiler must preserve, since they are the next inputs."""
    return set() if trace.symbolic else {j for _, j in _successors(trace)}


def copy_strided(tensor: Tensor, strides: Strides) -> Tensor:
    """Return a differentiable copy with other strides."""
    empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def other_strides(trace: Trace, tensors: list[Tensor]) -> dict[int, Strides] | None:
    """Return the strides of a trace for tensors with other ones; None if shape, dtype or device differ too."""
    if trace.symbolic or trace.strides:
        return None
    found: dict[int, Strides] = {}
    for n, (tensor, fake) in enumerate(zip(tensors, trace.fakes, strict=True)):
        if tensor.shape != fake.shape or tensor.dtype != fake.dtype or tensor.device != fake.device:
            return None
        if tensor.stride() != fake.stride():
            if type(tensor) is not Tensor or not is_dense(fake):
                return None
            found[n] = fake.stride()
    return found


def _successors(trace: Trace) -> Iterator[tuple[int, int]]:
    outputs = trace.outputs()
    for i, j in same_places(trace, range(len(trace.fakes)), alone=False):
        one, other = trace.fakes[i], outputs[j]
        if one.shape == other.shape and one.dtype == other.dtype and one.device == other.device:
            yield i, j


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its memory, each element once."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
