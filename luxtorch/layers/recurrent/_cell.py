"""The base class of recurrent cells, and sequences of different lengths in one batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced, unwrapped, watched
from luxtorch.core import DTypeError, InputError, Layer, Parameters, States, tree_map


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


class Cell(Layer):
    """Take one step of a sequence: from an input and a carry to an output and the next carry.

    A cell is called on an input `x`, and starts with the initial carry; or on a tuple `(x, carry)`, and continues. It
    returns `((y, carry), st)`. A carry is a tensor, or a tuple of tensors or of carries, of the same shapes throughout.

    A subclass defines `initial_carry` and `step`, and with that works in `Recurrence` and all the others. A cell in
    `StatefulRecurrentCell` says its input's width in a field or property `in_features`.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Sum(lt.Cell):
        ...     def initial_carry(self, x, ps, st):
        ...         return torch.zeros_like(x), st
        ...
        ...     def step(self, x, carry, ps, st):
        ...         return (x + carry, x + carry), st
        >>> y, st = lt.Recurrence(Sum(), return_sequence=True)(torch.ones(4, 1), {}, {})
        >>> y.flatten()
        tensor([1., 2., 3., 4.])

    Source: Lux's `AbstractRecurrentCell`.
    """

    @abstractmethod
    def initial_carry(self, x: Tensor, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(carry, st)`: the carry before the first step, and the new state.

        Args:
            x: The input of one step, (..., features). Its values do not matter.
            ps: The parameters.
            st: The states.
        """

    @abstractmethod
    def step(self, x: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return `((y, carry), st)`: the output, the next carry, and the new state.

        Args:
            x: The input of one step, (..., features).
            carry: The carry of the step before.
            ps: The parameters.
            st: The states.
        """

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return `((y, carry), st)` of one step, on an input or on a tuple `(x, carry)`."""
        x, carry = x if isinstance(x, tuple) else (x, None)
        if carry is None:
            carry, st = self.initial_carry(x, ps, st)
        return self.step(x, carry, ps, st)

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return `((ys, carry), st)`: the outputs of all steps stacked, the last carry, and the new state.

        A subclass may define it anew where a whole sequence takes less than its steps one by one.

        Args:
            xs: The inputs, (time, ..., features).
            carry: The carry of the step before; None for the initial one.
            ps: The parameters.
            st: The states.
        """
        if carry is None:
            carry, st = self.initial_carry(first_of(xs), ps, st)
        outputs = []
        for x in xs.unbind():
            (y, carry), st = self.step(x, carry, ps, st)
            outputs.append(y)
        if not outputs:
            # Only a step tells what an output looks like.
            (y, _), _ = self.step(first_of(xs), carry, ps, st)
            return (tree_map(lambda leaf: leaf[None][:0], y), carry), st
        return (tree_map(lambda *leaves: torch.stack(leaves), *outputs), carry), st

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return what `scan` does for sequences of different lengths: each carry stops at the end of its sequence.

        The outputs after it are zeros. A subclass may define it anew, as it may `scan`.

        Args:
            xs: The inputs, (time, ..., features), at least one step.
            lengths: How many steps of each sequence count, (...).
            carry: The carry of the step before; None for the initial one.
            ps: The parameters.
            st: The states.
        """
        if carry is None:
            carry, st = self.initial_carry(first_of(xs), ps, st)
        outputs = []
        for x, running in zip(xs.unbind(), before(lengths, xs.shape[0]).unbind(), strict=True):
            (y, after), st = self.step(x, carry, ps, st)
            carry = held(running, after, carry)
            outputs.append(y)
        ys = tree_map(lambda *leaves: where_before(lengths, torch.stack(leaves)), *outputs)
        return (ys, carry), st


def first_of(xs: Tensor) -> Tensor:
    """Return the input of the first step, or one like it if there are none."""
    return xs[0] if xs.shape[0] else xs.new_zeros(xs.shape[1:])
