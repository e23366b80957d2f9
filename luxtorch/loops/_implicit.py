"""`fixed_point` and `custom_root`: what equations define, with the derivatives of the implicit function theorem.

The solution z is found outside of all derivatives: every iterate is detached. The derivatives are put on afterwards, in
one of two ways. Where the Jacobian A of the residual F is small, it is computed as a constant, and z - A^-1 F(z) is
taken, a step of Newton's method that changes no number, but has the right first derivative; each further step makes
those of one more order right. All of that is ordinary operators, so that F may close over anything, and every
transform and compiler takes it. Else an autograd.Function has rules that solve linear equations with A by GMRES. Their
solutions are roots of linear functions, so the rules call the Function again, and any order is right; but all that is
differentiated has to be an argument of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, forward_level, is_wrapped, outside_transforms, primal_of, set_forward_mode
from luxtorch._transforms import derivatives, recorders, sample, traced, vectorized
from luxtorch.autodiff._torch_func import jvp, vjp
from luxtorch.core import (
    DTypeError,
    InputError,
    described,
    map_tensors,
    named_leaves,
    out_of_range,
    suggest,
    tree_flatten,
    tree_unflatten,
    wrong_type,
)

from ._primitive import is_smooth, with_some
from ._solvers import SOLVERS, ConvergenceError, Map, distance, everywhere, gmres, iterate, largest
from ._trees import Packed

Z = TypeVar("Z")


class Residual(NamedTuple):
    """A function of `(z, *tensors)` that is to be zero, and how finely it is computed.

    Attributes:
        of: The function.
        eps: The relative rounding error of its coarsest numbers.
    """

    of: Callable[..., Tensor]
    eps: float

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """Return the value."""
        return self.of(z, *tensors)


"""A function of a flat vector and of tensors that returns a flat vector: zero at the solution."""
Solve: TypeAlias = "Callable[[Callable[[Any], Any], Any], Any]"
LinearSolver = Literal["auto", "dense", "gmres"]

DENSE = 512
"""Up to how many numbers the whole Jacobian is computed by default."""
_ON_TAPE = 2
"""How many derivatives of what has the whole Jacobian an autograd tape may take."""


def fixed_point(
    f: Callable[..., Z],
    z0: Z,
    *operands: Any,
    solver: Literal["anderson", "iteration", "newton"] | Solve = "anderson",
    tol: float | None = 1e-5,
    max_steps: int = 100,
    unconverged: Literal["raise", "warn"] = "raise",
    linear_solver: LinearSolver = "auto",
) -> Z:
    """Find z with `z = f(z, *operands)`; its derivatives are those of the equation, not of the steps to its solution.

    So a derivative needs neither the steps nor memory for them, and may be taken by reverse and by forward mode, under
    vmap, and again, of what `f` closes over and of the operands. The solution depends on `z0` only as far as it chooses
    among several: by `z0` the derivative is zero. See `linear_solver` for what a derivative costs.

    Args:
        f: A function of a tree like `z0`, and of the operands, that returns a tree like `z0`. It is called many times,
            and must be pure: a dropout mask has to come from a key that stays the same.
        z0: Where to begin: a tree of floating point or complex tensors. They are one vector, with one tolerance; where
            the samples of a batch are independent, a `vmap` over them gives each its own iteration.
        operands: Trees that `f` takes besides, such as parameters and inputs.
        solver: How to find the point. `"anderson"` is Anderson acceleration of the last 5 iterates; `"iteration"` takes
            `f(z)` for the next z, and converges where f is a contraction; `"newton"` solves linear equations with the
            whole Jacobian at each step, and converges in few steps where `z0` is near. Or a function that takes `f` (of
            z alone) and `z0` to the solution, which is then checked.
        tol: At which `norm(f(z) - z) / (1 + norm(z))` to stop. None takes `max_steps` steps and asks for nothing, as
            `torch.compile` and `torch.export` need it; `lt.jit` compiles either, as one loop.
        max_steps: After how many steps to give up.
        unconverged: What to do then: `"raise"` an error, or `"warn"` and go on with the last z. As the equation does
            not quite hold there, neither do the derivatives. Inside of `lt.jit`, where nothing is known of numbers, the
            result is NaN instead of an error, and there is no warning.
        linear_solver: How to solve the linear equations of a derivative. `"dense"` computes the Jacobian of f by z, and
            its inverse. On an autograd tape (not by transforms) no more than two derivatives may be
            taken. `"gmres"` needs products with the Jacobian alone, and keeps no more in memory than z and the
            operands; all that is differentiated or vmapped must be an operand, which is checked. `"auto"` is
            `"dense"` for up to 512 numbers in z (of one sample, under vmap), then `"gmres"`.

    Returns:
        A tree like `z0`.

    Raises:
        ConvergenceError: If z does not get within `tol`, or GMRES finds no solution.
        InputError: If `f` changes structure or shape, if the Jacobian is singular, if there is a tolerance inside
            of torch.compile, or if with GMRES `f` closes over what is differentiated.
        DTypeError: If a leaf of `z0` is no floating point or complex tensor, or `f` changes its dtype.

    Example:
        The square root, by the Babylonian method, and its derivative, 1 / (2 sqrt(a)).

        >>> import torch, luxtorch as lt
        >>> def root(a):
        ...     return lt.fixed_point(lambda z: (z + a / z) / 2, torch.tensor(1.0))
        >>> a = torch.tensor(4.0)
        >>> root(a), torch.func.grad(root)(a), torch.func.grad(torch.func.grad(root))(a)
        (tensor(2.), tensor(0.2500), tensor(-0.0312))

        A deep equilibrium model: a layer that is called until its output does not change any more.

        >>> cell = lt.Parallel(None, lt.Dense(8, 8), lt.Dense(3, 8))
        >>> ps, st = lt.setup(0, cell)
        >>> def equilibrium(x, ps):
        ...     def f(z, ps, x):
        ...         (a, b), _ = cell((z, x), ps, st)
        ...         return torch.tanh(a / 2 + b)
        ...     return lt.fixed_point(f, x.new_zeros(len(x), 8), ps, x)
        >>> grads = lt.gradient(lambda ps: equilibrium(torch.ones(5, 3), ps).square().mean(), ps)

    Source:
        Bai, Kolter and Koltun, "Deep equilibrium models", 2019; Walker and Ni, "Anderson acceleration for fixed-point
        iterations", 2011; the derivative is that of `jax.lax.custom_root`.
    """
    _check_options(solver, tol, max_steps, unconverged, linear_solver)
    form = Form(z0)
    if form.device.type == "meta":
        return form.checked(f(z0, *operands), "f(z)")  # type: ignore[no-any-return]
    if tol is not None and torch.compiler.is_compiling():
        _refuse_tolerance()

    def image(z: Any, *operands: Any) -> Any:
        return form.checked(f(z, *operands), "f(z)")

    with _aside():
        fixed = map_tensors(Tensor.detach, operands)

        def moving(v: Tensor) -> Tensor:
            return form.ravel(image(form.unravel(v), *fixed))

        if callable(solver):
            z = _by_hand(form, solver, lambda z: image(z, *fixed), z0, "solver")
            gap = None if tol is None else distance(z, moving(z).detach())
        else:
            start = form.ravel(z0).detach()
            z, gap = iterate(moving, start, SOLVERS[solver], tol, max_steps)
        if gap is not None and tol is not None:
            z = _converged(z, gap, tol, max_steps, unconverged)
    packed = Packed(operands)

    def residual(v: Tensor, *tensors: Tensor) -> Tensor:
        return form.ravel(image(form.unravel(v), *packed.tree(tensors))) - v

    return form.unravel(_differentiable(Residual(residual, form.eps), z, packed.tensors, linear_solver))  # type: ignore[no-any-return]


def custom_root(f: Callable[..., Z], z0: Z, solve: Solve, *operands: Any, linear_solver: LinearSolver = "auto") -> Z:
    """Find z with `f(z, *operands) = 0` by any solver; its derivatives are those of the equation.

    Nothing is differentiated through the solver, which may do what it likes, such as asking for numbers, or calling
    other libraries. All else is as for `fixed_point`.

    Args:
        f: A function of a tree like `z0`, and of the operands, that returns a tree like `z0`, zero at the solution.
        z0: Where to begin: a tree of floating point or complex tensors.
        solve: A function that takes `f` (of z alone, with the operands put in) and `z0` to the solution. It is called
            under `torch.no_grad()`, and may itself take derivatives of `f` by `lt.jacobian` and the like. It has to
            raise an error if it finds no solution: what it returns is taken for one. What it does is compiled as it is,
            if it can be.
        operands: Trees that `f` takes besides, such as parameters and inputs.
        linear_solver: How to solve the linear equations of a derivative, see `fixed_point`.

    Returns:
        A tree like `z0`.

    Raises:
        ConvergenceError: If GMRES finds no solution.
        InputError: If `f` or `solve` changes structure or shape, if the Jacobian is singular, or if with GMRES `f`
            closes over what is differentiated.
        DTypeError: If a leaf of `z0` is no floating point or complex tensor, or `f` or `solve` changes its dtype.

    Example:
        A cubic root by bisection, and its derivative, 1 / (3 z^2).

        >>> import torch, luxtorch as lt
        >>> def bisect(f, z):
        ...     low, high = torch.zeros_like(z), 10 + z
        ...     for _ in range(40):
        ...         middle = (low + high) / 2
        ...         low, high = torch.where(f(middle) < 0, middle, low), torch.where(f(middle) < 0, high, middle)
        ...     return middle
        >>> def cubic(a):
        ...     return lt.custom_root(lambda z: z**3 - a, torch.zeros_like(a), bisect)
        >>> a = torch.tensor([8.0, 27.0])
        >>> cubic(a), torch.func.jvp(cubic, (a,), (torch.ones(2),))[1]
        (tensor([2., 3.]), tensor([0.0833, 0.0370]))

    Source:
        `jax.lax.custom_root`.
    """
    _check_linear_solver(linear_solver)
    form = Form(z0)

    def value(z: Any, *operands: Any) -> Any:
        return form.checked(f(z, *operands), "f(z)")

    with _aside():
        fixed = map_tensors(Tensor.detach, operands)
        z = _by_hand(form, solve, lambda z: value(z, *fixed), z0, "solve")
    packed = Packed(operands)

    def residual(v: Tensor, *tensors: Tensor) -> Tensor:
        return form.ravel(value(form.unravel(v), *packed.tree(tensors)))

    return form.unravel(_differentiable(Residual(residual, form.eps), z, packed.tensors, linear_solver))  # type: ignore[no-any-return]


class Form:
    """The structure, shapes and dtypes of z, and the way between such trees and flat real vectors.

    Args:
        tree: z0.

    Raises:
        InputError: If it has no leaf.
        DTypeError: If a leaf is no floating point or complex tensor.
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        leaves, self.structure = tree_flatten(tree)
        if not leaves:
            raise InputError("There is nothing to solve for.", expected="a tensor in z0 at least", got=described(tree))
        for name, leaf in named_leaves(tree):
            if not (isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())):
                place = f"'z0.{name}'" if name else "z0"
                raise wrong_type(place, leaf, "a floating point or complex tensor", fix="Pass the rest as operands.")
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.real_dtypes = [leaf.real.dtype for leaf in leaves]
        self.sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in leaves]
        # Linear algebra has no half precision.
        self.dtype = reduce(torch.promote_types, self.real_dtypes, torch.float32)
        self.eps = max(torch.finfo(dtype).eps for dtype in self.real_dtypes)
        self.device = leaves[0].device

    def ravel(self, tree: Any) -> Tensor:
        """Return the numbers of a tree; of complex ones both parts."""
        parts = []
        for leaf in tree_flatten(tree)[0]:
            real = torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf
            parts.append(real.reshape(-1).to(self.dtype))
        return torch.cat(parts)

    def unravel(self, vector: Tensor) -> Any:
        """Return the tree that has these numbers."""
        leaves = []
        parts = torch.split(vector, self.sizes)
        for part, shape, dtype, real in zip(parts, self.shapes, self.dtypes, self.real_dtypes, strict=True):
            part = part.to(real)
            if dtype.is_complex:
                part = torch.complex(*part.reshape(*shape, 2).unbind(-1))
            leaves.append(part.reshape(shape))
        return tree_unflatten(leaves, self.structure)

    def checked(self, tree: Any, what: str) -> Any:
        """Return a tree, or raise unless it is like z0."""
        leaves, structure = tree_flatten(tree)
        if structure != self.structure:
            problem = f"{what} must have the structure of z0."
            raise InputError(problem, expected=str(self.structure), got=str(structure), fix="Return a tree like z0.")
        for i, (leaf, shape, dtype) in enumerate(zip(leaves, self.shapes, self.dtypes, strict=True)):
            if isinstance(leaf, Tensor) and leaf.shape == shape and leaf.dtype == dtype:
                continue
            name = named_leaves(self.tree)[i][0]
            place = f"{what} at the leaf '{name}'" if name else what
            if not isinstance(leaf, Tensor):
                raise wrong_type(place, leaf, "a tensor")
            if leaf.dtype != dtype:
                raise DTypeError(
                    f"{place} must have the dtype of z0.",
                    expected=str(dtype),
                    got=str(leaf.dtype),
                    fix=f"Begin with a z0 of {leaf.dtype}, or convert what f returns.",
                )
            raise InputError(
                f"{place} must have the shape of z0.",
                expected=str(tuple(shape)),
                got=str(tuple(leaf.shape)),
                fix="Begin with a z0 of the shape that f returns.",
            )
        return tree


