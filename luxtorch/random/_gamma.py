"""Gamma variables: drawn by rejection in a fixed number of rounds, differentiated by implicit reparametrization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import InputError
from luxtorch._torch import compile_constant, primal_of, set_forward_mode
from luxtorch._transforms import derivatives, readable

from . import _ops
from ._draws import normal, uniform
from ._key import split

_ROUNDS = 7
"""A round accepts 95 % at least, and 98 % where the concentration is 1 or more."""


def gamma_parts(key: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Draw gamma variables as products; return one factor, and the logarithm of the other, which may be tiny.

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000; Figurnov et al., "Implicit
    reparameterization gradients", 2018.
    """
    a, shape, dtype = concentration.detach(), concentration.shape, concentration.dtype
    last, *keys = split(key, 1 + 2 * _ROUNDS).unbind()
    # One draws with a concentration greater by one, and multiplies by U^(1/a).
    d = a + 2 / 3
    c = (9 * d).rsqrt()
    factor, found = d, torch.zeros_like(a, dtype=torch.bool)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        s = c * normal(first, shape, dtype=dtype)
        # The authors' bound with its largest terms cancelled by hand.
        bound = 3 * d * (s.log1p() - s + s * s / 2) - d * s**3
        accepted = uniform(second, shape, dtype=dtype).log() < bound
        factor = torch.where(found | ~accepted, factor, d * (1 + s) ** 3)
        found = found | accepted
        if readable(found) and bool(found.all()):
            break
    log_other = -exponential(last, shape, dtype) / a
    return factor, log_other + _path(concentration, factor.log() + log_other)


def exponential(key: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    """Draw from the exponential distribution, from 1e-16 on."""
    # In double precision, as neither tail is to end at one of 2^24 numbers.
    drawn: Tensor = uniform(key, shape, dtype=torch.float64).neg().log1p().neg()
    return drawn.clamp_min(2.0**-54).to(dtype)


def _path(a: Tensor, log_x: Tensor) -> Tensor:
    """Return zeros whose derivative by `a` is that of the logarithm of a gamma variable."""
    if not torch.compiler.is_compiling():
        return _Path.apply(a, log_x)  # type: ignore[no-any-return]
    if derivatives():
        _refuse_compiled()
    # It would lose the derivative of an autograd.Function in silence. Of what it compiled, no second one can be taken.
    fixed = a.detach()
    return (a - fixed) * _ops.gamma_slope(fixed, log_x).nan_to_num()  # type: ignore[no-any-return]


@compile_constant
def _refuse_compiled() -> None:
    raise InputError(
        "torch.compile cannot trace derivatives of gamma, beta and dirichlet by torch.func.",
        expected="lt.jit, or a backward pass outside of the compiled function",
        got="torch.func inside of torch.compile",
        fix="Compile by lt.jit.",
    )


class _Path(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, log_x: Tensor) -> Tensor:
        return torch.zeros_like(log_x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent * _Slope.apply(*ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # torch has switched forward mode off; other levels of it have to see that this is differentiated again.
        with set_forward_mode(True):
            return tangent * _Slope.apply(*map(primal_of, ctx.saved_tensors))  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, log_x: Tensor) -> tuple[Tensor, int]:
        return _Path.apply(*_ops.batched(info, in_dims, a, log_x)), 0


class _Slope(torch.autograd.Function):
    """The derivative of the logarithm, which has none itself."""

    @staticmethod
    def forward(a: Tensor, log_x: Tensor) -> Tensor:
        return _ops.gamma_slope(a, log_x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise _second()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _second()

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, log_x: Tensor) -> tuple[Tensor, int]:
        return _Slope.apply(*_ops.batched(info, in_dims, a, log_x)), 0


def _second() -> InputError:
    return InputError(
        "Draws of gamma, beta and dirichlet have one derivative by their concentration, and no second.",
        fix="Detach the concentration where its second derivative is not meant.",
    )
