"""Functions of torch whose forward-mode derivative has no right derivative itself, with others in their place.

torch computes the forward-mode derivative of `solve`, `det` and their kin from a factorization that it takes for a
constant: what an outer transform makes of it is wrong. So inside of another derivative the functions of this folder
that use forward mode show what they differentiate a mode, which writes these functions in others that are right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from luxtorch._transforms import differentiated


def differentiable(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for forward mode whose derivatives can be differentiated by what is at work around."""
    if torch.compiler.is_compiling() or not differentiated():
        return f

    @wraps(f)
    def shown(*args: Any) -> Any:
        with _Rules():
            return f(*args)

    return shown


class _Rules(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRONG:
            warnings.warn(
                f"The derivative of {_WRONG[func]} that torch takes by forward mode is a wrong number where another "
                "transform differentiates it. Take it by reverse mode, or forward mode of a reverse-mode gradient.",
                stacklevel=2,
            )
        kwargs = dict(kwargs or {})
        rule = _RULES.get(func)
        if rule is not None and not args:
            args = (kwargs.pop("A" if "A" in kwargs else "input"),)
        if rule is None or kwargs.get("out") is not None or args[0].is_complex():
            return func(*args, **kwargs)
        return rule(*args, **kwargs)


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    if not left:
        return _solve(A.mT, B.mT).mT
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    b = B.unsqueeze(-1) if vector else B
    # The solution itself by torch, and a correction that is zero, but for its derivatives.
    x: Tensor = torch.linalg.solve(A.detach(), b.detach())
    x = x + torch.linalg.inv(A) @ (b - A @ x)
    return x.squeeze(-1) if vector else x


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    _, info = torch.linalg.solve_ex(A.detach(), B.detach(), left=left, check_errors=check_errors)
    return torch.return_types.linalg_solve_ex((_solve(A, B, left=left), info))  # type: ignore[attr-defined]


def _tensorsolve(A: Tensor, B: Tensor, dims: Any = None) -> Tensor:
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


_RULES: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys((torch.linalg.det, torch.det, Tensor.det), _det),
}

_WRONG: dict[Any, str] = {
    F.layer_norm: "layer_norm, unlike that of lt.LayerNorm,",
    F.batch_norm: "batch_norm, unlike that of lt.BatchNorm,",
    F.instance_norm: "instance_norm, unlike that of lt.InstanceNorm,",
    torch.layer_norm: "layer_norm, unlike that of lt.LayerNorm,",
    torch.batch_norm: "batch_norm, unlike that of lt.BatchNorm,",
    torch.linalg.householder_product: "householder_product",
    torch.cholesky_inverse: "cholesky_inverse",
    Tensor.cholesky_inverse: "cholesky_inverse",
}
