"""Inside of torch.compile and torch.export: torch's own operators for loops and branches, where they can do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, torch_cond, torch_scan, torch_while_loop
from luxtorch._transforms import transform_level
from luxtorch.core import InputError, map_tensors

from ._primitive import is_smooth
from ._trees import Packed

Tree = Any


def scan(f: Any, init: Tree, xs: Tree, n: Any, reverse: bool) -> tuple[Tree, Tree] | None:
    """Return what a scan returns, or None where torch's own cannot do it."""
    start, sequences = Packed(init), Packed(xs)
    if transform_level() or not start.tensors or n == 0:
        return None
    if torch.is_grad_enabled() and not all(map(is_smooth, [*start.tensors, *sequences.tensors])):
        return None  # torch's has no derivative then

    def step(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], Tree]:
        after, y = f(start.tree(carry), sequences.tree(x[1:]))
        # What comes out may not be what went in, nor twice the same.
        return [one.clone() for one in Packed(after).tensors], map_tensors(torch.clone, y)

    numbers = torch.arange(n)  # for scans over nothing
    try:
        last, ys = torch_scan(step, start.tensors, [numbers, *sequences.tensors], reverse=reverse)
    except RuntimeError:
        if torch.compiler.is_dynamo_compiling():
            raise
        return None  # torch.export fails where the body closes over a constant
    return start.tree(last), ys


@compile_constant
def _refuse() -> None:
    raise InputError(
        "Inside of torch.compile, a loop of unknown length cannot be transformed.",
        expected="max_steps, or no transform of torch.func around the loop",
        fix="Pass max_steps, or compile by lt.jit.",
    )


def while_loop(condition: Any, body: Any, init: Tree) -> Tree:
    """Return what a loop with a condition returns.

    Raises:
        InputError: If transforms surround it, of which torch's own knows none.
    """
    if transform_level():
        _refuse()
    start = Packed(init)

    def test(*carry: Tensor) -> Tensor:
        return condition(start.tree(carry))  # type: ignore[no-any-return]

    def step(*carry: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.clone() for one in Packed(body(start.tree(carry))).tensors)

    return start.tree(torch_while_loop(test, step, tuple(start.tensors)))


def cond(pred: Tensor, true: Any, false: Any, operands: tuple[Tree, ...]) -> Tree:
    """Return what a branch returns."""
    given = Packed(operands)

    def branch(f: Any) -> Any:
        return lambda *tensors: map_tensors(torch.clone, f(*given.tree(tensors)))

    return torch_cond(pred, branch(true), branch(false), tuple(given.tensors))
