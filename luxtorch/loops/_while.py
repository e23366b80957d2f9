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
from ._trees import Lifted, Packed, as_passed, check_carry, check_function, check_number, closed_over, is_index

Tree = Any


def while_loop(
    cond: Callable[[Tree], Tensor], body: Callable[[Tree], Tree], init: Tree, *, max_steps: int | None = None
) -> Tree:
    """Repeat a function while a condition holds.

    It is the loop below. Under vmap it runs until no entry of the batch goes on; those that are done stay as they are.

    ```python
    carry = init
    while cond(carry):
        carry = body(carry)
    return carry
    ```

    Inside of `lt.jit` it is one operator. Forward mode and vmap always work; reverse mode does in eager code, and with
    `max_steps`, where memory grows with the square root of that number.

    Args:
        cond: Takes the carry to a boolean tensor without dimensions. It may close over what it likes.
        body: Takes the carry to the next one, of the same structure, shapes and dtypes.
        init: The first carry.
        max_steps: After how many steps the loop ends at the latest, even if the condition still holds.

    Returns:
        The last carry.

    Raises:
        DTypeError: If the condition is no boolean scalar, or if the carry changes its dtype.
        InputError: If the carry changes its structure or shape; without `max_steps`, if reverse mode asks for a
            derivative inside of `lt.jit`, or if a transform of torch.func is around it inside of torch.compile.

    Example:
        >>> import torch, luxtorch as lt
        >>> power = lambda x: lt.while_loop(lambda y: y < 100, lambda y: y * x, x)
        >>> lt.jit(power, backend="replay")(torch.tensor(3.0))
        tensor(243.)
        >>> torch.vmap(power)(torch.tensor([3.0, 50.0, 200.0]))
        tensor([ 243., 2500.,  200.])

    Source: `jax.lax.while_loop`; `equinox.internal.while_loop` for `max_steps`.
    """
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
    originals, closed = closed_over([test, step])
    operator = While(test.flat(originals), step.flat(originals), len(start.tensors))
    return start.tree(bind(operator, [*start.tensors, *closed]))


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
    """Repeat a function for each whole number from one to below another.

    Args:
        lower: The first number, an int or a tensor of one.
        upper: One more than the last. Where both are ints it is a `scan`, else a `while_loop`.
        body: Takes the number, a tensor without dimensions, and the carry to the next carry.
        init: The first carry.

    Returns:
        The last carry.

    Raises:
        DTypeError: If a bound is no whole number. And what `scan` and `while_loop` raise.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.fori_loop(1, 5, lambda i, c: c * i, torch.tensor(1))
        tensor(24)

    Source: `jax.lax.fori_loop`.
    """
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
