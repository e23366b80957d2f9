"""The operators at the bottom: they call their bodies, which are graphs of their own, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import storage_id
from luxtorch.jit._bodies import CALLERS, Body, body_named, hold, keep

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
    with _threads(found):
        carry, columns = run_scan(found.program, carries, scanned, length, reverse, before, flat)
    if length:
        stacked = [torch.stack(column) for column in zip(*columns, strict=True)]
    else:
        outputs = found.outputs
        stacked = [_new(flat, one, 0) for one in (*(outputs[:carries] if before else ()), *outputs[carries:])]
    return [*_own(carry, flat), *stacked]


@scan.register_fake
def _(
    body: str, carries: int, scanned: int, length: int, reverse: bool, before: bool, flat: list[Tensor]
) -> list[Tensor]:
    outputs = _kept(body).outputs
    many = [*(outputs[:carries] if before else ()), *outputs[carries:]]
    return [*[_new(flat, one) for one in outputs[:carries]], *[_new(flat, one, length) for one in many]]


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
    outputs = operator(*args)
    hold(_DEFAULTS[operator], bodies)
    return list(outputs)


CALLERS[torch.ops.luxtorch.scan.default] = (0,)
CALLERS[torch.ops.luxtorch.while_loop.default] = (0, 1)
CALLERS[torch.ops.luxtorch.switch.default] = (0,)


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


def _own(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return tensors in memory of their own: those that are the inputs, or one another, as copies."""
    seen = set(map(storage_id, inputs))
    own = []
    for tensor in outputs:
        memory = storage_id(tensor)
        own.append(tensor.clone() if memory in seen else tensor)
        seen.add(memory)
    return own
