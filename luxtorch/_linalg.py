"""Functions of torch.linalg with forward-mode derivatives that can be differentiated again.

torch computes the forward-mode derivative of `solve`, `det` and similar functions from a factorization that it treats
as a constant, so that higher derivatives through it are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def by_rule(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch that is in `RULES`, by its replacement where that applies."""
    if not args:
        args = (kwargs.pop("A" if "A" in kwargs else "input"),)
    if kwargs.get("out") is not None or args[0].is_complex():
        return func(*args, **kwargs)
    return RULES[func](*args, **kwargs)


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    if not left:
        return _solve(A.mT, B.mT).mT
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    b = B.unsqueeze(-1) if vector else B
    # The value is that of torch; the added term is zero and carries the derivatives.
    x: Tensor = torch.linalg.solve(A.detach(), b.detach())
    x = x + torch.linalg.inv(A) @ (b - A @ x)
    return x.squeeze(-1) if vector else x


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    _, info = torch.linalg.solve_ex(A.detach(), B.detach(), left=left, check_errors=check_errors)
    return torch.return_types.linalg_solve_ex((_solve(A, B, left=left), info))  # type: ignore[attr-defined]


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return _solve(A.reshape(B.numel(), B.numel()), B.flatten()).reshape(A.shape[B.ndim :])


def _log_of_det(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sign of a determinant, and the logarithm of its absolute value."""
    sign = torch.linalg.slogdet(A.detach())[0]
    return sign, torch.linalg.lu_factor(A)[0].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def _slogdet(A: Tensor) -> Any:
    return torch.return_types.linalg_slogdet(_log_of_det(A))  # type: ignore[attr-defined]


def _logdet(A: Tensor) -> Tensor:
    sign, log = _log_of_det(A)
    return log.masked_fill(sign < 0, torch.nan)


def _det(A: Tensor) -> Tensor:
    # The sign of the determinant is that of the product times that of the permutation.
    product: Tensor = torch.linalg.lu_factor(A)[0].diagonal(dim1=-2, dim2=-1).prod(-1)
    return product * (torch.linalg.slogdet(A.detach())[0] * product.detach().sign())  # type: ignore[no-any-return]


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys((torch.linalg.det, torch.det, Tensor.det), _det),
}
"""Functions of torch, and replacements with right derivatives under every nesting of transforms."""
