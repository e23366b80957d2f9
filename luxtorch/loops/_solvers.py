"""What `fixed_point` iterates with, and the matrix-free linear solver of its derivatives: plain torch.

Vectors are flat and real. The iterations are `while_loop`s, so that inside of `lt.jit` they are operators; under vmap
each element of the batch has an iteration of its own, and one that is done stays as it is, until all are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import traced, unwrapped
from luxtorch.core import LuxtorchError

from ._conditions import while_loop

Memory: TypeAlias = tuple[Tensor, ...]
Map: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a flat vector that returns another."""
Next: TypeAlias = Callable[[Tensor, Tensor, Memory], tuple[Tensor, Memory]]
"""Takes a point, its image, and what is remembered of the points before, to the next point and memory."""
Solver: TypeAlias = Callable[[Map, Tensor], tuple[Next, Memory]]
"""Takes a function and where to begin to how to go on, and an empty memory."""

MEMORY = 5
"""How many points Anderson acceleration mixes."""
KRYLOV = 30
"""How many dimensions a search for the solution of linear equations has, before it begins again from what it found."""
_CYCLES = 20


class ConvergenceError(LuxtorchError, RuntimeError):
    """Report that an iteration has not come near enough to what it looks for."""


def everywhere(condition: Tensor) -> bool:
    """Tell whether a condition holds, under vmap for the whole batch."""
    return bool(unwrapped(condition).all())


def largest(numbers: Tensor) -> float:
    """Return a number, under vmap the greatest of the batch."""
    return float(unwrapped(numbers).max())


def distance(z: Tensor, image: Tensor) -> Tensor:
    """Return by how much a function moves a point, relative to one and the point's length."""
    return torch.linalg.vector_norm(image - z) / (1 + torch.linalg.vector_norm(z))  # type: ignore[no-any-return]


def iterate(f: Map, z: Tensor, solver: Solver, tol: float | None, max_steps: int) -> tuple[Tensor, Tensor | None]:
    """Return where an iteration arrives, and its `distance` from there to the image.

    With a tolerance it stops as soon as all are within it; without one it takes all steps, and no distance.
    """
    following, memory = solver(f, z)
    last = max_steps if tol is not None else max_steps - 1

    def goes_on(state: Any) -> Tensor:
        step, z, image, _ = state
        if tol is None:
            return step < last  # type: ignore[no-any-return]
        gap = distance(z, image)
        return (step < last) & (gap > tol) & gap.isfinite()  # type: ignore[no-any-return]

    def advance(state: Any) -> Any:
        step, z, image, memory = state
        z, memory = following(z, image, memory)
        return step + 1, z, f(z).detach(), memory

    state = torch.zeros((), dtype=torch.int64, device=z.device), z, f(z).detach(), memory
    if torch.compiler.is_compiling():  # torch's own loop knows no transforms
        for _ in range(last):
            state = advance(state)
    else:
        state = while_loop(goes_on, advance, state)
    _, z, image, memory = state
    if tol is None:
        return following(z, image, memory)[0], None
    return z, distance(z, image)


def plain(f: Map, z: Tensor) -> tuple[Next, Memory]:
    """Return the iteration that takes the image for the next point."""
    return lambda z, image, memory: (image, memory), ()


