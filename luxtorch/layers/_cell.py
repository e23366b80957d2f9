"""The cell: a layer that takes one step of a sequence, and hands a carry on to the next."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import Layer, Parameters, States, tree_map

from ._lengths import before, held, where_before


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
