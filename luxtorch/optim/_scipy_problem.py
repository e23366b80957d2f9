"""Functions of a tree of parameters, with their derivatives, for those who have arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError, KeyNameError

from ._flat_objective import FlatObjective
from ._leaves import pair, rebuild, to_components


class Problem:
    """Take a tree of parameters to an array of float64 and back, and its bounds with it.

    Args:
        f: A function of the tree.
        ps: The tree.

    Attributes:
        start: The parameters as an array.
    """

    def __init__(self, f: Callable[[Any], Tensor], ps: Any) -> None:
        self._ps, self._objective = ps, FlatObjective(f, ps, ())
        if self._objective.start.numel() == 0:
            raise InputError("There are no parameters to look for.", expected="at least one number", got=f"{ps!r:.80}")
        self.start = array(self._objective.start)

    def tree(self, x: Any) -> Any:
        """Return an array as a tree of the parameters."""
        return self._objective.tree(self._flat(x))

    def callback(self, report: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return a function that hands on what SciPy tells after an iteration, as a tree."""
        return lambda x, *state: report(self.tree(x))

    def bounds(self, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return lower and upper bounds as arrays, or raise unless the parameters lie between them."""
        if not (isinstance(bounds, tuple) and len(bounds) == 2):
            raise InputError("The bounds are not a pair.", expected="(lower, upper)", got=f"{bounds!r:.80}")
        lower, upper = self._bound(bounds[0], -math.inf, "lower"), self._bound(bounds[1], math.inf, "upper")
        inside = (lower <= self.start) & (self.start <= upper)
        if not inside.all():
            place = int(inside.argmin())
            raise InputError(
                "The parameters begin outside of the bounds.",
                expected=f"{lower[place]:.6g} to {upper[place]:.6g}",
                got=f"{self.start[place]:.6g}",
                fix="Begin inside of them, for instance with clamped parameters.",
                where=self._name(place),
            )
        return lower, upper

    def check_start(self, value: Any, derivative: Any) -> None:
        """Raise unless all is finite where the search begins."""
        sizes = [torch.as_tensor(found).abs().amax().item() for found in (value, derivative)]
        if not all(map(math.isfinite, sizes)):
            raise InputError(
                "The function or its derivative is not finite where the search begins.",
                expected="finite numbers",
                got=f"{sizes[0]:.6g} in the value, and {sizes[1]:.6g} in the derivative",
                fix="Begin elsewhere.",
            )

    def _flat(self, x: Any) -> Tensor:
        # A copy: SciPy goes on writing into its arrays.
        start = self._objective.start
        return torch.tensor(x, dtype=start.dtype, device=start.device)

    def _of_flat(self, x: Tensor) -> Any:
        """Return what the function makes of a flat tensor."""
        return self._objective.f(rebuild(self._ps, iter(self._objective.parts(x))))

    def _bound(self, bound: Any, infinite: float, side: str) -> Any:
        parameters = _components(self._ps)
        if bound is None or isinstance(bound, (int, float)):
            bound = infinite if bound is None else bound
            given = {name: torch.full_like(p, bound, dtype=torch.float64) for name, p in parameters.items()}
        else:
            given = _components(bound)
        if wrong := given.keys() ^ parameters.keys():
            raise KeyNameError(
                f"The {side} bounds and the parameters do not have the same names: '{min(wrong)}'.",
                expected=", ".join(parameters),
                got=", ".join(given),
                fix="Pass a number, None, or a tree like the parameters.",
            )
        for name, p in parameters.items():
            if given[name].shape != p.shape:
                raise InputError(
                    f"The {side} bound has another shape than its parameter.",
                    expected=str(tuple(p.shape)),
                    got=str(tuple(given[name].shape)),
                    where=name,
                )
        return array(torch.cat([given[name].reshape(-1).to(torch.float64) for name in parameters]))

    def _name(self, place: int) -> str:
        """Return the name of the parameter that an element of the array belongs to."""
        parameters = _components(self._ps)
        return [name for name, p in parameters.items() for _ in range(p.numel())][place]


class Scalar(Problem):
    """Evaluate a scalar function with its gradient and curvature."""

    _recorded: tuple[Tensor, Callable[[Tensor], tuple[Tensor]]] | None = None

    def value(self, x: Any) -> float:
        """Return the value alone."""
        return self._of_flat(self._flat(x)).item()  # type: ignore[no-any-return]

    def value_and_gradient(self, x: Any) -> tuple[float, Any]:
        """Return the value and the gradient."""
        value, gradient = self._objective(self._flat(x))
        return value, array(gradient)

    def hessian_product(self, x: Any, v: Any) -> Any:
        """Return the product of the Hessian with a vector; another one at the same place costs a backward pass."""
        at = self._flat(x)
        if self._recorded is None or not torch.equal(self._recorded[0], at):
            self._recorded = at, torch.func.vjp(torch.func.grad(self._of_flat), at)[1]
        return array(self._recorded[1](self._flat(v))[0])

    def hessian(self, x: Any) -> Any:
        """Return the Hessian."""
        return array(torch.func.jacrev(torch.func.grad(self._of_flat))(self._flat(x)))


class Residuals(Problem):
    """Evaluate residuals with their Jacobian, which is computed in forward or reverse mode, in chunks of a size."""

    def __init__(self, f: Callable[[Any], Tensor], ps: Any, mode: str, chunk_size: int | None) -> None:
        super().__init__(f, ps)
        self._mode, self._chunk_size = mode, chunk_size

    def value(self, x: Any) -> Any:
        """Return the residuals."""
        return array(self._residuals(self._flat(x)))

    def jacobian(self, x: Any) -> Any:
        """Return the Jacobian, residuals by parameters."""
        at = self._flat(x)
        if self._mode == "reverse":
            return array(torch.func.jacrev(self._residuals, chunk_size=self._chunk_size)(at))

        def column(v: Tensor) -> Tensor:
            product: Tensor = torch.func.jvp(self._residuals, (at,), (v,))[1]
            return product

        # jacfwd knows no chunks.
        return array(torch.vmap(column, chunk_size=self._chunk_size)(torch.eye(at.numel()).to(at)).T)

    def _residuals(self, x: Tensor) -> Tensor:
        residuals = self._of_flat(x)
        if not isinstance(residuals, Tensor) or not residuals.is_floating_point() or residuals.numel() == 0:
            is_tensor = isinstance(residuals, Tensor)
            raise DTypeError(
                "The function does not return residuals.",
                expected="a tensor of real numbers, of any shape",
                got=f"{residuals.dtype}, {tuple(residuals.shape)}" if is_tensor else type(residuals).__name__,
                fix="Return the differences, neither squared nor summed up; nothing can be returned besides.",
            )
        return residuals.reshape(-1)


def array(x: Tensor) -> Any:
    """Return a tensor as an array of float64."""
    return x.detach().to("cpu", torch.float64).numpy()


def _components(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of a tree by their dotted names, those of ComponentVectors one by one."""
    leaves = pair(to_components(tree), None)
    return dict(zip(leaves.names, leaves.params, strict=True))
