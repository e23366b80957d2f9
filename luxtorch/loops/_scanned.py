"""The rules of a scan: its derivatives and its batch are scans of derived bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import TransformType
from luxtorch._transforms import traced

from . import _ops
from ._closure import Flat
from ._primitive import (
    Levels,
    Operator,
    bind,
    is_smooth,
    mapped,
    parts,
    pulled,
    pushed,
    smooth,
    spread,
    with_batch,
    zeros_for,
)


@dataclass(frozen=True, eq=False)
class Scan(Operator):
    """A scan of flat tensors: the carry, the sequences, and what stays the same.

    Attributes:
        step: Takes the carry, the elements, and what stays the same, to the next carry and the results.
        carries: How many tensors are the carry.
        scanned: How many are sequences.
        length: How many steps.
        reverse: Whether the last element comes first.
        before: Whether the carries before each step are outputs as well, after the last carry.
    """

    step: Flat
    carries: int
    scanned: int
    length: Any
    reverse: bool
    before: bool = False

    def run(self, flat: Sequence[Tensor]) -> list[Tensor]:
        if not (traced() and flat):
            return self._run_now(flat)
        carry, xs, constants = parts(flat, self.carries, self.scanned)
        body, more = self.step.traced([*carry, *[x.new_empty(x.shape[1:]) for x in xs], *constants])
        numbers = self.carries, self.scanned, self.length, self.reverse, self.before
        return _ops.called(_ops.scan, [body], body.name, *numbers, [*flat, *more])

    def _run_now(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Run the body itself; without numbers to trace there is nothing to gain by a graph."""
        numbers = self.carries, self.scanned, self.length, self.reverse, self.before
        carry, columns = _ops.run_scan(lambda inputs: self.step.call(*inputs), *numbers, flat)
        return [*(one.clone() for one in carry), *(torch.stack(column) for column in zip(*columns, strict=True))]

    # The derivatives.

    def saved(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs[self.carries : 2 * self.carries] if self.before else []

    def pullback(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], slopes: Any) -> Sequence[Tensor | None]:
        carry, xs, constants = parts(inputs, self.carries, self.scanned)
        if self.before:
            befores = list(saved)
            of_last, of_befores, of_ys = parts(slopes, self.carries, self.carries)
        else:  # nobody was expected to ask
            outputs = bind(replace(self, before=True), inputs)
            _, befores, _ = parts(outputs, self.carries, self.carries)
            of_last, of_ys = slopes[: self.carries], slopes[self.carries :]
            of_befores = [torch.zeros_like(one) for one in befores]
        ys = [None if one is None else is_smooth(one) for one in of_ys]
        step = self.step
        numbers = self.carries, self.scanned
        n_carry, n_constant = len(smooth(carry)), len(smooth(constants))
        of_befores = [s for s, one in zip(of_befores, befores, strict=True) if is_smooth(one)]
        of_last = [s for s, one in zip(of_last, carry, strict=True) if is_smooth(one)]
        of_ys = [s for s, known in zip(of_ys, ys, strict=True) if known]

        n_before, n_y = (
            len(of_befores),
            len(of_ys),
        )  # what is closed over must not be tensors: they would never be freed

        def back(*flat: Tensor) -> list[Tensor]:
            # The carry: slopes of the carry, and the sums of those of the constants so far.
            of_carry, sums, c, x, of_before, of_y, k = parts(flat, n_carry, n_constant, *numbers, n_before, n_y)
            found = pulled(step, [*c, *x, *k], [*of_carry, *of_y])
            by_carry, by_x, by_constant = parts(found, n_carry, len(found) - n_carry - n_constant)
            if of_before:
                by_carry = [one + other for one, other in zip(by_carry, of_before, strict=True)]
            return [*by_carry, *[one + other for one, other in zip(sums, by_constant, strict=True)], *by_x]

        sums = [torch.zeros_like(one) for one in smooth(constants)]
        sequences = [*befores, *xs, *of_befores, *of_ys]
        levels = Levels([*inputs, *of_last, *of_ys])
        backward = Scan(
            Flat(back),
            n_carry + n_constant,
            len(sequences),
            self.length,
            not self.reverse,
            levels.reverse - 1 > 0 and levels.first != TransformType.Vmap,
        )
        outputs = bind(backward, [*of_last, *sums, *sequences, *constants])
        by_carry, by_constant, rest = parts(outputs, n_carry, n_constant)
        by_x = rest[n_carry + n_constant :] if backward.before else rest
        return [*spread(by_carry, carry), *spread(by_x, xs), *spread(by_constant, constants)]

    def pushforward(self, inputs: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        carry, xs, constants = parts(inputs, self.carries, self.scanned)
        of_carry, of_xs, of_constants = parts(slopes, self.carries, self.scanned)
        dcarry, dxs = zeros_for(carry, of_carry), zeros_for(xs, of_xs)
        dconstants = zeros_for(constants, of_constants)
        step, n = self.step, self.carries
        numbers = n, len(dcarry), len(xs), len(dxs), len(constants)
        kinds: dict[str, list[bool]] = {}

        def dual(*flat: Tensor) -> list[Tensor]:
            c, dc, x, dx, k, dk = parts(flat, *numbers)
            outputs, tangents = pushed(step, [*c, *x, *k], [*dc, *dx, *dk])
            kinds["y"] = [is_smooth(one) for one in outputs[n:]]
            at = numbers[1]
            return [*outputs[:n], *tangents[:at], *outputs[n:], *tangents[at:]]

        pushed_on = Scan(Flat(dual), n + len(dcarry), len(xs) + len(dxs), self.length, self.reverse, before=self.before)
        outputs = bind(pushed_on, [*carry, *dcarry, *xs, *dxs, *constants, *dconstants])
        last, befores, ys = parts(outputs, pushed_on.carries, pushed_on.carries if self.before else 0)
        found = spread(last[n:], carry)
        if self.before:
            found += spread(befores[n:], carry)
        tangents = iter(ys[len(kinds["y"]) :])
        return [*found, *[next(tangents) if smooth_one else None for smooth_one in kinds["y"]]]

    def batched(self, info: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        carry, xs, constants = parts(inputs, self.carries, self.scanned)
        of_carry, of_xs, of_constants = parts(dims, self.carries, self.scanned)
        size = info.batch_size
        carry = [with_batch(t, d, size) for t, d in zip(carry, of_carry, strict=True)]
        xs = [t if d is None else t.movedim(d, 1) for t, d in zip(xs, of_xs, strict=True)]
        constants = [t if d is None else t.movedim(d, 0) for t, d in zip(constants, of_constants, strict=True)]
        inside = [None if d is None else 0 for d in (*of_xs, *of_constants)]
        step = mapped(self.step, [*[0] * self.carries, *inside], info)
        flat = [*carry, *xs, *constants]
        levels = Levels(flat)  # those that are left
        before = self.before or (levels.reverse > 0 and levels.first != TransformType.Vmap)
        outputs = bind(replace(self, step=step, before=before), flat)
        if before and not self.before:
            del outputs[self.carries : 2 * self.carries]
        stacked = len(outputs) - self.carries
        return outputs, [*[0] * self.carries, *[1] * stacked]


def bind_scan(step: Flat, carries: int, scanned: int, length: Any, reverse: bool, flat: Sequence[Tensor]) -> Any:
    """Return the last carry and the results of a scan of flat tensors, under the transforms that there are."""
    levels = Levels(flat)
    before = levels.reverse > 0 and levels.first != TransformType.Vmap
    outputs = bind(Scan(step, carries, scanned, length, reverse, before), flat)
    return outputs[:carries], outputs[2 * carries if before else carries :]
