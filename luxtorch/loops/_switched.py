"""The rules of a branch and of a loop with a condition: their derivatives and batches are such operators again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced
from luxtorch.core import InputError
from luxtorch.jit._bodies import body_named

from . import _ops
from ._closure import Flat
from ._primitive import (
    REBUILT,
    Operator,
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
class Switch(Operator):
    """One of some bodies, by a number, which is the first of the flat tensors; all bodies take the others.

    Attributes:
        steps: The bodies.
    """

    steps: tuple[Flat, ...]

    def run(self, flat: Sequence[Tensor]) -> list[Tensor]:
        index, *inputs = flat
        if not traced():
            chosen = self.steps[_ops.nearest(index, len(self.steps))]
            return [one.clone() for one in chosen.call(*inputs)]
        found = [step.traced(inputs) for step in self.steps]
        names = " ".join(body.name for body, _ in found)
        more = [one for _, constants in found for one in constants]
        own = [len(constants) for _, constants in found]
        return _ops.called(_ops.switch, [body for body, _ in found], names, own, index, [*inputs, *more])

    def pullback(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], slopes: Any) -> Sequence[Tensor | None]:
        index, *rest = inputs
        of_outputs = [slope for slope in slopes if slope is not None and is_smooth(slope)]
        number = len(of_outputs)

        def back(step: Flat) -> Flat:
            return Flat(lambda *flat: pulled(step, flat[number:], flat[:number]))

        if not smooth(rest):
            return [None] * len(inputs)
        found = bind(Switch(tuple(map(back, self.steps))), [index, *of_outputs, *rest])
        return [None, *spread(found, rest)]

    def pushforward(self, inputs: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        index, *rest = inputs
        tangents = zeros_for(rest, slopes[1:])
        number = len(rest)
        kinds: list[bool] = []

        def dual(step: Flat) -> Flat:
            def call(*flat: Tensor) -> list[Tensor]:
                outputs, found = pushed(step, flat[:number], flat[number:])
                kinds[:] = map(is_smooth, outputs)
                return found

            return Flat(call)

        found = iter(bind(Switch(tuple(map(dual, self.steps))), [index, *rest, *tangents]))
        return [next(found) if kind else None for kind in kinds]

    def batched(self, info: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        index, *rest = [t if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims, strict=True)]
        inside = [None if dim is None else 0 for dim in dims[1:]]
        steps = tuple(mapped(step, inside, info) for step in self.steps)
        if dims[0] is None:
            outputs = bind(Switch(steps), [index, *rest])
        else:
            outputs = selected(index, [step.call(*rest) for step in steps])
        return outputs, [0] * len(outputs)


def selected(index: Tensor, results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return one of some results for each entry of a batch; an index is a number of each entry, or of all."""
    chosen = list(results[-1])
    for place in range(len(results) - 2, -1, -1):
        here = index <= place
        chosen = [
            torch.where(here.reshape(here.shape + (1,) * (one.ndim - here.ndim)), one, other)
            for one, other in zip(results[place], chosen, strict=True)
        ]
    return chosen


@dataclass(frozen=True, eq=False)
class While(Operator):
    """A loop while a condition holds, of flat tensors: the carry, and what stays the same.

    Attributes:
        test: Takes these to a boolean.
        step: Takes these to the next carry.
        carries: How many tensors are the carry.
    """

    test: Flat
    step: Flat
    carries: int

    def run(self, flat: Sequence[Tensor]) -> list[Tensor]:
        (test, of_test), (step, of_step) = self.test.traced(flat), self.step.traced(flat)
        own = [len(of_test), len(of_step)]
        rest = [*flat, *of_test, *of_step]
        return _ops.called(_ops.while_loop, [test, step], test.name, step.name, self.carries, own, rest)

    def pullback(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], slopes: Any) -> Sequence[Tensor | None]:
        raise InputError(
            "A loop of unknown length has no reverse-mode derivative.",
            expected="max_steps, or forward mode",
            got="lt.while_loop(..., max_steps=None) in a gradient",
            fix="Pass max_steps, after which the loop ends at the latest; or take the derivative by lt.pushforward.",
        )

    def pushforward(self, inputs: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        carry, constants = parts(inputs, self.carries)
        of_carry, of_constants = parts(slopes, self.carries)
        dcarry, dconstants = zeros_for(carry, of_carry), zeros_for(constants, of_constants)
        test, step, n = self.test, self.step, self.carries
        numbers = n, len(dcarry), len(constants)

        def dual_test(*flat: Tensor) -> Sequence[Tensor]:
            c, _, k, _ = parts(flat, *numbers)
            return test.call(*c, *k)

        def dual(*flat: Tensor) -> list[Tensor]:
            c, dc, k, dk = parts(flat, *numbers)
            outputs, tangents = pushed(step, [*c, *k], [*dc, *dk])
            return [*outputs, *tangents]

        pushed_on = While(Flat(dual_test), Flat(dual), n + len(dcarry))
        outputs = bind(pushed_on, [*carry, *dcarry, *constants, *dconstants])
        return spread(outputs[n:], carry)

    def batched(self, info: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        n, size = self.carries, info.batch_size
        carry = [with_batch(t, d, size) for t, d in zip(inputs[:n], dims[:n], strict=True)]
        constants = [t if d is None else t.movedim(d, 0) for t, d in zip(inputs[n:], dims[n:], strict=True)]
        inside = [*[0] * n, *[None if d is None else 0 for d in dims[n:]]]
        test, step = mapped(self.test, inside, info), mapped(self.step, inside, info)

        # The last of the carry tells which entries of the batch go on.
        def any_goes_on(*flat: Tensor) -> list[Tensor]:
            return [flat[n].any()]

        def all_go_on(*flat: Tensor) -> list[Tensor]:
            c, (active,), k = parts(flat, n, 1)
            after = selected(active, [c, step.call(*c, *k)])
            return [*after, active & test.call(*after, *k)[0]]

        active = test.call(*carry, *constants)[0]
        outputs = bind(While(Flat(any_goes_on), Flat(all_go_on), n + 1), [*carry, active, *constants])
        return outputs[:n], [0] * n


def _share(body: str, place: int, own: Sequence[int]) -> Flat:
    """Return a body that takes, of the tensors that all bodies take, its own."""
    call = interpreted(body_named(body).graph)

    def of_all(*flat: Tensor) -> list[Tensor]:
        return call(*_ops.shares(list(flat), own)[place])

    return Flat(of_all)


def _rebuilt_switch(bodies: str, own: Sequence[int], index: Tensor, flat: Sequence[Tensor]) -> list[Tensor]:
    steps = tuple(_share(body, place, own) for place, body in enumerate(bodies.split()))
    return bind(Switch(steps), [index, *flat])


def _rebuilt_while(condition: str, body: str, carries: int, own: Sequence[int], flat: Sequence[Tensor]) -> list[Tensor]:
    return bind(While(_share(condition, 0, own), _share(body, 1, own), carries), flat)


for _operator, _rebuilt in (
    (torch.ops.luxtorch.switch.default, _rebuilt_switch),
    (torch.ops.luxtorch.while_loop.default, _rebuilt_while),
):
    REBUILT[_operator] = REBUILT[_ops.WITH_EFFECTS[_operator]] = _rebuilt
