"""The mean of a tensor over all ranks, as one operation that transforms and the compiler know."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from luxtorch._torch import compile_constant, forward_level
from luxtorch._transforms import functional

from ._failure import collective


def mean(x: Tensor) -> Tensor:
    """Return the mean over all ranks: one all-reduce."""
    result: Tensor = _in_trace(x) if is_compiling() else _Mean.apply(x) if x.requires_grad or functional() else _mean(x)
    return result


def _in_trace(x: Tensor) -> Any:
    """Return the same where torch.compile traces: it refuses functions of autograd that have rules for transforms."""
    if _in_forward_mode():
        value, tangent = forward_ad.unpack_dual(x, level=0)  # type: ignore[no-untyped-call]
        if tangent is not None:
            return forward_ad.make_dual(mean(value), mean(tangent), level=0)  # type: ignore[no-untyped-call]
    return _Traced.apply(x) if x.requires_grad else _mean(x)


@compile_constant
def _in_forward_mode() -> bool:
    return forward_level() >= 0


@torch.library.custom_op("luxtorch::distributed_mean", mutates_args=())
def _mean(x: Tensor) -> Tensor:
    # Divided first, for the sum of many gradients may be beyond float16.
    total = (x / dist.get_world_size()).contiguous()
    with collective("all-reduce"):
        dist.all_reduce(total)
    return total


@_mean.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_mean.register_vmap
def _(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return mean(x), in_dims[0]  # element by element


class _Traced(torch.autograd.Function):
    """The mean with its derivative.

    What a rank differentiates is its own share of the mean of all ranks. So the cotangents are averaged, too.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _mean(x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return mean(grad)


class _Mean(_Traced):
    """The same for all transforms of eager code."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return mean(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return mean(x), in_dims[0]
