"""`scan` and `fori_loop`: loops over the elements of tensors that carry something along."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from luxtorch._transforms import traced
from luxtorch.core import map_tensors, tensors
from luxtorch.core._sharded import is_sharded
from luxtorch.core._tree import tree_map

from . import _compiler
from ._scanned import Like, Scan, bind_scan
from ._trees import (
    Lifted,
    Packed,
    as_passed,
    check_carry,
    check_function,
    check_number,
    check_results,
    joined,
    length_of,
    pair_of,
)

Tree = Any
_Runner = Callable[..., tuple[Tree, Tree]]
_BODY = "The function of a scan"


def scan(
    f: Callable[[Tree, Tree], tuple[Tree, Tree]],
    init: Tree,
    xs: Tree = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    unroll: int = 1,
    checkpoint: bool | int = False,
) -> tuple[Tree, Tree]:
    """Carry something along a sequence, and stack what each step returns.

    It is the loop below, with trees for tensors, and `f` may close over what it likes: parameters, states, keys.

    ```python
    carry, ys = init, []
    for x in xs:
        carry, y = f(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)
    ```

    In eager code it is this loop: prints, breakpoints and the tape work as ever. Inside of `lt.jit` it is one operator,
    whose body is traced and compiled once, however long the sequence is; so are its derivatives by reverse and forward
    mode, and its batches. One derivative by reverse mode saves what it needs of each step. Derivatives of derivatives
    save the carry before each step, and compute the step again from there.

    Over sharded tensors the loop unrolls.

    Inside of torch.compile and torch.export it is torch's own `scan`; that has no rules for the transforms of
    torch.func, nor derivatives with integers in the carry or the sequence, so there, and where gradients could be
    recorded of such, the loop unrolls.

    Args:
        f: Takes the carry and the elements of one step to the next carry, of the same structure, shapes and dtypes, and
            to the result of the step, tensors or None. Called with tensors that have no numbers inside of `lt.jit`.
        init: The first carry.
        xs: The tensors of this tree are scanned along their first dimension; other leaves are passed to each step.
        length: How many steps; needed if there is no tensor in `xs`.
        reverse: Whether to begin with the last element. The results stay in the order of the elements.
        unroll: How many steps are one body of the operator: a larger body to compile, less to do between steps.
        checkpoint: Less memory for reverse mode: by True, nothing but the carries is saved, and each step is computed
            again; by a number k, only each k-th of them, and k steps at once are computed again.

    Returns:
        The last carry, and the results of all steps, stacked.

    Raises:
        InputError: If the carry changes its structure or shape, if lengths differ, or if there is none.
        DTypeError: If the carry changes its dtype, or if what changes in it is no tensor; if a result is no tensor.
        TracingError: If the function writes into what it closes over, inside of `lt.jit`.

    Example:
        >>> import torch, luxtorch as lt
        >>> total, sums = lt.scan(lambda c, x: (c + x, c + x), torch.tensor(0), torch.tensor([1, 2, 3]))
        >>> total, sums
        (tensor(6), tensor([1, 3, 6]))
        >>> decay = lambda w: lt.scan(lambda c, _: (c * w, None), torch.ones(()), length=3)[0]
        >>> lt.jit(torch.func.grad(decay), backend="replay")(torch.tensor(2.0))
        tensor(12.)

    Source: `jax.lax.scan`.
    """
    if torch.compiler.is_compiling():
        n = length if length is not None else tensors(xs)[0].shape[0]
        found = _compiler.scan(f, init, xs, n, reverse)
        return _loop(f, init, xs, n, reverse) if found is None else found
    check_function("f", f)
    check_number("unroll", unroll, 1)
    if not isinstance(checkpoint, bool):
        check_number("checkpoint", checkpoint, 1)
    n = length_of(xs, length)
    init, xs = as_passed(init), as_passed(xs)
    staged = traced() and not any(map(is_sharded, tensors((init, xs))))
    if (not staged and not checkpoint) or (isinstance(n, int) and n == 0):
        return _loop(f, init, xs, n, reverse)
    known = isinstance(n, int)
    if unroll > 1 and staged and known:
        return _in_groups(f, init, xs, n, reverse, unroll, _loop, _carries_alone if checkpoint else _operator)
    if checkpoint > 1 and known:
        return _in_groups(f, init, xs, n, reverse, int(checkpoint), _operator, _carries_alone)
    return _operator(f, init, xs, n, reverse, save=not checkpoint)


def _in_groups(
    f: Any, init: Tree, xs: Tree, n: int, reverse: bool, size: int, inner: _Runner, outer: _Runner
) -> tuple[Tree, Tree]:
    """Run a scan of groups of steps."""
    number, rest = divmod(n, size)
    carry, found = init, []
    for part in ("rest", "groups") if reverse else ("groups", "rest"):
        if part == "rest" and rest:
            last = map_tensors(lambda x: x[number * size :], xs)
            carry, ys = inner(f, carry, last, rest, reverse)
            found.append(ys)
        elif part == "groups" and number:
            groups = map_tensors(lambda x: x[: number * size].reshape(number, size, *x.shape[1:]), xs)
            carry, ys = outer(lambda c, x: inner(f, c, x, size, reverse), carry, groups, number, reverse)
            found.append(map_tensors(lambda y: y.flatten(0, 1), ys))
    if reverse:
        found.reverse()
    return carry, found[0] if len(found) == 1 else joined(*found)


def _loop(f: Any, init: Tree, xs: Tree, n: int, reverse: bool) -> tuple[Tree, Tree]:
    """Run a scan as a loop of Python."""
    if n == 0:
        _, y = pair_of(f(init, map_tensors(lambda x: x.new_zeros(x.shape[1:]), xs)), _BODY)
        return init, map_tensors(lambda tensor: tensor[None][:0], y)
    sequences = Packed(xs)
    rows = [tensor.unbind(0) for tensor in sequences.tensors]
    carry, ys = init, []
    for i in range(n - 1, -1, -1) if reverse else range(n):
        after, y = pair_of(f(carry, sequences.tree([row[i] for row in rows])), _BODY)
        check_carry(carry, after)
        check_results(y)
        carry = after
        ys.append(y)
    if reverse:
        ys.reverse()
    return carry, tree_map(lambda *leaves: None if leaves[0] is None else torch.stack(leaves), ys[0], *ys[1:])


def _operator(f: Any, init: Tree, xs: Tree, n: Any, reverse: bool, save: bool = True) -> tuple[Tree, Tree]:
    """Run a scan as one operator, whose body is traced once; `save` is whether reverse mode saves more than carries."""
    first = map_tensors(lambda x: x[0], xs)
    body = Lifted(f, (init, first))
    carry, y = pair_of(body.result, _BODY)
    check_carry(init, carry)
    check_results(y)
    start, sequences, results = Packed(init), Packed(xs), Packed(y)
    like = tuple(map(Like.of, results.tensors)) if save else None
    scan = Scan(body.flat(), len(start.tensors), len(sequences.tensors), n, reverse, results=like)
    outputs = bind_scan(scan, [*start.tensors, *sequences.tensors, *body.closed])
    return start.tree(outputs[: scan.carries]), results.tree(outputs[scan.carries :])


_carries_alone = partial(_operator, save=False)
