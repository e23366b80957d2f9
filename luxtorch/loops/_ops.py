"""The operators at the bottom: they call their bodies, which are graphs of their own, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from luxtorch._torch import storage_id
from luxtorch.jit._bodies import CALLERS, FORMS, Body, body_named, hold, keep
from luxtorch.jit._effects import has_effects, register_effect

from ._primitive import parts

Step = Callable[[list[Tensor]], Sequence[Tensor]]


def run_scan(
    step: Step, carries: int, scanned: int, length: int, reverse: bool, before: bool, flat: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the last carry, and for each step what is to be stacked: the carry before it if asked for, the rest."""
    carry, constants = list(flat[:carries]), flat[carries + scanned :]
    rows = [tensor.unbind(0) for tensor in flat[carries : carries + scanned]]
    columns: list[list[Tensor]] = []
    for i in range(length - 1, -1, -1) if reverse else range(length):
        out = step([*carry, *[row[i] for row in rows], *constants])
        columns.append([*carry, *out[carries:]] if before else list(out[carries:]))
        carry = list(out[:carries])
    if reverse:
        columns.reverse()
    return carry, columns


@dataclass(frozen=True)
class ByNumber:
    """The compiled form of a scan's body: it takes the number of the step, and reads and writes whole sequences there.

    A row or a result of a step would be a tensor of Python, which takes a microsecond or more to make.

    Attributes:
        carries: How many tensors are the carry.
        scanned: How many are sequences.
        before: Whether the carry before each step is stacked as well.
    """

    carries: int
    scanned: int
    before: bool

    def __call__(self, body: Body, graph: fx.GraphModule) -> tuple[Callable[..., list[Tensor]], list[Any]]:
        n, many = self.carries, _stacked(body.outputs, self.carries, self.before)

        def step(number: int, *flat: Tensor) -> list[Tensor]:
            carry, xs, constants, ys = parts(flat, n, self.scanned, len(flat) - n - self.scanned - len(many))
            out = graph(*carry, *(x.select(0, number) for x in xs), *constants)
            for y, one in zip(ys, _stacked([*carry, *out[n:]], n, self.before), strict=True):
                y.select(0, number).copy_(one)
            return list(out[:n])

        carry, xs, constants = parts(body.fakes, n, self.scanned)
        like = [torch.empty(())]
        flat = [
            *(_new(like, one) for one in carry),
            *(_new(like, one, _LONG) for one in xs),
            *(_new(like, one) for one in constants),
            *(_new(like, one, _LONG) for one in many),
        ]
        return step, [_NUMBER, *flat]


# No step reads the length, so the program is for every one. A number above one is a symbol to torch.
_LONG, _NUMBER = 2**31, 2


@torch.library.custom_op("luxtorch::scan", mutates_args=())
def scan(
    body: str, carries: int, scanned: int, length: int, reverse: bool, before: bool, flat: list[Tensor]
) -> list[Tensor]:
    """Run a scan.

    Args:
        body: Takes the carry, the elements, and what stays the same, to the next carry and the results.
        carries: How many tensors are the carry.
        scanned: How many are sequences.
        length: How many steps.
        reverse: Whether the last element comes first.
        before: Whether the carry before each step is returned as well.
        flat: The carry, the sequences, and what stays the same.

    Returns:
        The last carry, the carries before each step if asked for, and the results of each step.
    """
    found = body_named(body)
    flat = [tensor.contiguous() for tensor in flat]
    carry: Sequence[Tensor] = flat[:carries]
    with _threads(found):
        if found.form is None and length:
            carry, columns = run_scan(found.program, carries, scanned, length, reverse, before, flat)
            stacked = [torch.stack(column) for column in zip(*columns, strict=True)]
        else:
            stacked = [_new(flat, one, length) for one in _stacked(found.outputs, carries, before)]
            rest = [*flat[carries:], *stacked]
            for number in range(length - 1, -1, -1) if reverse else range(length):
                carry = found.program([number, *carry, *rest])
    return [*_own(carry, flat), *stacked]


@scan.register_fake
def _(
    body: str, carries: int, scanned: int, length: int, reverse: bool, before: bool, flat: list[Tensor]
) -> list[Tensor]:
    outputs = _kept(body).outputs
    many = _stacked(outputs, carries, before)
    return [*[_new(flat, one) for one in outputs[:carries]], *[_new(flat, one, length) for one in many]]


def _stacked(outputs: Sequence[Tensor], carries: int, before: bool) -> list[Tensor]:
    """Return those of the outputs of a step that are stacked; the carry before is like that after it."""
    return [*(outputs[:carries] if before else ()), *outputs[carries:]]


FORMS[torch.ops.luxtorch.scan.default] = lambda args: ByNumber(args[1], args[2], args[5])


