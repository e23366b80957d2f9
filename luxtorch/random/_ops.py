"""The random primitives as custom operators of torch, with rules for vmap, grad and compile.

The kernels themselves have no vmap rule, but they take a batch of keys: each rule below only moves the batch
of keys to the front. It is a rule of a `torch.library.custom_op` because the `vmap` method of an
`autograd.Function` does not trace in `compile(vmap(grad(...)))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import standard_gamma_grad
from luxtorch._transforms import transformed

from . import _philox, _seeded

_Batched: TypeAlias = tuple[Tensor, int]


def _backend(key: Tensor) -> ModuleType:
    return _philox if _philox.has_kernels(key.device.type) else _seeded


@torch.library.custom_op("luxtorch::split", mutates_args=())
def split(key: Tensor, number: int) -> Tensor:
    """Return `number` keys for each key, of shape (number, *batch, 2)."""
    return _backend(key).split(key, number)  # type: ignore[no-any-return]


@split.register_fake
def _(key: Tensor, number: int) -> Tensor:
    return key.new_empty((number, *key.shape))


@split.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], key: Tensor, number: int) -> _Batched:
    return split(_batch_first(key, in_dims[0]), number), 1


@torch.library.custom_op("luxtorch::fold_in", mutates_args=())
def fold_in(key: Tensor, data: int) -> Tensor:
    """Return the key that each key and a signed 64-bit integer lead to."""
    return _backend(key).fold_in(key, data)  # type: ignore[no-any-return]


@fold_in.register_fake
def _(key: Tensor, data: int) -> Tensor:
    return torch.empty_like(key)


@fold_in.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], key: Tensor, data: int) -> _Batched:
    return fold_in(_batch_first(key, in_dims[0]), data), 0


@torch.library.custom_op("luxtorch::fold_in_tensor", mutates_args=())
def fold_in_tensor(key: Tensor, data: Tensor) -> Tensor:
    """Return the key that each key and an integer on the device lead to.

    There is one integer, or one for each of the keys along the first dimensions.
    """
    if data.ndim == 0:
        return _backend(key).fold_in_tensor(key, data)  # type: ignore[no-any-return]
    pairs = zip(key.unbind(), data.unbind(), strict=True)
    return torch.stack([fold_in_tensor(one, number) for one, number in pairs]) if key.shape[0] else key.clone()


@fold_in_tensor.register_fake
def _(key: Tensor, data: Tensor) -> Tensor:
    return torch.empty_like(key)


@fold_in_tensor.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], key: Tensor, data: Tensor) -> _Batched:
    return fold_in_tensor(*batched(info, in_dims, key, data)), 0


@torch.library.custom_op("luxtorch::uniform", mutates_args=())
def uniform(key: Tensor, shape: Sequence[int], low: float, high: float, dtype: torch.dtype) -> Tensor:
    """Draw uniformly from [low, high)."""
    return _backend(key).uniform(key, shape, low, high, dtype)  # type: ignore[no-any-return]


@torch.library.custom_op("luxtorch::normal", mutates_args=())
def normal(key: Tensor, shape: Sequence[int], mean: float, std: float, dtype: torch.dtype) -> Tensor:
    """Draw from a normal distribution."""
    return _backend(key).normal(key, shape, mean, std, dtype)  # type: ignore[no-any-return]


for _draw in (uniform, normal):

    @_draw.register_fake
    def _(key: Tensor, shape: Sequence[int], first: float, second: float, dtype: torch.dtype) -> Tensor:
        return key.new_empty(shape, dtype=dtype)

    @_draw.register_vmap
    def _(
        info: Any,
        in_dims: tuple[int | None, ...],
        key: Tensor,
        shape: Sequence[int],
        first: float,
        second: float,
        dtype: torch.dtype,
        draw: Callable[..., Tensor] = _draw,
    ) -> _Batched:
        return draw(_batch_first(key, in_dims[0]), (info.batch_size, *shape), first, second, dtype), 0


@torch.library.custom_op("luxtorch::gamma_slope", mutates_args=())
def gamma_slope(a: Tensor, log_x: Tensor) -> Tensor:
    """Return the derivative, by `a`, of the logarithm of a gamma variable, where the distribution function stays."""
    x = log_x.exp()
    # Where x is tiny, the distribution function is x^a / Gamma(a + 1).
    tiny = log_x < math.log(torch.finfo(x.dtype).eps)
    slope = standard_gamma_grad(a.contiguous(), x.contiguous()) / x
    return torch.where(tiny, ((a + 1).digamma() - log_x) / a, slope)


@gamma_slope.register_fake
def _(a: Tensor, log_x: Tensor) -> Tensor:
    return torch.empty_like(log_x, memory_format=torch.contiguous_format)


@gamma_slope.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], a: Tensor, log_x: Tensor) -> _Batched:
    return gamma_slope(*batched(info, in_dims, a, log_x)), 0


def batched(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> list[Tensor]:
    """Return tensors with the batch as the first dimension."""
    return [
        one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
        for one, dim in zip(tensors, in_dims, strict=True)
    ]


def _batch_first(key: Tensor, dim: int | None) -> Tensor:
    assert dim is not None, "torch calls a vmap rule only where a tensor argument is batched"
    return key.movedim(dim, 0)


def call(operator: Callable[..., Tensor], kernel: str, key: Tensor, *arguments: Any) -> Tensor:
    """Run a primitive: through its operator under transforms, else by the kernel itself.

    Going through the operator costs more than the draw of a small mask itself. The kernels take no SymInt,
    as a size may be while `jit` traces.
    """
    if transformed() or type(arguments[0]) is torch.SymInt or not _philox.has_kernels(key.device.type):
        return operator(key, *arguments)
    return getattr(_philox, kernel)(key, *arguments)  # type: ignore[no-any-return]
