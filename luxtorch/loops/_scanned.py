"""The rules of a scan: its derivatives and its batch are scans of derived bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luxtorch._torch import TransformType
from luxtorch._transforms import traced
from luxtorch.jit._bodies import body_named

from . import _ops
from ._closure import Flat
from ._primitive import (
    REBUILT,
    Levels,
    Operator,
    SmoothPart,
    bind,
    interpreted,
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
        results: What the results of one step are like, if reverse mode is to save what it needs of each step, and not
            the carry alone.
    """

    step: Flat
    carries: int
    scanned: int
    length: Any
    reverse: bool
    before: bool = False
    results: tuple[Like, ...] | None = None

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
        results = (
            None if self.results is None else tuple(one._replace(shape=(size, *one.shape)) for one in self.results)
        )
        scan = replace(self, step=step, results=results)
        flat = [*carry, *xs, *constants]
        outputs = bind(scan, flat) if self.before else bind_scan(scan, flat)
        return outputs, [*[0] * self.carries, *[1] * (len(outputs) - self.carries)]


class Like(NamedTuple):
    """What a tensor is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """Return what a tensor is like."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    @property
    def smooth(self) -> bool:
        """Whether it can have a derivative."""
        return self.dtype.is_floating_point or self.dtype.is_complex


def bind_scan(scan: Scan, flat: Sequence[Tensor]) -> list[Tensor]:
    """Return the last carry and the results of a scan, under the transforms that there are."""
    levels = Levels(flat)
    if not levels.reverse or levels.first == TransformType.Vmap:
        return bind(scan, flat)
    if scan.results is not None and traced() and levels.reverse == 1 and not levels.forward:
        saving = saving_scan(scan, flat)
        if saving is not None:
            return bind(saving, [*flat, *saving.parts.constants])[: scan.carries + len(scan.results)]
    outputs = bind(replace(scan, before=True), flat)
    return [*outputs[: scan.carries], *outputs[2 * scan.carries :]]


# Scans whose backward pass has all that it needs.


