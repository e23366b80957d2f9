"""What the laws are checked on, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import (
    Layer,
    LuxtorchError,
    Parameters,
    States,
    WrapperLayer,
    named_leaves,
    setup,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from luxtorch.random import fold_in, normal, split


class LawError(LuxtorchError, AssertionError):
    """Report a law of luxtorch that a layer breaks."""


def same_structure(law: str, got: Any, expected: Any) -> None:
    """Raise unless two trees have the same structure, shapes and dtypes."""
    structures = [tree_structure(tree) for tree in (got, expected)]
    if structures[0] != structures[1]:
        raise LawError(f"{law}: the tree changes its structure.", expected=str(structures[1]), got=str(structures[0]))
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(expected), strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            raise LawError(f"{law}: '{name}' is not a tensor.", expected="tensors and Static values", got=f"{a!r:.80}")
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise LawError(
                f"{law}: '{name}' changes its shape or dtype.",
                expected=f"{b.dtype} {tuple(b.shape)}",
                got=f"{a.dtype} {tuple(a.shape)}",
            )


def same_values(law: str, got: Any, expected: Any, *, tolerance: float = 0.0) -> None:
    """Raise unless two trees are equal: to the bit, or within a tolerance relative to the largest value.

    A tolerance allows for the last bits of a dtype, too: in half precision one rounding is as much as an error is else.
    """
    same_structure(law, got, expected)
    for (name, a), (_, b) in zip(named_leaves(got), named_leaves(expected), strict=True):
        if tolerance == 0.0 or not (b.is_floating_point() or b.is_complex()):
            equal = torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
        else:
            scale = float(b.detach().abs().max()) if b.numel() else 0.0
            near = max(tolerance, 4 * torch.finfo(b.dtype).eps)
            equal = torch.allclose(a, b, rtol=near, atol=near * max(scale, 1.0), equal_nan=True)
        if not equal:
            gap = (a - b).abs().max().item() if a.is_floating_point() else "some elements"
            raise LawError(
                f"{law}: '{name or 'the output'}' differs.", expected=f"{b!s:.200}", got=f"{a!s:.200} (by {gap})"
            )


def close(law: str, got: float, expected: float, tolerance: float) -> None:
    """Raise unless two numbers agree."""
    if not abs(got - expected) <= tolerance * max(1.0, abs(expected)):
        raise LawError(f"{law}: the numbers disagree.", expected=repr(expected), got=repr(got))


@dataclass(frozen=True)
class Subject:
    """Hold a layer, an input, the layer's parameters, and its states in one mode."""

    layer: Layer
    x: Any
    ps: Parameters
    st: States
    key: Tensor
    set_mode: Callable[[States], States]
    backend: str | Callable[..., Any]
    differences: bool = True
    """Whether the layer's derivatives agree with finite differences, as they do not for straight-through estimators."""
    words: tuple[str, ...] | None = None
    """The nestings of transforms that derivatives are taken by, see `check_derivatives`."""

    def call(self, x: Any, ps: Any, st: States) -> tuple[Any, States]:
        """Call the layer."""
        return self.layer(x, ps, st)

    def objective(self, x: Any, ps: Any, st: States) -> tuple[Tensor, States]:
        """Return a scalar that depends on every output, each with a weight of its own, and the new states."""
        y, st = self.layer(x, ps, st)
        return weighted(y), st

    def gradient(self, x: Any, ps: Any, st: States) -> tuple[Any, States]:
        """Return the objective's gradient by the parameters, and the new states."""
        return torch.func.grad(lambda p: self.objective(x, p, st), has_aux=True)(ps)  # type: ignore[no-any-return]

    def calls(self) -> list[Callable[[Any, Any, States], tuple[Any, States]]]:
        """Return the functions to transform: the call, and its gradient if there are parameters."""
        # Not methods, because `jit` would take their object for an argument.
        calls = [lambda x, ps, st: self.call(x, ps, st), lambda x, ps, st: self.gradient(x, ps, st)]
        return calls if tree_leaves(self.ps) else calls[:1]

    def states_alone(self) -> list[Callable[[Any, Any, States], Any]]:
        """Return the call as a function to its new states alone, and to the first and the last of them that change."""
        new = named_leaves(self.call(self.x, self.ps, self.st)[1])
        old = dict(named_leaves(self.st))
        changed = [n for n, (name, leaf) in enumerate(new) if not torch.equal(leaf, old[name])]

        def leaf_alone(n: int) -> Callable[[Any, Any, States], Any]:
            return lambda x, ps, st: tree_leaves(self.call(x, ps, st)[1])[n]

        if not changed:
            return []
        return [lambda x, ps, st: self.call(x, ps, st)[1], *map(leaf_alone, sorted({changed[0], changed[-1]}))]

    def in_double(self) -> Subject:
        """Return the same in double precision."""
        x, ps, st = tree_map(_doubled, (self.x, self.ps, self.st))
        return replace(self, x=x, ps=ps, st=st)

    def variables(self) -> dict[str, Any]:
        """Return what the layer is differentiated by: its parameters, and the input if it is of floating point numbers.

        Of complex numbers, these are the real and imaginary parts.
        """
        variables = {"ps": self.ps} if tree_leaves(self.ps) else {}
        leaves = tree_leaves(self.x)
        if leaves and all(is_real(in_parts(leaf)) for leaf in leaves):
            variables["x"] = self.x
        return tree_map(in_parts, variables)  # type: ignore[no-any-return]

    def of_variables(self, variables: dict[str, Any]) -> tuple[Tensor, States]:
        """Return the objective as a function of the variables."""
        x, ps = (
            tree_map(_whole, variables[name], tree) if name in variables else tree
            for name, tree in (("x", self.x), ("ps", self.ps))
        )
        return self.objective(x, ps, self.st)

    def nonlinear(self) -> Subject:
        """Return the same with a nonlinear function of the outputs, so that all derivatives matter."""
        return replace(self, layer=Nonlinear(self.layer))

    def inputs(self, number: int) -> list[Any]:
        """Return several inputs; integers in them are the same in all."""

        def scaled(factor: float) -> Any:
            return tree_map(lambda leaf: leaf * factor if is_real(in_parts(leaf)) else leaf, self.x)

        return [scaled(1 + 0.1 * i) for i in range(number)]

    def models(self, number: int) -> tuple[list[Parameters], list[States]]:
        """Return parameters and states of several models."""
        pairs = [setup(key, self.layer) for key in split(fold_in(self.key, "models"), number)]
        return [ps for ps, _ in pairs], [self.set_mode(st) for _, st in pairs]

    def direction(self, tree: Any) -> Any:
        """Return normal random numbers in the shape of a tree."""
        return normal_like(fold_in(self.key, "direction"), tree)


