"""The methods that fill a tensor with random numbers, drawing from a key; and tensors that they can fill."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch import random as lr
from luxtorch._transforms import functional
from luxtorch.core import InputError, LayerError

from ._keys import Keys
from ._pure_random import exponential, integers, keyed, normal, uniform


def fill_uniform(keys: Keys, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw `Tensor.uniform_`; torch calls the bounds `from`, which is no name in Python, and `to`."""
    return x.copy_(uniform(keys.next(), tuple(x.shape), x.dtype, low, high))


def fill_normal(keys: Keys, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw `Tensor.normal_`."""
    return x.copy_(normal(keys.next(), tuple(x.shape), x.dtype, mean, std))


def _uniform(keys: Keys, x: Tensor, *bounds: float, **named: float) -> Tensor:
    low, high = bounds[:1] or (named.get("from", 0.0),), bounds[1:] or (named.get("to", 1.0),)
    return fill_uniform(keys, x, *low, *high)


def _bernoulli(keys: Keys, x: Tensor, p: float | Tensor = 0.5) -> Tensor:
    return x.copy_(lr.bernoulli(keys.next(), p, tuple(x.shape)))


def _exponential(keys: Keys, x: Tensor, lambd: float = 1.0) -> Tensor:
    return x.copy_(exponential(keys.next(), tuple(x.shape), x.dtype, lambd))


def _geometric(keys: Keys, x: Tensor, p: float) -> Tensor:
    if not 0 < p < 1:
        raise InputError("geometric_ takes a probability.", expected="0 < p < 1", got=f"p={p}")
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return x.copy_(exponential(keys.next(), tuple(x.shape), dtype, -math.log1p(-p)).ceil())


def _cauchy(keys: Keys, x: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    turns = uniform(keys.next(), tuple(x.shape), x.dtype, -0.5, 0.5)
    return x.copy_(median + sigma * torch.tan(math.pi * turns))


def _log_normal(keys: Keys, x: Tensor, mean: float = 1.0, std: float = 2.0) -> Tensor:
    return x.copy_(normal(keys.next(), tuple(x.shape), x.dtype, mean, std).exp())


def _random(keys: Keys, x: Tensor, *bounds: int, **named: int) -> Tensor:
    given = (*bounds, *(named[name] for name in ("from", "to") if named.get(name) is not None))
    low, high = (0, *(given or (_all_of(x.dtype),)))[-2:]
    return x.copy_(integers(keys.next(), tuple(x.shape), low, high))


def _all_of(dtype: torch.dtype) -> int:
    """Return how many integers a dtype counts without a gap, from 0."""
    if dtype == torch.bool:
        return 2
    if dtype.is_floating_point:
        return int(2 / torch.finfo(dtype).eps) + 1
    return torch.iinfo(dtype).max + 1


def _fillable(function: Any) -> Callable[..., Tensor]:
    """Return a function that makes a tensor such that draws can be written into it, and results where need be.

    Not into ones, which may be a mask: it may be asked for its values, which a batch has not.
    """
    ones = "ones" in function.__name__

    def made(keys: Keys, *args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = function(*args, **kwargs)
        if not functional() or tensor.dtype == torch.uint64:  # keys, which torch cannot add
            return tensor
        # Under vmap, what is drawn or computed is a batch: it has no room in a tensor that is none.
        real = tensor.is_floating_point() or tensor.is_complex()
        true = keys.batch if real and not ones else keys.rng.new_ones((), dtype=torch.bool)
        return torch.where(true.to(tensor.device), tensor, tensor)

    return made


def _scatter(keys: Keys, x: Tensor, dim: int, index: Tensor, *value: Any, **options: Any) -> Tensor:
    """Scatter a number as a tensor, which is what torch has a batching rule for."""
    number = value[0] if value else options.get("value")
    if functional() and isinstance(number, int | float) and "reduce" not in options:
        return torch.scatter(x, dim, index, torch.full_like(index, number, dtype=x.dtype))
    return torch.scatter(x, dim, index, *value, **options)


def _scatter_(keys: Keys, x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x.copy_(_scatter(keys, x, *args, **options)) if functional() else x.scatter_(*args, **options)


def _refused(name: str, function: Any) -> Callable[..., Any]:
    """Return a replacement for a function that has no counterpart with a key."""

    def refused(keys: Keys, *args: Any, **kwargs: Any) -> Any:
        raise LayerError(
            f"{name} draws from torch's global generator, and luxtorch has no {name} that draws from a key.",
            expected="a forward that draws uniform, normal or other numbers which luxtorch knows",
            fix="Draw outside of the module and pass the numbers in, or give the function a generator of your own.",
        )

    return keyed(function, refused)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **{
        function: keyed(function, replacement)
        for function, replacement in (
            (Tensor.uniform_, _uniform),
            (Tensor.normal_, fill_normal),
            (Tensor.bernoulli_, _bernoulli),
            (Tensor.exponential_, _exponential),
            (Tensor.geometric_, _geometric),
            (Tensor.cauchy_, _cauchy),
            (Tensor.log_normal_, _log_normal),
            (Tensor.random_, _random),
        )
    },
    **{
        function: _fillable(function)
        for kind in ("empty", "zeros", "ones")
        for function in (getattr(torch, kind), getattr(torch, f"{kind}_like"), getattr(Tensor, f"new_{kind}"))
    },
    Tensor.new: _fillable(Tensor.new),
    torch.eye: _fillable(torch.eye),
    Tensor.scatter_: _scatter_,
    Tensor.scatter: _scatter,
    torch.scatter: _scatter,
    **{
        getattr(torch, name): _refused(f"torch.{name}", getattr(torch, name))
        for name in ("poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "native_dropout", "_fused_dropout")
    },
}