@dataclass(frozen=True, eq=False)
class Saving(Scan):
    """A scan that also returns what its derivative needs of each step; that is right for one derivative.

    Attributes:
        parts: The body, and its derivative.
        plain: The scan itself.
    """

    parts: Any = None
    plain: Any = None

    def saved(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs[self.carries + len(self.plain.results) :]

    def constant_outputs(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        first = outputs[: self.carries + len(self.plain.results)]
        return [*super().constant_outputs(first), *self.saved(outputs)]

    def pullback(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], slopes: Any) -> Sequence[Tensor | None]:
        flat, more = (
            inputs[: len(inputs) - len(self.parts.constants)],
            inputs[len(inputs) - len(self.parts.constants) :],
        )
        carry, xs, constants = parts(flat, self.carries, self.scanned)
        last, ys, _ = parts(slopes, self.carries, len(self.plain.results))
        of_last = [slope for slope, one in zip(last, carry, strict=True) if is_smooth(one)]
        of_ys = [slope for slope, one in zip(ys, self.plain.results, strict=True) if one.smooth]
        at = self.carries, self.carries + self.scanned
        xs_again = [flat[i] for i in self.parts.again if i < at[1]]
        constants_again = [flat[i] for i in self.parts.again if i >= at[1]]
        sums = [torch.zeros_like(one) for one in smooth(constants)]
        numbers = len(of_last), len(sums), len(saved), len(xs_again), len(of_ys)
        backward = self.parts.backward

        def back(*flat: Tensor) -> list[Tensor]:
            of_carry, sums, kept, x, of_y, k = parts(flat, *numbers)
            found = backward(*of_carry, *of_y, *kept, *x, *k)
            by_carry, by_x, by_constant = parts(found, numbers[0], len(found) - numbers[0] - numbers[1])
            return [*by_carry, *[one + other for one, other in zip(sums, by_constant, strict=True)], *by_x]

        sequences = [*saved, *xs_again, *of_ys]
        operands = [*of_last, *sums, *sequences, *constants_again, *more]
        scan = Scan(Flat(back), numbers[0] + numbers[1], len(sequences), self.length, not self.reverse)
        outputs = bind(Backward(scan, self.plain, numbers, len(operands)), [*operands, *flat])
        by_carry, by_constant, by_x = parts(outputs, numbers[0], numbers[1])
        return [*spread(by_carry, carry), *spread(by_x, xs), *spread(by_constant, constants), *[None] * len(more)]

    def batched(self, info: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        return Scan(self.step, self.carries, self.scanned, self.length, self.reverse).batched(info, dims, inputs)


@dataclass(frozen=True, eq=False)
class Backward(Operator):
    """The backward pass of a scan that has saved what it needs; it is differentiated again as that of one that has not.

    Attributes:
        scan: The backward pass.
        plain: The scan of which it is the derivative.
        numbers: How many tensors are the slopes of the carry, the sums, what was saved, the sequences, the slopes of
            the results.
        operands: How many tensors the backward pass takes; after these come those that the scan took.
    """

    scan: Scan
    plain: Scan
    numbers: tuple[int, ...]
    operands: int

    def run(self, flat: Sequence[Tensor]) -> list[Tensor]:
        return self.scan.run(flat[: self.operands])

    def pullback(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], slopes: Any) -> Sequence[Tensor | None]:
        operands, flat = inputs[: self.operands], inputs[self.operands :]
        of_carry, sums, kept, x, of_y, rest = parts(operands, *self.numbers)
        plain, carries = self.plain, self.plain.carries
        number = len(of_carry)

        def again(*args: Tensor) -> list[Tensor]:
            last, ys, flat = parts(args, number, len(of_y))
            results = plain.results or ()
            of_ys = iter(ys)
            of_outputs = [*spread(last, flat[:carries]), *[next(of_ys) if one.smooth else None for one in results]]
            by_carry, by_x, by_constant = parts(plain.pullback(flat, [], of_outputs), carries, plain.scanned)
            return [one for one in (*by_carry, *by_constant, *by_x) if one is not None]

        found = pulled(Flat(again), [*of_carry, *of_y, *flat], smooth(slopes))
        first, then, last = parts(found, number, len(of_y))
        unused = [None] * (len(kept) + len(x))
        return [*first, *[None] * len(sums), *unused, *then, *[None] * len(rest), *spread(last, flat)]

    def pushforward(self, inputs: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        # It is not under forward mode that something was saved, so that has no tangents.
        return self.scan.pushforward(inputs[: self.operands], slopes[: self.operands])

    def batched(self, info: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        return self.scan.batched(info, dims[: self.operands], inputs[: self.operands])


def saving_scan(scan: Scan, flat: Sequence[Tensor]) -> Saving | None:
    """Return the scan that saves what its derivative needs; None if there is none."""
    n, results = len(flat), scan.results or ()
    carry, xs, constants = parts(flat, scan.carries, scan.scanned)
    like = [*carry, *[Like(tuple(x.shape[1:]), x.dtype, x.device) for x in xs], *constants]
    of_results = [*[Like.of(one) for one in smooth(carry)], *[one for one in results if one.smooth]]
    if not smooth(flat) or not of_results:
        return None
    step = scan.step

    def joint(*tensors: Tensor) -> list[Tensor]:
        part = SmoothPart(step, tensors[:n])
        transform: Any = torch.func.vjp
        found, back, rest = transform(part, *part.inputs, has_aux=True)
        return [*part.joined(found, rest), *back(tuple(tensors[n:]))]

    found = scan.step.split(joint, [*like, *of_results], n, scan.carries + len(results), range(scan.carries, n))
    if found is None:
        return None
    found = replace(found, forward=interpreted(found.forward), backward=interpreted(found.backward))
    return Saving(Flat(found.forward), scan.carries, scan.scanned, scan.length, scan.reverse, parts=found, plain=scan)


def _rebuilt(
    body: str, carries: int, scanned: int, length: Any, reverse: bool, before: bool, flat: Sequence[Tensor]
) -> list[Tensor]:
    step = Flat(interpreted(body_named(body).graph))
    return bind(Scan(step, carries, scanned, length, reverse, before), flat)


_SCAN = torch.ops.luxtorch.scan.default
REBUILT[_SCAN] = REBUILT[_ops.WITH_EFFECTS[_SCAN]] = _rebuilt
