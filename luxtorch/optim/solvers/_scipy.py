"""SciPy's optimizers, on parameters with names and with exact derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.autodiff import gradient, hessian, jacobian, pullback
from luxtorch.core import DTypeError, InputError, KeyNameError, LuxtorchError, out_of_range, wrong_type

from .._leaves import pair, rebuild, to_components
from ._objective import FlatObjective, Objective

# What the methods of scipy.optimize.minimize ask for beside the value. All others want the gradient alone.
_WITHOUT_GRADIENT = ("nelder-mead", "powell", "cobyla", "cobyqa")


_WITH_PRODUCTS = ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr")


_WITH_HESSIAN = ("dogleg", "trust-exact")


def scipy_minimize(
    f: Objective,
    ps: Any,
    *,
    method: str = "L-BFGS-B",
    bounds: tuple[Any, Any] | None = None,
    callback: Callable[[Any], Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Minimize a function of the parameters by one of SciPy's methods, with the exact derivatives that it can use.

    These are the gradient, the products of the Hessian with vectors for "Newton-CG", "trust-ncg", "trust-krylov" and
    "trust-constr", and the whole Hessian for "dogleg" and "trust-exact".

    SciPy computes in float64 on the CPU. The function sees parameters of the dtypes and on the device that they have,
    and so do the results; with float32 parameters the last digits of the minimum are noise to a line search. Of complex
    ones, SciPy sees the real and imaginary parts; so do bounds that are trees.

    Args:
        f: A pure function of the parameters that returns a scalar.
        ps: The parameters to begin with: a ComponentVector, nested dicts of tensors, or a tensor.
        method: The name of a method of `scipy.optimize.minimize`.
        bounds: The least and the greatest values that are allowed, as `(lower, upper)`: each is a number, a tree like
            `ps`, or None for no bound.
        callback: Called with the parameters after each iteration. Where SciPy's own callback may end the search, by
            raising `StopIteration`, this one may.
        **options: What else `scipy.optimize.minimize` takes: `tol`, `options`, and `constraints` on the flat vector.

    Returns:
        `(ps, result)`: the new parameters, and SciPy's `OptimizeResult`, in which `x` is the flat vector of them.

    Raises:
        LuxtorchError: If SciPy is not installed.
        InputError: If the function does not return a scalar, if it is not finite from the start, if the bounds do not
            fit the parameters, or inside of a transform, a compiler or inference mode.
        DTypeError: If a parameter is an integer, or the value not a real number.
        KeyNameError: If an option is one that is computed here, or bounds have other names than the parameters.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> def rosenbrock(ps):
        ...     return (1 - ps["x"]) ** 2 + 100 * (ps["y"] - ps["x"] ** 2) ** 2
        >>> ps = {"x": torch.tensor(-1.0), "y": torch.tensor(2.0)}
        >>> ps, result = optim.scipy_minimize(rosenbrock, ps, method="trust-exact")
        >>> ps, result.success
        ({'x': tensor(1.0000), 'y': tensor(1.0000)}, True)

    Source: `scipy.optimize.minimize`. With Lux one takes Optimization.jl.
    """
    optimize = _scipy("minimize", options, "fun", "x0", "args", "jac", "hess", "hessp")
    name = str(method).lower()
    with torch.no_grad():
        problem = Scalar(f, ps)
        problem.check_start(*problem.value_and_gradient(problem.start))
        derivatives: dict[str, Any] = {} if name in _WITHOUT_GRADIENT else {"jac": True}
        if name in _WITH_PRODUCTS:
            derivatives["hessp"] = problem.hessian_product
        elif name in _WITH_HESSIAN:
            derivatives["hess"] = problem.hessian
        result = optimize.minimize(
            problem.value_and_gradient if derivatives else problem.value,
            problem.start,
            method=method,
            bounds=None if bounds is None else optimize.Bounds(*problem.bounds(bounds)),
            callback=None if callback is None else problem.callback(callback),
            **derivatives,
            **options,
        )
        return problem.tree(result.x), result


