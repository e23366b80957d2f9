"""`check_derivatives`: derivatives of orders one to three, by every nesting of transforms, against finite differences.

A word says how a derivative is taken, the outermost transform first: `R` is `torch.func.grad`, `F` is `torch.func.jvp`,
`r` and `f` are these inside `torch.vmap`, and `T` is `torch.autograd.grad` with `create_graph`, around all others; it
may raise an error. Derivatives are taken along fixed directions, so that each word gives a number, and all words of one
order the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luxtorch.core import InputError, described, out_of_range, tree_flatten, tree_leaves, tree_map, tree_unflatten
from luxtorch.random import Rng, as_key, fold_in

from ._subject import LawError, moved, nonlinear, normal_like, weighted

Function = Callable[[Any], Tensor]
"""A function of a tree of real numbers that returns one number."""

ORDERS = (1, 2, 3)
WORDS = tuple("".join(word) for order in ORDERS for word in product("RF", repeat=order))
"""All words of reverse and forward mode."""
QUICK = (*WORDS, "T", "r", "f", "TT", "TF", "rF", "fR", "Rr", "Ff", "TTT", "TFR", "RfR", "FrF", "rFr", "fRf")
"""These, and enough others for every pair of neighboring letters."""
EVERY = tuple(
    "T" * taped + "".join(word)
    for order in ORDERS
    for taped in range(order + 1)
    for word in product("RFrf", repeat=order - taped)
)

_STEP, _BESIDE = 2e-6, 1e-2
_ROUGH, _EXACT = 1e-5, 1e-7  # tolerances against finite differences, and against other transforms
_FAR, _POINTS = 30.0, 5


def check_derivatives(f: Callable[..., Any], *xs: Any, rng: Rng = 0, words: Iterable[str] = QUICK) -> None:
    """Check that a function has the derivatives that it should, by every nesting of transforms.

    Derivatives of the first, second and third order are taken along random directions, by nested transforms, and
    compared with finite differences of the next lower order, and with one another. At a kink, where the differences
    ahead and behind differ, the function is checked at points nearby.

    Args:
        f: A function of as many trees as `xs` has, that returns a tree of tensors.
        xs: Trees of floating point tensors, of double precision, as finite differences need it.
        rng: A seed, a key or a generator for the directions.
        words: By what transforms. A word names them, the outermost first: `R` for reverse mode, `F` for forward mode,
            `r` and `f` for these inside vmap, `T` for an autograd tape around all others,
            which may be refused.

    Raises:
        LawError: If a derivative is wrong, or cannot be taken; it names the word.
        InputError: If a word has other letters, or a tensor is not of double precision.

    Example:
        >>> import torch, luxtorch as lt
        >>> x = torch.tensor([0.1, 0.2], dtype=torch.float64)
        >>> lt.testing.check_derivatives(torch.tanh, x)
        >>> lt.testing.check_derivatives(lambda x: x.detach() * x, x)
        Traceback (most recent call last):
            ...
        luxtorch.testing._subject.LawError: ...
    """
    for leaf in tree_leaves(xs):
        if not (isinstance(leaf, Tensor) and leaf.dtype == torch.float64):
            problem = "Derivatives are checked in double precision: all leaves must be torch.float64 tensors."
            raise InputError(problem, got=described(leaf), fix="Pass lt.f64(x).")
    check_words(lambda xs: weighted(nonlinear(f(*xs))), xs, as_key(rng), words)


def check_words(
    f: Function, x: Any, key: Tensor, words: Iterable[str] = QUICK, *, differences: bool = True, law: str = "orders"
) -> None:
    """Raise unless all words give the derivatives of `f` at `x`; at a kink of `f`, at a point nearby.

    Args:
        f: The function.
        x: The point.
        key: The key of the directions.
        words: The words.
        differences: Whether differences are the derivatives; if not, the words are compared with one another.
        law: What the errors name.
    """
    words = tuple(words)
    if unknown := [word for word in words if word not in EVERY]:
        raise out_of_range("A word", unknown[0], "one to three of R, F, r, f, which may begin with T instead")
    directions = [normal_like(fold_in(key, order), x) for order in ORDERS]
    fault = _fault(f, x, directions, words, differences, law)
    number = 0
    while fault is not None and fault.kink and number < _POINTS:
        # The derivative at a kink is a convention, so the rule behind it is checked at a point nearby.
        near = normal_like(fold_in(fold_in(key, "near"), number), x)
        fault = _fault(f, moved(x, near, _BESIDE), directions, words, differences, law)
        number += 1
    if fault is not None:
        raise fault.error


class _Fault(NamedTuple):
    """A derivative that is not what it should be, and whether the function has a kink there, which excuses it."""

    error: LawError
    kink: bool


class _Slope(NamedTuple):
    """A derivative by finite differences, the difference between two step sizes, and the jump at the point."""

    value: float
    doubt: float
    jump: float
    scale: float

    @property
    def kink(self) -> bool:
        """Tell whether the function is not smooth at the point, or between it and the next."""
        return not self.doubt + abs(self.jump) <= _ROUGH * self.scale


def _fault(
    f: Function, x: Any, directions: Sequence[Any], words: Sequence[str], differences: bool, law: str
) -> _Fault | None:
    """Return the first derivative at a point that is wrong, if one is."""
    lower, here = f, 0.0
    if differences:
        here = float(f(x).detach())
    for order in range(1, max(map(len, words)) + 1):
        trusted = _derivative(f, "R" * order, directions)
        slope = _slope(lower, x, directions[order - 1], here) if differences else None
        kink = slope is not None and slope.kink
        here = _number(law, trusted, "R" * order, x)
        if slope is not None and not abs(here - slope.value) <= _ROUGH * slope.scale:
            # The value at a kink of several units at once may lie outside of the slopes on its two sides.
            sane = order > 1 or abs(here - slope.value) <= _FAR * abs(slope.jump)
            return _Fault(_disagree(law, "R" * order, here, slope.value, "differences"), kink and sane)
        for word in words:
            if len(word) == order and word != "R" * order:
                try:
                    got = _number(law, _derivative(f, word, directions), word, x)
                except LawError:
                    if word[0] == "T":  # torch raises an error instead of a wrong number
                        continue
                    raise
                if not abs(got - here) <= _EXACT * max(1.0, abs(here), slope.scale if slope else 0.0):
                    return _Fault(_disagree(law, word, got, here, "R" * order), kink)
        lower = trusted
    return None


def _number(law: str, derivative: Function, word: str, x: Any) -> float:
    try:
        return float(derivative(x).detach())
    except Exception as error:
        raise LawError(f"{law}: {word} is not possible: {type(error).__name__}: {error}") from error


def _disagree(law: str, word: str, got: float, expected: float, by: str) -> LawError:
    return LawError(f"{law}: {word} is wrong.", expected=f"{expected!r}, by {by}", got=repr(got))


def _slope(f: Function, x: Any, direction: Any, here: float) -> _Slope:
    """Return the directional derivative of a function, by central differences with two step sizes."""
    values = [float(f(moved(x, direction, step)).detach()) for step in (-_STEP, -_STEP / 2, _STEP / 2, _STEP)]
    wide, narrow = (values[3] - values[0]) / (2 * _STEP), (values[2] - values[1]) / _STEP
    # Forward minus backward difference: proportional to the step if smooth, the same for both steps at a kink.
    bends = ((values[3] + values[0] - 2 * here) / _STEP, (values[2] + values[1] - 2 * here) / (_STEP / 2))
    scale = max(1.0, abs(narrow), abs(here)) if isfinite(narrow) else 1.0
    return _Slope((4 * narrow - wide) / 3, abs(wide - narrow), 2 * bends[1] - bends[0], scale)


def _derivative(f: Function, word: str, directions: Sequence[Any]) -> Function:
    """Return the derivative that a word stands for, as a function of the point; the last letter is the innermost."""
    for letter, direction in zip(reversed(word), directions, strict=False):
        f = _LETTERS[letter](f, direction)
    return f


def _reverse(f: Function, direction: Any) -> Function:
    return lambda x: _dot(torch.func.grad(f)(x), direction)


def _forward(f: Function, direction: Any) -> Function:
    return lambda x: torch.func.jvp(f, (x,), (direction,))[1]


def _inside_vmap(letter: Callable[[Function, Any], Function]) -> Callable[[Function, Any], Function]:
    """Return a letter that takes the derivative at two points at once by vmap, and returns the second one."""

    def inside(f: Function, direction: Any) -> Function:
        def of_second(x: Any) -> Tensor:
            both = tree_map(lambda leaf: torch.stack([1.1 * leaf, leaf]), x)
            return torch.vmap(letter(f, direction))(both)[1]

        return of_second

    return inside


def _taped(f: Function, direction: Any) -> Function:
    def by_tape(x: Any) -> Tensor:
        leaves, structure = tree_flatten(x)
        if not all(leaf.requires_grad for leaf in leaves):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        value = f(tree_unflatten(leaves, structure))
        if not value.requires_grad:
            return torch.zeros_like(value)
        gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        return _dot(gradients, direction)

    return by_tape


def _dot(a: Any, b: Any) -> Tensor:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return sum(((left * right).sum() for left, right in pairs), torch.zeros((), dtype=torch.float64))


_LETTERS: dict[str, Callable[[Function, Any], Function]] = {
    "R": _reverse,
    "F": _forward,
    "r": _inside_vmap(_reverse),
    "f": _inside_vmap(_forward),
    "T": _taped,
}
