"""`cond`, `switch`, `while_loop` and `fori_loop`: which branch, or how many steps, tensors may decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced, transform_level, unwrapped, vmap_levels
from luxtorch.core import DTypeError, InputError, described, out_of_range, tensors, wrong_type
from luxtorch.core._sharded import is_sharded
from luxtorch.core._tree import named_leaves

from . import _compiler
from ._closure import current, is_constant
from ._ops import nearest
from ._primitive import bind
from ._scan import scan
from ._switched import Switch, While, selected
from ._trees import Lifted, Packed, as_passed, check_carry, check_function, check_number, closed_over, is_index

Tree = Any


def cond(pred: bool | Tensor, true: Callable[..., Tree], false: Callable[..., Tree], *operands: Tree) -> Tree:
    """Return what one of two functions returns, by the value of a boolean.

    In eager code it is an `if`. Inside of `lt.jit` both are traced, and one is run at each call. In a batch of
    predicates, under vmap, both are run and the results selected, so a derivative that is not finite in the one that is
    not chosen makes that of both not finite.

    Args:
        pred: A bool, or a boolean tensor without dimensions.
        true: Called with the operands if it is true. It may close over what it likes.
        false: Called with the operands if it is false; it returns a tree of the same structure, shapes and dtypes.
        operands: Any trees.

    Returns:
        What the function returns.

    Raises:
        DTypeError: If the predicate is no boolean scalar, or if both return other dtypes, where both are run or traced.
        InputError: If both return other structures or shapes there.
        TracingError: If a function writes into what it closes over, inside of `lt.jit`.

    Example:
        >>> import torch, luxtorch as lt
        >>> halve = lambda x: lt.cond(x.sum() > 10, lambda x: x / 2, lambda x: x, x)
        >>> lt.jit(halve, backend="replay")(torch.tensor([8.0, 4.0]))
        tensor([4., 2.])
        >>> torch.vmap(halve)(torch.tensor([[8.0, 4.0], [1.0, 2.0]]))
        tensor([[4., 2.],
                [1., 2.]])

    Source: `jax.lax.cond`; `torch.cond`.
    """
    if torch.compiler.is_compiling():
        if not isinstance(pred, Tensor):
            return true(*operands) if pred else false(*operands)
        return _compiled(pred.logical_not().to(torch.int64), (true, false), operands)
    check_function("true", true)
    check_function("false", false)
    if isinstance(pred, (bool, torch.SymBool)):
        return true(*operands) if pred else false(*operands)
    check_condition("pred", pred)
    return _branch(pred, (false, true), ("false", "true"), operands)


def switch(index: int | Tensor, branches: Sequence[Callable[..., Tree]], *operands: Tree) -> Tree:
    """Return what one of several functions returns, by a number.

    It is `cond` for more than two: see there for what is run.

    Args:
        index: The number of the function, an int or a tensor of one; the first or the last if it is too small or large.
        branches: The functions. They may close over what they like.
        operands: What they are called with, any trees.

    Returns:
        What the function returns.

    Raises:
        DTypeError: If the index is no whole number, or if functions return other dtypes where all are run or traced.
        InputError: If there is no function, or if they return other structures or shapes there.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.switch(torch.tensor(1), [torch.sin, torch.neg, torch.exp], torch.ones(2))
        tensor([-1., -1.])

    Source: `jax.lax.switch`.
    """
    if torch.compiler.is_compiling():
        if not isinstance(index, Tensor):
            return branches[nearest(index, len(branches))](*operands)
        return _compiled(index.to(torch.int64), branches, operands)
    if callable(branches) or not branches:
        raise out_of_range("branches", branches, "a sequence of functions, at least one")
    for place, branch in enumerate(branches):
        check_function(f"branches[{place}]", branch)
    if is_index(index):
        return branches[nearest(index, len(branches))](*operands)
    if not isinstance(index, Tensor) or index.ndim or index.is_floating_point() or index.is_complex():
        raise wrong_type("index", index, "a whole number, or a tensor of one, without dimensions")
    return _branch(index, branches, [f"branches[{place}]" for place in range(len(branches))], operands)


def check_condition(name: str, value: Any) -> None:
    """Raise if a value is not a boolean tensor without dimensions."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim:
        raise wrong_type(
            name,
            value,
            "a boolean scalar, such as x.sum() > 0",
            fix="Reduce it by .all() or .any(); for one choice for each element there is torch.where.",
        )


def _branch(index: Tensor, branches: Sequence[Any], names: Sequence[str], operands: tuple[Tree, ...]) -> Tree:
    index = current(index)
    sharded = is_sharded(index)
    if not vmap_levels(index) and (not traced() or (is_constant(index) and not sharded)):
        return branches[nearest(index, len(branches))](*operands)
    operands = as_passed(operands)
    if not traced() or sharded:
        results = [branch(*operands) for branch in branches]
        check_results(results, names)
        packed = [Packed(result) for result in results]
        return packed[0].tree(selected(index, [one.tensors for one in packed]))
    bodies = [Lifted(branch, operands) for branch in branches]
    check_results([body.result for body in bodies], names)
    originals, closed = closed_over(bodies)
    steps = tuple(body.flat(originals) for body in bodies)
    flat = [index, *Packed(operands).tensors, *closed]
    return Packed(bodies[0].result).tree(bind(Switch(steps), flat))


def _compiled(index: Tensor, branches: Sequence[Any], operands: tuple[Tree, ...]) -> Tree:
    """Branch inside of torch.compile: by torch's own operator, or else run all branches and select."""
    first, *others = branches
    if len(branches) == 1:
        return first(*operands)
    if not transform_level():

        def rest(*operands: Tree) -> Tree:
            return _compiled(index - 1, others, operands) if len(others) > 1 else others[0](*operands)

        return _compiler.cond(index <= 0, first, rest, operands)
    results = [Packed(branch(*operands)) for branch in branches]
    return results[0].tree(selected(index, [one.tensors for one in results]))


def check_results(results: Sequence[Tree], names: Sequence[str]) -> None:
    """Raise, with the leaf's name, if branches return other structures, shapes or dtypes."""
    first = Packed(results[0])
    for result, name in zip(results[1:], names[1:], strict=True):
        if Packed(result).spec != first.spec:
            raise InputError(
                "All branches must return one structure.",
                expected=f"{described(results[0])}, as {names[0]} returns",
                got=f"{described(result)} from {name}",
            )
        for (leaf, one), (_, other) in zip(named_leaves(results[0]), named_leaves(result), strict=True):
            place = f"result.{leaf}" if leaf else "result"
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                agree = one.shape == other.shape and one.dtype == other.dtype
            else:
                agree = type(one) is type(other) and bool(one == other)
            if not agree:
                error = DTypeError if isinstance(one, Tensor) and one.shape == other.shape else InputError
                raise error(
                    "All branches must return tensors of one shape and dtype, and else the same.",
                    expected=f"{described(one)} for {place}, as {names[0]} returns",
                    got=f"{described(other)} from {name}",
                )


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
