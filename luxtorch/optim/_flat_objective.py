"""A function of a tree of parameters, as one of a flat vector that returns its gradient too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError

from ._lbfgs import flatten, mark, unflatten
from ._leaves import pair, rebuild, to_components

Objective: TypeAlias = "Callable[[Any], Tensor]"
"""Takes the parameters to a number."""


class FlatObjective:
    """Evaluate a function at parameters that are given as one vector, in plain eager code.

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
        names, self.leaves, _, in_parts = pair(ps, None)
        self._apart = bool(in_parts)
        for name, p in zip(names, self.leaves, strict=True):
            if not p.is_floating_point():
                raise DTypeError("A parameter is not differentiable.", got=str(p.dtype), where=name or "the parameter")
        self.start = flatten(self.leaves)
        names, tensors, *_ = pair(to_components(ps), None)
        self.frozen = mark(tensors, [name in frozen for name in names]) if frozen else None

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the value and the gradient."""
        leaves = [part.detach().requires_grad_() for part in self.parts(x)]
        with torch.enable_grad():
            loss = _check(self.f(rebuild(self.ps, iter(leaves))))
        if not (leaves and loss.requires_grad):
            return loss.item(), torch.zeros_like(x)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.item(), self.without_frozen(flatten(grads))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the leaves of the parameters that a vector holds, the parts of complex ones."""
        return unflatten(x, self.leaves, self._apart)

    def without_frozen(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Return a vector with another value for what is frozen."""
        return x if self.frozen is None else x.masked_fill(self.frozen, value)

    def tree(self, x: Tensor) -> Any:
        """Return a vector as a tree of the parameters, in memory of its own."""
        return rebuild(self.ps, (part.clone() for part in self.parts(x)))


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
