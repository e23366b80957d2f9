"""`while_loop` and `fori_loop`: loops whose length tensors may decide."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced, unwrapped, vmap_levels
from luxtorch.core import tensors, wrong_type

from . import _compiler
from ._branches import check_condition, cond
from ._primitive import bind
from ._scan import scan
from ._switched import While, selected
from ._trees import Lifted, Packed, as_passed, check_carry, check_function, check_number, is_index

Tree = Any


def while_loop(
    cond: Callable[[Tree], Tensor], body: Callable[[Tree], Tree], init: Tree, *, max_steps: int | None = None
) -> Tree:
    check_function("cond", cond)
    check_function("body", body)
    if max_steps is not None:
        check_number("max_steps", max_steps, 0)
    if torch.compiler.is_compiling():
        return _compiler.while_loop(cond, body, init) if max_steps is None else _limited(cond, body, init, max_steps)
    init = as_passed(init)
    if not traced():
        return _loop(cond, body, init, max_steps)
    if max_steps is not None:
        return _limited(cond, body, init, max_steps)
    return _staged(cond, body, init)


def _loop(condition: Any, body: Any, init: Tree, max_steps: int | None) -> Tree:
    """Run the loop of Python; where there is a batch of conditions, until the last does not hold."""
    carry, active, steps = init, None, 0
    while max_steps is None or steps < max_steps:
        holds = _checked(condition(carry))
        active = holds if active is None else active & holds
        batch = bool(vmap_levels(active))
        if not bool(unwrapped(active).any() if batch else active):
            break
        after = body(carry)
        check_carry(carry, after)
        if batch:
            one, other = Packed(carry), Packed(after)
            after = other.tree(selected(active, [one.tensors, other.tensors]))
        carry, steps = after, steps + 1
    return carry


def _checked(holds: Any) -> Tensor:
    check_condition("What cond returns", holds)
    return holds  # type: ignore[no-any-return]


def _staged(condition: Any, body: Any, init: Tree) -> Tree:
    """Run the loop as one operator, whose bodies are traced once."""
    test, step = Lifted(condition, (init,)), Lifted(body, (init,))
    _checked(test.result)
    check_carry(init, step.result)
    start = Packed(init)
    pairs = [*zip(test.originals, test.closed, strict=True), *zip(step.originals, step.closed, strict=True)]
    closed = {id(original): (original, here) for original, here in pairs}
    originals = [original for original, _ in closed.values()]
    operator = While(
        test.flat(originals), step.flat(originals), len(start.tensors)
    )
    return start.tree(bind(operator, [*start.tensors, *[here for _, here in closed.values()]]))


def _limited(condition: Any, body: Any, init: Tree, max_steps: int) -> Tree:
    """Run a loop of at most so many steps, of which those that are not needed do nothing."""

    def step(state: tuple[Tensor, Tree], _: None) -> tuple[tuple[Tensor, Tree], None]:
        active, carry = state
        active = active & _checked(condition(carry))

        def checked(carry: Tree) -> Tree:
            after = body(carry)
            check_carry(carry, after)
            return after

        if torch.compiler.is_compiling():  # torch's scan has no derivative where a branch is in it
            after = checked(carry)
            after = Packed(after).tree(selected(active, [Packed(carry).tensors, Packed(after).tensors]))
        else:
            after = cond(active, checked, lambda carry: carry, carry)
        return (active, after), None

    given = tensors(init)
    start = torch.ones((), dtype=torch.bool, device=given[0].device if given else None)
    (_, carry), _ = scan(step, (start, init), None, max_steps, checkpoint=max(isqrt(max_steps), 1))
    return carry


def fori_loop(lower: Any, upper: Any, body: Callable[[Tensor, Tree], Tree], init: Tree) -> Tree:
    check_function("body", body)
    given = tensors(init)
    device = given[0].device if given else None
    if is_index(lower) and is_index(upper):
        numbers = torch.arange(lower, max(lower, upper), device=device)
        return scan(lambda carry, i: (body(i, carry), None), init, numbers)[0]
    for name, bound in (("lower", lower), ("upper", upper)):
        whole = isinstance(bound, Tensor) and not (bound.ndim or bound.is_floating_point() or bound.is_complex())
        if not (is_index(bound) or whole):
            raise wrong_type(name, bound, "a whole number, or a tensor of one, without dimensions")
    first, last = (torch.as_tensor(bound, dtype=torch.int64, device=device) for bound in (lower, upper))
    _, carry = while_loop(
        lambda state: state[0] < last, lambda state: (state[0] + 1, body(state[0], state[1])), (first, init)
    )
    return carry
