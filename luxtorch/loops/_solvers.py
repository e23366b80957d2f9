"""What `fixed_point` iterates with, and the matrix-free linear solver of its derivatives: plain torch.

Vectors are flat and real. Under vmap each element of the batch has an iteration of its own: one that is done stays as
it is, until all are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import traced, unwrapped
from luxtorch.core import LuxtorchError

Map: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a flat vector that returns another."""
Next: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes a point and its image to the next point."""

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


def iterate(f: Map, z: Tensor, following: Next, tol: float | None, max_steps: int) -> tuple[Tensor, Tensor | None]:
    """Return where an iteration arrives, and its `distance` from there to the image.

    With a tolerance it stops as soon as all are within it; without one it takes all steps, and no distance.
    """
    if tol is None:
        for _ in range(max_steps):
            z = following(z, f(z))
        return z, None
    for step in range(max_steps + 1):
        image = f(z)
        gap = distance(z, image)
        done = (gap <= tol) | ~gap.isfinite()  # what is lost stays as it is, too
        if step == max_steps or everywhere(done):
            break
        z = torch.where(done, z, following(z, image))
    return z, gap


def plain(f: Map) -> Next:
    """Return the iteration that takes the image for the next point."""
    return lambda z, image: image


def anderson(f: Map) -> Next:
    """Return the iteration that takes the mixture of the last images whose points are moved least in total."""
    moves: list[Tensor] = []
    images: list[Tensor] = []

    def following(z: Tensor, image: Tensor) -> Tensor:
        moves.append(image - z)
        images.append(image)
        del moves[:-MEMORY], images[:-MEMORY]
        if len(moves) == 1:
            return image
        moved = torch.stack(moves)
        products = moved @ moved.mT
        scale = products.diagonal().sum()
        products = products / torch.where(scale > 0, scale, 1.0)
        ridge = 10 * torch.finfo(products.dtype).eps * torch.eye(len(moves), dtype=z.dtype, device=z.device)
        products = products.nan_to_num(0, 0, 0)
        weights, _ = torch.linalg.solve_ex(products + ridge, torch.ones_like(products[0]))
        return (weights / weights.sum()) @ torch.stack(images)  # type: ignore[no-any-return]

    return following


def newton(f: Map) -> Next:
    """Return Newton's iteration, which solves the linear equations of the whole Jacobian at every step."""

    def following(z: Tensor, image: Tensor) -> Tensor:
        slopes: Tensor = torch.func.jacrev(f)(z).detach()
        eye = torch.eye(len(z), dtype=z.dtype, device=z.device)
        step, _ = torch.linalg.solve_ex(slopes - eye, image - z)  # infinite where it is singular
        return z - step  # type: ignore[no-any-return]

    return following


SOLVERS: dict[str, Callable[[Map], Next]] = {"anderson": anderson, "iteration": plain, "newton": newton}


def gmres(matrix: Map, b: Tensor) -> Tensor:
    """Return x with `matrix(x) = b`, by restarted GMRES.

    Where operators are recorded nothing can be asked of numbers: there it takes all steps of one search, and the result
    is NaN if that was not enough.

    Raises:
        ConvergenceError: If the residual stays above `eps ** 0.7` of `b`.
    """
    shape, b = b.shape, b.flatten()
    tol = torch.finfo(b.dtype).eps ** 0.7

    def apply(v: Tensor) -> Tensor:
        return matrix(v.view(shape)).flatten()

    x, bound = torch.zeros_like(b), tol * b.norm()
    if traced():
        x = _search(apply, b, None)
        return torch.where((b - apply(x)).norm() <= bound, x, torch.nan).view(shape)
    for _ in range(_CYCLES):
        r = b - apply(x)
        if everywhere(r.norm() <= bound):
            return x.view(shape)
        x = x + _search(apply, r, bound)
    r = b - apply(x)
    if everywhere(r.norm() <= bound):
        return x.view(shape)
    raise ConvergenceError(
        "The linear equations of the implicit function theorem must have a solution that GMRES finds.",
        expected=f"a residual of {tol:.1e} of the right side after {KRYLOV * _CYCLES} steps",
        got=f"{largest(r.norm() / b.norm()):.1e}",
        fix='Pass linear_solver="dense"; where that says that the Jacobian is singular, there is no derivative.',
    )


def _search(matrix: Map, r: Tensor, bound: Tensor | None) -> Tensor:
    """Return what has the least residual among the combinations of r, A r, A A r, ..."""
    eps = torch.finfo(r.dtype).eps
    length = r.norm()
    basis = (r / torch.where(length > 0, length, 1.0))[None]
    columns: list[Tensor] = []
    for _ in range(min(KRYLOV, len(r))):
        v = matrix(basis[-1])
        before = v.norm()
        column = torch.zeros_like(basis[:, 0])
        for _ in range(2):  # once leaves rounding errors along the basis
            along = basis @ v
            v, column = v - along @ basis, column + along
        rest = v.norm()
        new = rest > 10 * eps * before  # else the search is over, and further directions are zero
        columns.append(torch.cat([column, torch.where(new, rest, 0.0)[None]]))
        basis = torch.cat([basis, torch.where(new, v / torch.where(new, rest, 1.0), 0.0)[None]])
        if bound is not None:
            weights, left = _least(columns, length)
            if everywhere(left <= bound / 2):
                break
    if bound is None:
        weights, _ = _least(columns, length)
    return weights @ basis[:-1]


def _least(columns: list[Tensor], length: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the small least squares problem of a search; return the weights of the directions, and the residual."""
    rows = len(columns) + 1
    matrix = torch.stack([torch.nn.functional.pad(c, (0, rows - len(c))) for c in columns], 1)
    target = torch.cat([length[None], torch.zeros_like(columns[-1][:-1])])
    q, upper = torch.linalg.qr(matrix)
    diagonal = upper.diagonal()
    upper = upper + torch.diag_embed((diagonal == 0).to(upper.dtype))
    weights = torch.linalg.solve_triangular(upper, (q.mT @ target)[:, None], upper=True)[:, 0]
    return weights, (target - matrix @ weights).norm()