class Nonlinear(WrapperLayer):
    """Call a layer, and apply a nonlinear function to its output."""

    layer: Layer

    def __call__(self, x: Any, ps: Any, st: States) -> tuple[Any, States]:
        """Return the nonlinear function of the output, and the layer's new state."""
        y, st = self.layer(x, ps, st)
        return nonlinear(y), st


def nonlinear(tree: Any) -> Any:
    """Return x + sin(x) / 2 of each tensor, so that also a linear layer has derivatives of higher orders."""

    def added(leaf: Any) -> Any:
        real = in_parts(leaf)
        return _whole(real + real.sin() / 2, leaf) if is_real(real) else leaf

    return tree_map(added, tree)


def weighted(tree: Any) -> Tensor:
    """Return one number that depends on every tensor of a tree, each element with a weight of its own.

    Each of the two parts of complex elements has one, too.
    """
    total = torch.zeros((), dtype=torch.float64)
    for leaf in map(in_parts, tree_leaves(tree)):
        if is_real(leaf):
            weights = torch.cos(torch.arange(leaf.numel(), device=leaf.device)).reshape(leaf.shape)
            total = total + (leaf * weights.to(leaf.dtype)).sum()
    return total


def normal_like(key: Tensor, tree: Any) -> Any:
    """Return normal random numbers in the shape of a tree."""
    leaves, structure = tree_flatten(tree)
    pairs = zip(split(key, len(leaves)), leaves, strict=True)
    return tree_unflatten([normal(key, leaf.shape, dtype=leaf.dtype) for key, leaf in pairs], structure)


def moved(tree: Any, direction: Any, step: float) -> Any:
    """Return `tree + step * direction`."""
    return tree_map(lambda leaf, along: leaf + step * along if is_real(leaf) else leaf, tree, direction)


def in_parts(leaf: Any) -> Any:
    """Return the real and imaginary parts of a complex tensor in a last dimension of two, and all else as it is."""
    return torch.view_as_real(leaf.resolve_conj()) if isinstance(leaf, Tensor) and leaf.is_complex() else leaf


def _whole(leaf: Any, like: Any) -> Any:
    return torch.view_as_complex(leaf) if isinstance(like, Tensor) and like.is_complex() else leaf


def _doubled(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_complex():
        return leaf.to(torch.complex128)
    return leaf.double() if is_real(leaf) else leaf


def is_real(leaf: object) -> bool:
    """Tell whether something is a real floating point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
