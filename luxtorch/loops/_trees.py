"""What bodies take and return: trees of tensors, and the errors that name their leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError, described, map_tensors, out_of_range, wrong_type
from luxtorch.core._tree import named_leaves, tree_flatten, tree_map, tree_unflatten

from ._closure import Flat, autocast_as_now, current, explored, rebound, replaced


class Packed:
    """A tree as its tensors, and all that is not a tensor.

    Args:
        tree: The tree.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = tree_flatten(tree)
        self.tensors: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}

    def without_tensors(self) -> Packed:
        """Return the same without its tensors, which then can be freed."""
        other = copy(self)
        other.tensors = []
        return other

    def tree(self, tensors: Sequence[Tensor]) -> Any:
        """Return the tree with other tensors."""
        found = iter(tensors)
        number = self.spec.num_leaves
        leaves = [self._others[i] if i in self._others else next(found) for i in range(number)]
        return tree_unflatten(leaves, self.spec)


def check_function(name: str, f: Any) -> None:
    """Raise if an argument is not a function."""
    if not callable(f):
        raise wrong_type(name, f, "a function")


def is_index(value: Any) -> bool:
    """Tell whether a value is a whole number, perhaps one that a compiler does not know yet."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_number(name: str, value: Any, least: int) -> None:
    """Raise if an argument is not a whole number, or too small."""
    if not is_index(value):
        raise wrong_type(name, value, "a whole number")
    if isinstance(value, int) and value < least:
        raise out_of_range(name, value, f"at least {least}")


def length_of(xs: Any, length: Any) -> Any:
    """Return how many steps a scan has.

    Raises:
        InputError: If nothing says so, or not all say the same.
        DTypeError: If the length is not a whole number.
    """
    if length is not None:
        check_number("length", length, 0)
    found, first = length, "length"
    for name, leaf in named_leaves(xs):
        if not isinstance(leaf, Tensor):
            continue
        place = f"xs.{name}" if name else "xs"
        if leaf.ndim == 0:
            raise InputError(
                "A scanned tensor must have a first dimension, along which it is scanned.",
                got=f"{place}, {described(leaf)}",
                fix="What is the same in each step needs no scan: let the function close over it.",
            )
        if found is None:
            found, first = leaf.shape[0], place
        elif leaf.shape[0] != found:
            raise InputError(
                "All scanned tensors must have one length.",
                expected=f"{found}, as {first} has it" if first != "length" else f"{found}, the argument 'length'",
                got=f"{leaf.shape[0]} for {place}",
            )
    if found is None:
        raise InputError(
            "A scan needs a length.",
            expected="xs with a tensor, or length",
            got=f"xs={described(xs)} and length=None",
            fix="Pass length=n for a loop over nothing but its carry.",
        )
    return found


def pair_of(result: Any, what: str) -> tuple[Any, Any]:
    """Return the two parts of what a body returns."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise InputError(
            f"{what} must return a pair, the carry and the result of the step.",
            got=described(result),
            fix="Return (carry, y); y may be None.",
        )
    return result


def check_carry(before: Any, after: Any, what: str = "carry") -> None:
    """Raise, with the leaf's name, if a carry has another structure, shape or dtype than that before it."""
    leaves, spec = tree_flatten(before)
    others, other_spec = tree_flatten(after)
    if spec != other_spec:
        raise InputError(
            f"The {what} must keep its structure.",
            expected=_shown(before),
            got=_shown(after),
            fix=f"Return a {what} of the same names and lengths as it came.",
        )
    for i, (one, other) in enumerate(zip(leaves, others, strict=True)):
        if one is other:
            continue
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other) or one != other:
                raise DTypeError(
                    f"What changes in the {what} must be a tensor, before and after.",
                    expected=f"{_named(before, i, what)} as it came, {described(one)}",
                    got=described(other),
                    fix=f"Begin with a tensor: torch.tensor({one!r})."
                    if isinstance(one, (bool, int, float))
                    else "Return a tensor, or what came.",
                )
        elif one.dtype != other.dtype:
            raise DTypeError(
                f"The {what} must keep its dtype.",
                expected=f"{one.dtype} for {_named(before, i, what)}",
                got=str(other.dtype),
                fix=f"Begin with a tensor of {other.dtype}, or return .to({one.dtype}).",
            )
        elif one.shape != other.shape:
            raise InputError(
                f"The {what} must keep its shape.",
                expected=f"{tuple(one.shape)} for {_named(before, i, what)}",
                got=str(tuple(other.shape)),
                fix="Begin with a tensor of the shape that the function returns, for instance by expand.",
            )


def check_results(y: Any) -> None:
    """Raise, with the leaf's name, if what a step returns is neither a tensor nor None."""
    for name, leaf in named_leaves(y):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise DTypeError(
                "What a step returns to be stacked must be tensors.",
                expected="a tensor or None",
                got=f"{f'y.{name}' if name else 'y'}, {described(leaf)}",
                fix="Return torch.tensor(...), or leave it out.",
            )


def _named(tree: Any, leaf: int, what: str) -> str:
    name = named_leaves(tree)[leaf][0]
    return f"{what}.{name}" if name else what


def _shown(tree: Any) -> str:
    return str(map_tensors(lambda tensor: _Kind(tensor), tree))


class _Kind:
    def __init__(self, tensor: Tensor) -> None:
        self._text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    def __repr__(self) -> str:
        return self._text


class Lifted:
    """A body as a function of flat tensors: of its arguments, and of what it closes over.

    Args:
        f: The body.
        args: Trees of the shapes of its arguments.

    Attributes:
        result: What it returned for these; the shapes count.
        originals: The tensors that it closes over.
        closed: What is to be passed for them.
    """

    def __init__(self, f: Callable[..., Any], args: Sequence[Any]) -> None:
        self._arguments = Packed(tuple(args))
        f = rebound(f, {}, settle=True)
        self.result, pairs = explored(f, *args)
        self.originals = [original for original, _ in pairs]
        self.closed = [here for _, here in pairs]
        # A copy with cells of its own: what its variables are later must not matter.
        self._f = rebound(f, {id(one): one for one in self.originals}, always=True)
        tensors = [*self._arguments.tensors, *self.closed]
        self._autocast = autocast_as_now(tensors[0].device if tensors else torch.device("cpu"))

    def flat(self, closed: Sequence[Tensor] | None = None) -> Flat:
        """Return the body as a function of flat tensors.

        Args:
            closed: The tensors that it closes over, in the order in which they are passed; those of the body if None.
        """
        # What it holds must have no part in what is computed of its results: that would never be freed.
        f, originals, autocast = self._f, self.originals if closed is None else closed, self._autocast
        number, tree = len(self._arguments.tensors), self._arguments.without_tensors()

        def call(*flat: Tensor) -> list[Tensor]:
            args = tree.tree(flat[:number])
            with autocast():
                result = replaced(f, originals, flat[number:], args)
            return Packed(result).tensors

        return Flat(call)


def as_passed(tree: Any) -> Any:
    """Return a tree with what stands for its tensors inside of bodies that close over them."""
    return map_tensors(current, tree)


def closed_over(bodies: Sequence[Lifted]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that several bodies close over, each once, and what is to be passed for them."""
    pairs = (pair for body in bodies for pair in zip(body.originals, body.closed, strict=True))
    closed = {id(original): (original, here) for original, here in pairs}
    return [original for original, _ in closed.values()], [here for _, here in closed.values()]


def joined(*trees: Any) -> Any:
    """Return trees of sequences as one, the first tree's first; where there is None, None."""
    return tree_map(lambda *ys: None if ys[0] is None else torch.cat(ys), *trees)
