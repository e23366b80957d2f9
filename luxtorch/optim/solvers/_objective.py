"""A function of the parameters as one of a flat vector, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from luxtorch.autodiff._gradient import differentiate
from luxtorch.core import DTypeError, InputError

from .._leaves import pair, rebuild, to_components
from ._lbfgs import flatten, mark, unflatten

Objective: TypeAlias = "Callable[[Any], Tensor]"
"""Takes the parameters to a number."""


class FlatObjective:
    """Evaluate a function at parameters that are given as one vector.

    Args:
        f: The function.
        ps: Parameters of the structure that it takes.
        frozen: The names of those that are frozen: their derivatives are zero.

    Attributes:
        start: The parameters as a vector.
        frozen: Which of its elements are frozen; None if none is.
    """

    def __init__(self, f: Objective, ps: Any, frozen: tuple[str, ...]) -> None:
        self.f, self.ps = f, ps
        names, self.leaves, _, in_parts, _ = pair(ps, None)
        self._apart = bool(in_parts)
        check_differentiable(names, self.leaves)
        self.start = flatten(self.leaves)
        names, tensors, *_ = pair(to_components(ps), None)
        self.frozen = mark(tensors, [name in frozen for name in names]) if frozen else None

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the value, a number, and the gradient."""
        loss, g = self._at(x)
        return loss.item(), g

    def in_tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the gradient, by operators that a compiled loop may have."""
        return self._at(x, differentiable=True)

    def _at(self, x: Tensor, *, differentiable: bool = False) -> tuple[Tensor, Tensor]:
        def loss_of(leaves: list[Tensor]) -> tuple[Tensor, None]:
            return _check(self.f(rebuild(self.ps, iter(leaves)))), None

        loss, _, grads = differentiate(loss_of, self.parts(x), differentiable=differentiable)
        return loss, self.without_frozen(flatten(grads))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the leaves of the parameters that a vector holds, the parts of complex ones."""
        return unflatten(x, self.leaves, self._apart)

    def without_frozen(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Return a vector with another value for what is frozen."""
        return x if self.frozen is None else x.masked_fill(self.frozen, value)

    def tree(self, x: Tensor) -> Any:
        """Return a vector as a tree of the parameters, in memory of its own."""
        return rebuild(self.ps, (part.clone() for part in self.parts(x)))


def check_differentiable(names: Sequence[str], leaves: Sequence[Tensor]) -> None:
    """Raise if a parameter is no floating point number."""
    for name, p in zip(names, leaves, strict=True):
        if not p.is_floating_point():
            raise DTypeError("A parameter is not differentiable.", got=str(p.dtype), where=name or "the parameter")


def _check(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise InputError(
            "The function does not return a scalar.",
            expected="a tensor of shape ()",
            got=f"a {type(loss).__name__}{shape}",
            fix="Reduce it, for instance by .mean(); nothing can be returned besides.",
        )
    if not loss.is_floating_point():
        raise DTypeError("The loss is not a real floating point number.", got=str(loss.dtype))
    return loss
