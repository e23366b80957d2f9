"""The base class of recurrent cells, and sequences of different lengths in one batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced, unwrapped, watched
from luxtorch.core import (
    InputError,
    Layer,
    Parameters,
    States,
    described,
    out_of_range,
    tree_map,
    wrong_shape,
    wrong_type,
)
from luxtorch.core._sharded import beside
from luxtorch.layers._shared import over_steps


@dataclass(frozen=True)
class StepMask:
    """The steps of padded sequences (time, ..., features) that count.

    Attributes:
        lengths: The number of steps of each sequence, (...).
        mask: Which steps, (time, ...); None for the first ones.
    """

    lengths: Tensor
    mask: Tensor | None

    @staticmethod
    def of(steps: Any, xs: Tensor, swapped: bool) -> StepMask:
        """Return the mask for lengths, or for a mask in the input's order of dimensions; raise if they do not fit."""
        kinds = (torch.bool, torch.int32, torch.int64)
        if not isinstance(steps, Tensor) or steps.dtype not in kinds:
            raise wrong_type("lengths", steps, "a tensor of integers, or a mask of booleans")
        masked = steps.dtype == torch.bool
        mask = steps.transpose(0, 1) if masked and swapped and steps.ndim > 1 else steps
        shape = tuple(xs.shape[:-1] if masked else xs.shape[1:-1])
        if mask.shape != shape:
            shape = (shape[1], shape[0], *shape[2:]) if masked and swapped else shape
            raise wrong_shape("mask" if masked else "lengths", steps, shape)
        if masked:
            mask = mask.to(xs.device)
            return StepMask(mask.sum(0), mask)
        _require_range(steps, xs.shape[0])
        return StepMask(steps.to(xs.device), None)

    def pack(self, xs: Tensor) -> Tensor:
        """Return the steps that count first, then zeros as padding."""
        if self.mask is not None:
            order = self.mask.logical_not().to(torch.uint8).argsort(dim=0, stable=True)
            xs = _taken(xs, order)
        return zero_padding(self.lengths, xs)

    def unpack(self, ys: Tensor) -> Tensor:
        """Return outputs of packed steps at their original places, zeros elsewhere."""
        if self.mask is None:
            return ys
        place = (self.mask.cumsum(0) - 1).clamp_min(0)
        found = _taken(ys, place)
        return torch.where(_unsqueezed(self.mask, ys), found, 0.0)


def running_steps(lengths: Tensor, time: int) -> Tensor:
    """Return a mask of the steps before the end of each sequence, (time, ...)."""
    steps = beside(torch.arange(time, device=lengths.device), lengths)
    return steps.reshape(-1, *(1,) * lengths.ndim) < lengths


def zero_padding(lengths: Tensor, ys: Tensor) -> Tensor:
    """Return values of all steps, (time, ..., more), with zeros after the end of each sequence."""
    return torch.where(_unsqueezed(running_steps(lengths, ys.shape[0]), ys), ys, 0.0)


def at_last_step(lengths: Tensor, ys: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
    """Return the values at the last step of each sequence; `otherwise` for sequences without steps."""
    last = _taken(ys, (lengths - 1).clamp_min(0)[None])
    return torch.where(_unsqueezed(lengths > 0, ys[0]), last.squeeze(0), otherwise)


def where_running(running: Tensor, new: Any, old: Any) -> Any:
    """Return the new carry of the running sequences, and the old one of the others."""

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        if new.shape[: running.ndim] != running.shape:
            raise InputError(
                "With lengths, each sequence must have a carry of its own.",
                expected=f"a carry of shape {tuple(running.shape)} and more dimensions",
                got=described(new),
            )
        return torch.where(_unsqueezed(running, new), new, old)

    return tree_map(chosen, new, old)


def _unsqueezed(flags: Tensor, values: Tensor) -> Tensor:
    """Append dimensions of size 1 to flags, up to the number of dimensions of values."""
    return flags.reshape((*flags.shape, *(1,) * (values.ndim - flags.ndim)))


def _taken(values: Tensor, steps: Tensor) -> Tensor:
    """Return the values at some steps, (steps, ..., more), for steps (steps, ...)."""
    # `take_along_dim` does the same, but lets `lt.jit` have no graph for all numbers of steps.
    return values.gather(0, _unsqueezed(steps, values).expand(-1, *values.shape[1:]))


def _require_range(lengths: Tensor, time: int) -> None:
    """Raise if a length is out of range, where values can be read without waiting for a GPU."""
    if lengths.device.type != "cpu" or traced() or watched():
        return
    seen = unwrapped(lengths)
    if bool(((seen < 0) | (seen > time)).any()):
        raise out_of_range("lengths", seen.tolist(), f"from 0 to {time}")


class Cell(Layer):
    """Base class of recurrent cells: one step, from an input and a carry to an output and the next carry.

    A cell is called on an input `x`, and starts from the initial carry; or on a tuple `(x, carry)`, and continues. It
    returns `((y, carry), st)`. A carry is a tensor, or a tuple of tensors or of carries, of the same shapes throughout.

    A subclass defines `initial_carry` and `step`, and then works in `Recurrence` and the other layers. A cell in
    `StatefulRecurrentCell` also needs a field or property `in_features`, the width of its input.

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

    def _start(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the carry to start a sequence from, the initial one if it is None, and the new state."""
        return self.initial_carry(_first(xs), ps, st) if carry is None else (carry, st)

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return `((ys, carry), st)`: the outputs of all steps stacked, the last carry, and the new state.

        A subclass may override it with a faster implementation for whole sequences.

        Args:
            xs: The inputs, (time, ..., features).
            carry: The carry of the step before; None for the initial one.
            ps: The parameters.
            st: The states.
        """
        carry, st = self._start(xs, carry, ps, st)
        if not xs.shape[0]:
            # Only a step shows the shape of an output.
            (y, _), _ = self.step(_first(xs), carry, ps, st)
            return (tree_map(lambda leaf: leaf[None][:0], y), carry), st

        def step(before: Any, x: Tensor) -> tuple[Any, Any]:
            carry, st = before
            (y, carry), st = self.step(x, carry, ps, st)
            return (carry, st), y

        (carry, st), ys = over_steps(step, (carry, st), xs)
        return (ys, carry), st

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return what `scan` does for sequences of different lengths: each carry stops at the end of its sequence.

        The outputs after it are zeros. A subclass may override it, like `scan`.

        Args:
            xs: The inputs, (time, ..., features), at least one step.
            lengths: The number of steps of each sequence, (...).
            carry: The carry of the step before; None for the initial one.
            ps: The parameters.
            st: The states.
        """
        carry, st = self._start(xs, carry, ps, st)

        def step(before: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
            (carry, st), (x, running) = before, inputs
            (y, after), st = self.step(x, carry, ps, st)
            return (where_running(running, after, carry), st), y

        (carry, st), ys = over_steps(step, (carry, st), (xs, running_steps(lengths, xs.shape[0])))
        return (tree_map(partial(zero_padding, lengths), ys), carry), st


def _first(xs: Tensor) -> Tensor:
    """Return the input of the first step, or one like it if there are none."""
    return xs[0] if xs.shape[0] else xs.new_zeros(xs.shape[1:])