def anderson(f: Map, z: Tensor) -> tuple[Next, Memory]:
    """Return the iteration that takes the mixture of the last images whose points are moved least in total."""
    eye = torch.eye(MEMORY, dtype=z.dtype, device=z.device)

    def following(z: Tensor, image: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        moves, images, used = memory
        moves, images = _pushed(moves, image - z), _pushed(images, image)
        used = _pushed(used, torch.ones_like(used[0]))
        products = moves @ moves.mT
        scale = products.diagonal().sum()
        products = (products / torch.where(scale > 0, scale, 1.0)).nan_to_num(0, 0, 0)
        # Where there is no point yet the equation is 0 = 0, but for the ridge.
        weights, _ = torch.linalg.solve_ex(products + 10 * torch.finfo(z.dtype).eps * eye, used)
        return (weights / weights.sum()) @ images, (moves, images, used)

    empty = z.new_zeros(MEMORY, len(z))
    return following, (empty, empty, z.new_zeros(MEMORY))


def _pushed(rows: Tensor, row: Tensor) -> Tensor:
    """Return rows without the first, and with another one at the end."""
    return torch.cat([rows[1:], row[None]])


def newton(f: Map, z: Tensor) -> tuple[Next, Memory]:
    """Return Newton's iteration, which solves the linear equations of the whole Jacobian at every step."""
    eye = torch.eye(len(z), dtype=z.dtype, device=z.device)

    def following(z: Tensor, image: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        slopes: Tensor = torch.func.jacrev(f)(z).detach()
        step, _ = torch.linalg.solve_ex(slopes - eye, image - z)  # infinite where it is singular
        return z - step, memory

    return following, ()


SOLVERS: dict[str, Solver] = {"anderson": anderson, "iteration": plain, "newton": newton}


def gmres(matrix: Map, b: Tensor, eps: float) -> Tensor:
    """Return x with `matrix(x) = b`, by restarted GMRES.

    Where operators are recorded no error can ask for numbers: there, what was not found is NaN.

    Args:
        matrix: The matrix, as a function.
        b: The right side.
        eps: The relative rounding error of the products.

    Raises:
        ConvergenceError: If the residual stays above `eps ** 0.7` of `b`.
    """
    shape, b = b.shape, b.flatten()
    tol = eps**0.7
    bound = tol * b.norm()

    def apply(v: Tensor) -> Tensor:
        return matrix(v.view(shape)).flatten()

    def search(state: Any) -> Any:
        cycle, x, r = state
        x = x + _search(apply, r, bound)
        return cycle + 1, x, b - apply(x)

    start = torch.zeros((), dtype=torch.int64, device=b.device), torch.zeros_like(b), b
    _, x, r = while_loop(lambda state: (state[0] < _CYCLES) & ~(state[2].norm() <= bound), search, start)
    found = r.norm() <= bound
    if traced():
        return torch.where(found, x, torch.nan).view(shape)
    if everywhere(found):
        return x.view(shape)  # type: ignore[no-any-return]
    raise ConvergenceError(
        "The linear equations of the implicit function theorem must have a solution that GMRES finds.",
        expected=f"a residual of {tol:.1e} of the right side after {KRYLOV * _CYCLES} steps",
        got=f"{largest(r.norm() / b.norm()):.1e}",
        fix='Pass linear_solver="dense"; where that says that the Jacobian is singular, there is no derivative.',
    )


def _search(matrix: Map, r: Tensor, bound: Tensor) -> Tensor:
    """Return what has the least residual among the combinations of r, A r, A A r, ..."""
    eps, size = torch.finfo(r.dtype).eps, min(KRYLOV, len(r))
    length = r.norm()
    rows = torch.arange(size + 1, device=r.device)

    def extend(state: Any) -> Any:
        step, basis, columns, _ = state
        v = matrix(basis.index_select(0, step[None])[0])
        before = v.norm()
        column = torch.zeros_like(basis[:, 0])
        for _ in range(2):  # once leaves rounding errors along the basis
            along = basis @ v
            v, column = v - along @ basis, column + along
        rest = v.norm()
        new = rest > 10 * eps * before  # else the search is over, and further directions are zero
        v, rest = torch.where(new, v / torch.where(new, rest, 1.0), 0.0), torch.where(new, rest, 0.0)
        basis = torch.where((rows == step + 1)[:, None], v, basis)
        column = torch.where(rows == step + 1, rest, column)
        columns = torch.where(rows[:-1] == step, column[:, None], columns)
        return step + 1, basis, columns, _least(columns, length)[1]

    first = (r / torch.where(length > 0, length, 1.0))[None]
    basis = torch.cat([first, r.new_zeros(size, len(r))])
    start = torch.zeros_like(rows[0]), basis, r.new_zeros(size + 1, size), length
    _, basis, columns, _ = while_loop(lambda state: (state[0] < size) & ~(state[3] <= bound / 2), extend, start)
    return _least(columns, length)[0] @ basis[:-1]  # type: ignore[no-any-return]


def _least(matrix: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the small least squares problem of a search; return the weights of the directions, and the residual."""
    target = torch.cat([length[None], torch.zeros_like(matrix[1:, 0])])
    q, upper = torch.linalg.qr(matrix)
    diagonal = upper.diagonal()
    upper = upper + torch.diag_embed((diagonal == 0).to(upper.dtype))
    weights = torch.linalg.solve_triangular(upper, (q.mT @ target)[:, None], upper=True)[:, 0]
    return weights, (target - matrix @ weights).norm()