def scipy_least_squares(
    residuals: Callable[[Any], Tensor],
    ps: Any,
    *,
    method: str = "trf",
    bounds: tuple[Any, Any] | None = None,
    callback: Callable[[Any], Any] | None = None,
    mode: Literal["reverse", "forward"] = "forward",
    chunk_size: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Minimize half the sum of squares of residuals by one of SciPy's methods, with the exact Jacobian.

    The Jacobian has a row for each residual and a column for each parameter. Where it fits into memory, a sum of
    squares is better minimized so than by its gradient: in few steps, and to the last digits. What `scipy_minimize`
    says of dtypes and devices holds here.

    Args:
        residuals: A pure function of the parameters that returns a tensor of any shape.
        ps: The parameters to begin with: a ComponentVector, nested dicts of tensors, or a tensor.
        method: "trf", "dogbox" or "lm", the methods of `scipy.optimize.least_squares`.
        bounds: The least and the greatest values that are allowed, as `(lower, upper)`: each is a number, a tree like
            `ps`, or None for no bound.
        callback: Called with the parameters after each iteration, from SciPy 1.16 on.
        mode: How the Jacobian is computed: "forward" works parameter by parameter, "reverse" residual by residual.
        chunk_size: For how many parameters or residuals at once; all by default.
        **options: What else `scipy.optimize.least_squares` takes, such as `loss`, `x_scale`, `xtol` or `max_nfev`.

    Returns:
        `(ps, result)`: the new parameters, and SciPy's `OptimizeResult`, in which `x`, `fun` and `jac` are flat.

    Raises:
        LuxtorchError: If SciPy is not installed.
        InputError: If the residuals are not finite from the start, if the bounds do not fit the parameters, if SciPy is
            too old for a callback, or inside of a transform, a compiler or inference mode.
        DTypeError: If a parameter is an integer, or a residual not a real number.
        KeyNameError: If an option is one that is computed here, or bounds have other names than the parameters.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> x = torch.linspace(0, 4, 9, dtype=torch.float64)
        >>> y = 3 * torch.exp(-x / 2)
        >>> start = {"height": torch.ones((), dtype=torch.float64), "rate": torch.ones((), dtype=torch.float64)}
        >>> ps, result = optim.scipy_least_squares(lambda ps: ps["height"] * torch.exp(-ps["rate"] * x) - y, start)
        >>> {name: round(p.item(), 6) for name, p in ps.items()}
        {'height': 3.0, 'rate': 0.5}

    Source: `scipy.optimize.least_squares`. With Lux one takes NonlinearSolve.jl.
    """
    optimize = _scipy("least_squares", options, "fun", "x0", "args", "kwargs", "jac")
    if mode not in ("reverse", "forward"):
        raise out_of_range("mode", mode, "'reverse' or 'forward'")
    with torch.no_grad():
        problem = Residuals(residuals, ps, mode, chunk_size)
        problem.check_start(problem.value(problem.start), problem.jacobian(problem.start))
        if bounds is not None:
            options["bounds"] = problem.bounds(bounds)
        if callback is not None:
            if "callback" not in signature(optimize.least_squares).parameters:
                raise InputError("A callback of least squares needs SciPy 1.16.", fix="Upgrade SciPy, or leave it out.")
            options["callback"] = problem.callback(callback)
        result = optimize.least_squares(problem.value, problem.start, jac=problem.jacobian, method=method, **options)
        return problem.tree(result.x), result


def _scipy(name: str, options: dict[str, Any], *ours: str) -> Any:
    """Return SciPy's module of optimizers, or raise where it cannot be used, or with these options."""
    try:
        optimize = import_module("scipy.optimize")
    except ImportError as error:
        raise LuxtorchError(
            "SciPy is not installed.", expected=f"scipy, for scipy_{name}", fix="Run `pip install luxtorch[scipy]`."
        ) from error
    if transformed() or torch.is_inference_mode_enabled():
        raise InputError(
            f"scipy_{name} does not run inside of transforms, a compiler or inference mode.", fix="Call it outside."
        )
    if taken := [option for option in options if option in ours]:
        raise KeyNameError(
            f"'{taken[0]}' is not an option of scipy_{name}.",
            expected=f"other arguments of scipy.optimize.{name}",
            got=f"{taken[0]}=...",
            fix="Leave it out: derivatives are computed, and data is closed over, as in `lambda ps: f(ps, x, y)`.",
        )
    return optimize


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
            raise wrong_type("bounds", bounds, "a pair (lower, upper)")
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

    _recorded: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None

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
            self._recorded = at, pullback(lambda x: gradient(self._of_flat, x), at)[1]
        return array(self._recorded[1](self._flat(v)))

    def hessian(self, x: Any) -> Any:
        """Return the Hessian."""
        return array(hessian(self._of_flat, self._flat(x)))


class Residuals(Problem):
    """Evaluate residuals with their Jacobian, which is computed in forward or reverse mode, in chunks of a size."""

    def __init__(
        self, f: Callable[[Any], Tensor], ps: Any, mode: Literal["reverse", "forward"], chunk_size: int | None
    ) -> None:
        super().__init__(f, ps)
        self._mode, self._chunk_size = mode, chunk_size

    def value(self, x: Any) -> Any:
        """Return the residuals."""
        return array(self._residuals(self._flat(x)))

    def jacobian(self, x: Any) -> Any:
        """Return the Jacobian, residuals by parameters."""
        return array(jacobian(self._residuals, self._flat(x), mode=self._mode, chunk_size=self._chunk_size))

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