def _differentiable(residual: Residual, z: Tensor, tensors: list[Tensor], linear_solver: LinearSolver) -> Tensor:
    """Return a solution, which no derivative knows, with the derivatives that the equation gives it."""
    if linear_solver == "dense" or (linear_solver == "auto" and z.numel() <= DENSE):
        return _by_steps(residual, z, tensors)
    if not (torch.is_grad_enabled() or derivatives()):
        return z
    if torch.compiler.is_compiling():
        if derivatives() or residual(z, *tensors).requires_grad:
            _refuse_rules()
        return z
    _check_operands(residual, z, tensors)
    return _Root.apply(residual, z, *tensors)  # type: ignore[no-any-return]


# With the whole Jacobian.


def _by_steps(residual: Residual, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return z with its derivatives, by as many steps as there are derivatives to be taken."""
    if not (torch.is_grad_enabled() or derivatives()):
        return z
    value = residual(z, *tensors)
    if torch.compiler.is_compiling():
        orders, guarded = derivatives() + (derivatives() > 0 or value.requires_grad), False
    else:
        number, taped = recorders(value)
        guarded = taped and not traced()  # what is compiled can be differentiated once
        orders = number + (_ON_TAPE if guarded else int(taped))
    if not orders:
        return z
    with _aside():
        fixed = [tensor.detach() for tensor in tensors]
        inverse = _inverse(torch.func.jacrev(lambda v: residual(v, *fixed))(z).detach())
    solution = z
    for order in range(orders):
        step = inverse @ (value if order == 0 else residual(solution, *tensors))
        solution = solution - (step - step.detach())
    return solution + _Zeros.apply(orders, solution) if guarded else solution


def _inverse(matrix: Tensor) -> Tensor:
    # Not a factorization: where operators are recorded, torch fails at forward over reverse mode of the solution.
    try:
        return torch.linalg.inv(matrix)  # type: ignore[no-any-return]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(
            "The Jacobian of the equation must be invertible at the solution.",
            got=str(error),
            fix="Where it is not, the solution has no derivative: is it one of many?",
        ) from error


class _Zeros(torch.autograd.Function):
    """Return zeros, whose derivatives are zeros as often as is allowed, and then an error."""

    @staticmethod
    def forward(left: int, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[int, Tensor], output: Tensor) -> None:
        ctx.left, x = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        if ctx.left < 1:
            raise InputError(
                "A solution must not be differentiated so often on an autograd tape.",
                expected=f"{_ON_TAPE} derivatives at most with the dense linear solver",
                got="one more",
                fix='Take derivatives by torch.func, or pass linear_solver="gmres", with all operands.',
            )
        return None, cotangent * _Zeros.apply(ctx.left - 1, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        with set_forward_mode(True):
            return tangent * _Zeros.apply(ctx.left - 1, *map(primal_of, ctx.saved_tensors))  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[None, int], left: int, x: Tensor) -> tuple[Tensor, int]:
        return _Zeros.apply(left, x), in_dims[1]


# With products alone.


class _Root(torch.autograd.Function):
    """Take `(residual, z, *tensors)` to z, with the derivatives of `residual(z, *tensors) = 0` by the tensors."""

    @staticmethod
    def forward(residual: Residual, z: Tensor, *tensors: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.residual, z, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(z, *tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        z, *tensors = ctx.saved_tensors
        residual, needed = ctx.residual, ctx.needs_input_grad[2:]
        w = _linear(_transposed, residual, cotangent, z, tensors)
        places = [i for i, need in enumerate(needed) if need]
        some = tuple(tensors[i] for i in places)
        _, back, _ = vjp(lambda *some: (residual(z, *with_some(tensors, places, some)), ()), some)
        slopes = dict(zip(places, back(-w), strict=True))
        return None, None, *(slopes.get(i) for i in range(len(tensors)))

    @staticmethod
    def jvp(ctx: Any, _: None, __: Tensor | None, *tangents: Tensor | None) -> Tensor:
        # torch has switched forward mode off; other levels of it have to see what is done here, but not this one.
        with set_forward_mode(True):
            z, *tensors = map(primal_of, ctx.saved_tensors)
            residual = ctx.residual
            z = _Root.apply(residual, z, *tensors)  # as derivatives outside of this one know it
            given = {i: u for i, u in enumerate(tangents) if u is not None and is_smooth(tensors[i])}
            if not given:
                return torch.zeros_like(z)
            places, some = [*given], tuple(tensors[i] for i in given)
            _, change, _ = jvp(
                lambda *some: (residual(z, *with_some(tensors, places, some)), ()), some, [*given.values()]
            )
            return _linear(_straight, residual, -change, z, tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], residual: Residual, z: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        _, dim, *dims = in_dims
        z = z.expand(info.batch_size, *z.shape) if dim is None else z.movedim(dim, 0)
        return _Root.apply(residual._replace(of=torch.vmap(residual.of, (0, *dims))), z, *tensors), 0


def _linear(product: Callable[..., Map], residual: Residual, b: Tensor, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Solve linear equations with the Jacobian at z: a root once more, with derivatives by b, z and the tensors."""
    with _aside():
        matrix = product(residual, z.detach(), [tensor.detach() for tensor in tensors])
        solution = gmres(lambda v: matrix(v).detach(), b.detach(), residual.eps)

    def equation(v: Tensor, b: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
        return product(residual, z, tensors)(v) - b

    return _Root.apply(Residual(equation, residual.eps), solution, b, z, *tensors)  # type: ignore[no-any-return]


def _straight(residual: Residual, z: Tensor, tensors: Sequence[Tensor]) -> Map:
    """Return what multiplies by the Jacobian of a residual by z."""
    return lambda v: jvp(lambda z: (residual(z, *tensors), ()), (z,), [v])[1]


def _transposed(residual: Residual, z: Tensor, tensors: Sequence[Tensor]) -> Map:
    """Return what multiplies by the transposed Jacobian."""

    def pullback() -> Callable[..., Any]:
        return vjp(lambda z: (residual(z, *tensors), ()), (z,))[1]

    if traced():  # where GMRES is an operator, whose body must take its derivatives itself
        return lambda w: pullback()(w)[0]
    back = pullback()
    return lambda w: back(w)[0]


def _check_operands(residual: Residual, z: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise if a transform or a tape changes what the residual closes over: the rules of `_Root` would not see it."""
    with torch.enable_grad():
        number, taped = recorders(residual(z, *(tensor.detach() for tensor in tensors)))
    if number or taped:
        raise _closed_over("differentiated")
    if not vectorized():
        return
    with outside_transforms(), torch.no_grad():
        try:
            value = residual(sample(z), *map(sample, tensors))
        except RuntimeError as error:  # a batch that its vmap does not stand around
            raise _closed_over("vmapped") from error
    if is_wrapped(value):
        raise _closed_over("vmapped")


def _closed_over(what: str) -> InputError:
    return InputError(
        f'With linear_solver="gmres" the function must not close over what is {what}.',
        expected="all that a transform or a tape changes, among the operands: f(z, ps, x)",
        got="an f that depends on more",
        fix='Write fixed_point(f, z0, ps, x), or pass linear_solver="dense".',
    )


# Arguments.


@contextmanager
def _aside() -> Iterator[None]:
    """Let no derivative outside record what is done; what is differentiated inside is."""
    with torch.no_grad():
        if torch.compiler.is_compiling() or forward_level() < 0:
            yield
        else:
            with set_forward_mode(False):
                yield


def _by_hand(form: Form, solve: Solve, f: Callable[[Any], Any], z0: Any, name: str) -> Tensor:
    """Return what a user's solver finds."""
    found = form.checked(solve(f, map_tensors(Tensor.detach, z0)), f"what {name} returns")
    return form.ravel(found).detach()


def _converged(z: Tensor, gap: Tensor, tol: float, max_steps: int, unconverged: str) -> Tensor:
    """Return the point if it is one; else raise, warn, or, where operators are recorded, return NaN."""
    if traced():
        return torch.where(gap <= tol, z, torch.nan) if unconverged == "raise" else z
    if everywhere(gap <= tol):
        return z
    error = ConvergenceError(
        f"The iteration must converge within {max_steps} steps.",
        expected=f"norm(f(z) - z) / (1 + norm(z)) of at most {tol:.1e}",
        got=f"{largest(gap):.1e}",
        fix="Allow more max_steps or a greater tol, take another solver, or make f a stronger contraction.",
    )
    if unconverged == "raise":
        raise error
    warnings.warn(str(error), stacklevel=3)
    return z


@compile_constant
def _refuse_tolerance() -> None:
    raise InputError(
        "torch.compile and torch.export cannot trace an iteration until a tolerance is met.",
        expected="lt.jit, or tol=None",
        got="a tolerance",
        fix="Compile by lt.jit, or pass tol=None, and max_steps=20 or as many as are needed.",
    )


@compile_constant
def _refuse_rules() -> None:
    raise InputError(
        "torch.compile cannot trace derivatives by GMRES, as it knows no autograd.Function with a forward-mode rule.",
        expected='lt.jit, or linear_solver="dense"',
        got='linear_solver="gmres"',
        fix='Compile by lt.jit, or pass linear_solver="dense".',
    )


def _check_options(solver: Any, tol: float | None, max_steps: int, unconverged: str, linear_solver: str) -> None:
    if not (callable(solver) or solver in SOLVERS):
        known = ", ".join(map(repr, SOLVERS))
        raise out_of_range("solver", solver, f"{known} or a function", fix=suggest(str(solver), SOLVERS))
    if tol is not None and not tol > 0:
        raise out_of_range("tol", tol, "positive, or None")
    if max_steps < 1:
        raise out_of_range("max_steps", max_steps, "at least 1")
    if unconverged not in ("raise", "warn"):
        raise out_of_range("unconverged", unconverged, "'raise' or 'warn'")
    _check_linear_solver(linear_solver)


def _check_linear_solver(linear_solver: str) -> None:
    if linear_solver not in ("auto", "dense", "gmres"):
        raise out_of_range("linear_solver", linear_solver, "'auto', 'dense' or 'gmres'")
