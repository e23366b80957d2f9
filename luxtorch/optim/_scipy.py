"""SciPy's optimizers, on parameters with names and with exact derivatives."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, KeyNameError, LuxtorchError

from ._flat_objective import Objective
from ._scipy_problem import Residuals, Scalar

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
        InputError: If the residuals are not finite from the start, if the bounds do not fit the parameters, or inside
            of a transform, a compiler or inference mode.
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
        raise InputError(f"There is no mode {mode!r}.", expected="'reverse' or 'forward'", got=repr(mode))
    with torch.no_grad():
        problem = Residuals(residuals, ps, mode, chunk_size)
        problem.check_start(problem.value(problem.start), problem.jacobian(problem.start))
        if bounds is not None:
            options["bounds"] = problem.bounds(bounds)
        if callback is not None:  # unknown before SciPy 1.16
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
