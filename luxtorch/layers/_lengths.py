"""Sequences of different lengths in one batch: which of their steps count, and what stands at their ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced, unwrapped, watched
from luxtorch.core import DTypeError, InputError, tree_map


@dataclass(frozen=True)
class Counted:
    """Say which steps count of sequences (time, ..., features), and bring these to the front.

    Attributes:
        lengths: How many steps of each sequence count, (...).
        mask: Which of them, (time, ...); None where they are the first ones.
    """

    lengths: Tensor
    mask: Tensor | None

    @staticmethod
    def of(steps: Any, xs: Tensor, swapped: bool) -> Counted:
        """Take lengths, or a mask in the order of dimensions of the input; raise if they do not fit."""
        kinds = (torch.bool, torch.int32, torch.int64)
        if not isinstance(steps, Tensor) or steps.dtype not in kinds:
            raise DTypeError(
                "Lengths are integers, and a mask is of booleans.",
                expected="a tensor of dtype torch.int64 or torch.bool",
                got=f"dtype {steps.dtype}" if isinstance(steps, Tensor) else f"a {type(steps).__name__}",
            )
        masked = steps.dtype == torch.bool
        mask = steps.transpose(0, 1) if masked and swapped and steps.ndim > 1 else steps
        shape = tuple(xs.shape[:-1] if masked else xs.shape[1:-1])
        if mask.shape != shape:
            shape = (shape[1], shape[0], *shape[2:]) if masked and swapped else shape
            raise InputError(
                f"The {'mask' if masked else 'lengths'} do not fit the sequences.",
                expected=f"a tensor of shape {shape}",
                got=f"a tensor of shape {tuple(steps.shape)}",
            )
        if masked:
            mask = mask.to(xs.device)
            return Counted(mask.sum(0), mask)
        _require_range(steps, xs.shape[0])
        return Counted(steps.to(xs.device), None)

    def in_front(self, xs: Tensor) -> Tensor:
        """Return the steps that count before zeros, which stand for the others."""
        if self.mask is not None:
            order = self.mask.logical_not().to(torch.uint8).argsort(dim=0, stable=True)
            xs = xs.take_along_dim(_beside(order, xs), 0)
        return where_before(self.lengths, xs)

    def in_place(self, ys: Tensor) -> Tensor:
        """Return what was computed of the steps in front at the places of these, zeros elsewhere."""
        if self.mask is None:
            return ys
        place = (self.mask.cumsum(0) - 1).clamp_min(0)
        found = ys.take_along_dim(_beside(place, ys), 0)
        return torch.where(_beside(self.mask, ys), found, 0.0)


def before(lengths: Tensor, time: int) -> Tensor:
    """Return which steps come before the ends of sequences, (time, ...)."""
    steps = torch.arange(time, device=lengths.device)
    return steps.reshape(-1, *(1,) * lengths.ndim) < lengths


def where_before(lengths: Tensor, ys: Tensor) -> Tensor:
    """Return values of all steps, (time, ..., more), with zeros in the place of those after the ends."""
    return torch.where(_beside(before(lengths, ys.shape[0]), ys), ys, 0.0)


def at_ends(lengths: Tensor, ys: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
    """Return those of the last steps of sequences; something else for sequences without steps."""
    last = _beside((lengths - 1).clamp_min(0)[None], ys)
    return torch.where(_beside(lengths > 0, ys[0]), ys.take_along_dim(last, 0).squeeze(0), otherwise)


def held(running: Tensor, new: Any, old: Any) -> Any:
    """Return the new carry of the sequences that run, and the old one of the others."""

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        if new.shape[: running.ndim] != running.shape:
            raise InputError(
                "What sequences of different lengths carry together cannot stop at the end of each.",
                expected=f"a carry of shape {tuple(running.shape)} and more dimensions",
                got=f"a tensor of shape {tuple(new.shape)}",
                fix="Give each sequence a carry of its own.",
            )
        return torch.where(_beside(running, new), new, old)

    return tree_map(chosen, new, old)


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    """Return a tensor with as many dimensions as another has, of which it has the first ones."""
    return flags.reshape((*flags.shape, *(1,) * (values.ndim - flags.ndim)))


def _require_range(lengths: Tensor, time: int) -> None:
    """Raise if a length is out of range, where that can be seen and nobody has to wait for a GPU."""
    if lengths.device.type != "cpu" or traced() or watched():
        return
    seen = unwrapped(lengths)
    if bool(((seen < 0) | (seen > time)).any()):
        raise InputError("A length is out of range.", expected=f"from 0 to {time}", got=f"{seen.tolist()}")
