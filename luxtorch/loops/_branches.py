"""`cond` and `switch`: one of some functions, by the value of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import traced, transform_level, vmap_levels
from luxtorch.core import DTypeError, InputError, described, out_of_range, wrong_type
from luxtorch.core._tree import named_leaves

from . import _compiler
from ._closure import current, is_constant
from ._primitive import bind
from ._switched import Switch, selected
from ._trees import Lifted, Packed, as_passed, check_function, is_index

Tree = Any


def cond(pred: bool | Tensor, true: Callable[..., Tree], false: Callable[..., Tree], *operands: Tree) -> Tree:
    check_function("true", true)
    check_function("false", false)
    if isinstance(pred, (bool, torch.SymBool)):
        return true(*operands) if pred else false(*operands)
    check_condition("pred", pred)
    return _branch(pred, (false, true), ("false", "true"), operands)


def switch(index: int | Tensor, branches: Sequence[Callable[..., Tree]], *operands: Tree) -> Tree:
    if isinstance(branches, Callable) or not branches:  # type: ignore[arg-type]
        raise out_of_range("branches", branches, "a sequence of functions, at least one")
    for place, branch in enumerate(branches):
        check_function(f"branches[{place}]", branch)
    if is_index(index):
        return branches[min(max(index, 0), len(branches) - 1)](*operands)  # type: ignore[type-var,index]
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
    if torch.compiler.is_compiling():
        return _compiled(index.to(torch.int64), branches, operands)
    index = current(index)
    if not vmap_levels(index) and (not traced() or is_constant(index)):
        return branches[min(max(int(index), 0), len(branches) - 1)](*operands)
    operands = as_passed(operands)
    if not traced():
        results = [branch(*operands) for branch in branches]
        check_results(results, names)
        packed = [Packed(result) for result in results]
        return packed[0].tree(selected(index, [one.tensors for one in packed]))
    bodies = [Lifted(branch, operands) for branch in branches]
    check_results([body.result for body in bodies], names)
    closed = {id(o): (o, here) for body in bodies for o, here in zip(body.originals, body.closed, strict=True)}
    originals = [original for original, _ in closed.values()]
    steps = tuple(body.flat(originals) for body in bodies)
    flat = [index, *Packed(operands).tensors, *[here for _, here in closed.values()]]
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