@torch.library.custom_op("luxtorch::while_loop", mutates_args=())
def while_loop(condition: str, body: str, carries: int, own: list[int], flat: list[Tensor]) -> list[Tensor]:
    """Run a loop while a condition holds.

    Args:
        condition: Takes the carry, and what stays the same, to a boolean.
        body: Takes these to the next carry.
        carries: How many tensors are the carry.
        own: How many of the last tensors only the condition takes, and how many only the body.
        flat: The carry, and what stays the same.

    Returns:
        The last carry.
    """
    test, step = body_named(condition).program, body_named(body).program
    flat = [tensor.contiguous() for tensor in flat]
    carry, (of_test, of_step) = flat[:carries], shares(flat[carries:], own)
    with _threads(body_named(body)):
        while test([*carry, *of_test])[0].item():
            carry = list(step([*carry, *of_step]))
    return _own(carry, flat)


@while_loop.register_fake
def _(condition: str, body: str, carries: int, own: list[int], flat: list[Tensor]) -> list[Tensor]:
    _kept(condition)
    return [_new(flat, one) for one in _kept(body).outputs]


@torch.library.custom_op("luxtorch::switch", mutates_args=())
def switch(bodies: str, own: list[int], index: Tensor, flat: list[Tensor]) -> list[Tensor]:
    """Run one of some bodies, which return tensors of the same shapes.

    Args:
        bodies: Their names, with spaces between.
        own: How many of the last tensors only each of them takes.
        index: Which is run, a number; the first or last where it is too small or too large.
        flat: What they take.
    """
    names = bodies.split()
    at = nearest(index, len(names))
    chosen = body_named(names[at])
    flat = [tensor.contiguous() for tensor in flat]
    with _threads(chosen):
        return _own(list(chosen.program(list(shares(flat, own)[at]))), flat)


@switch.register_fake
def _(bodies: str, own: list[int], index: Tensor, flat: list[Tensor]) -> list[Tensor]:
    first, *_ = [_kept(body) for body in bodies.split()]
    return [index.new_empty(one.shape, dtype=one.dtype, device=one.device) for one in first.outputs]


_DEFAULTS: dict[Any, Any] = {
    scan: torch.ops.luxtorch.scan.default,
    while_loop: torch.ops.luxtorch.while_loop.default,
    switch: torch.ops.luxtorch.switch.default,
}


def called(operator: Callable[..., list[Tensor]], bodies: Sequence[Body], *args: Any) -> list[Tensor]:
    """Call an operator, and let its bodies live as long as the graph that the call is recorded in."""
    default = _DEFAULTS[operator]
    if any(has_effects(body.graph) for body in bodies):
        default = WITH_EFFECTS[default]
    outputs = default(*args)
    hold(default, bodies)
    return list(outputs)


CALLERS[torch.ops.luxtorch.scan.default] = (0,)
CALLERS[torch.ops.luxtorch.while_loop.default] = (0, 1)
CALLERS[torch.ops.luxtorch.switch.default] = (0,)


def _with_effects(operator: Any) -> Any:
    """Return the operator that does the same of bodies that have effects."""
    name, schema = f"{operator._schema.name}_with_effects", str(operator._schema)
    twin = torch.library.custom_op(
        name, lambda *args: operator(*args), mutates_args=(), schema=schema[schema.index("(") :]
    )
    twin.register_fake(lambda *args: operator(*args))
    default = getattr(torch.ops.luxtorch, name.removeprefix("luxtorch::")).default
    register_effect(default)
    CALLERS[default] = CALLERS[operator]
    if operator in FORMS:
        FORMS[default] = FORMS[operator]
    return default


WITH_EFFECTS = {operator: _with_effects(operator) for operator in _DEFAULTS.values()}
"""The operators for bodies with effects, which run whether or not what they return is used."""


def nearest(index: int | Tensor, number: int) -> int:
    """Return which of a number of things an index means: the first or last where it is too small or too large."""
    return min(max(int(index), 0), number - 1)


def shares(flat: list[Tensor], own: Sequence[int]) -> list[list[Tensor]]:
    """Return what each of several bodies takes: what all take, and its own."""
    at = len(flat) - sum(own)
    common, shares = flat[:at], []
    for number in own:
        shares.append([*common, *flat[at : at + number]])
        at += number
    return shares


@contextlib.contextmanager
def _threads(body: Body) -> Iterator[None]:
    """Let torch work on one thread where a body is faster so."""
    threads = torch.get_num_threads()
    if not body.small or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _kept(name: str) -> Body:
    body = body_named(name)
    keep(body)  # for whoever traces a call of it
    return body


def _new(flat: list[Tensor], like: Tensor, *length: int) -> Tensor:
    return flat[0].new_empty((*length, *like.shape), dtype=like.dtype, device=like.device)


def _own(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in memory of their own: those that are the inputs, or one another, as copies."""
    seen = set(map(storage_id, inputs))
    own = []
    for tensor in outputs:
        memory = storage_id(tensor)
        own.append(tensor.clone() if memory in seen else tensor)
        seen.add(memory)
    return own
