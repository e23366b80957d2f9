"""Random functions of torch (rand, normal_, nn.init, dropout, ...) with numbers from a key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luxtorch import random as lr
from luxtorch._torch import calculate_correct_fan, fractional_max_pool2d, fractional_max_pool3d
from luxtorch._transforms import functional
from luxtorch.core import InputError, LayerError, described, out_of_range
from luxtorch.layers._dropout import alpha_dropped, dropped

from ._keys import Keys


def keyed(function: Any, replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of a torch function that is not used if the caller passes a generator."""

    def drawn(keys: Keys, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if generator is not None:
            return function(*args, generator=generator, **kwargs)
        return replacement(keys, *args, **kwargs)

    return drawn


_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}

# The distributions, each from a key, a shape and a dtype.


def uniform(key: Tensor, shape: Sequence[int], dtype: torch.dtype, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw uniformly; for complex dtypes both parts."""
    low, high = _numbers(low, high)
    if dtype.is_complex:
        return torch.view_as_complex(lr.uniform(key, (*shape, 2), low=low, high=high, dtype=_REAL[dtype]))
    return lr.uniform(key, shape, low=low, high=high, dtype=dtype)


def normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw normally; the parts of a complex number have half the variance each."""
    mean, std = _numbers(mean, std)
    if dtype.is_complex:
        parts = lr.normal(key, (*shape, 2), std=std / math.sqrt(2), dtype=_REAL[dtype])
        return torch.view_as_complex(parts) + mean
    return lr.normal(key, shape, mean=mean, std=std, dtype=dtype)


def exponential(key: Tensor, shape: Sequence[int], dtype: torch.dtype, lambd: float = 1.0) -> Tensor:
    """Draw from the exponential distribution; never zero, since a logarithm often follows."""
    return -torch.log1p(-lr.uniform(key, shape, dtype=dtype)).clamp_max(-torch.finfo(dtype).eps / 2) / lambd


def integers(key: Tensor, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Draw integers from low to high - 1; of a range above 2^53, up to 2^32 of the last are never drawn."""
    low, high = _numbers(low, high)
    if high - low <= 2**53:
        return lr.randint(key, shape, low, high)
    first, second = lr.split(key)
    return (lr.randint(first, shape, 0, (high - low) >> 32) << 32) + lr.randint(second, shape, 0, 2**32) + low


def _numbers(*values: Any) -> tuple[Any, ...]:
    """Return numbers for what are numbers to torch: also tensors without dimensions."""
    return tuple(value.item() if isinstance(value, Tensor) else value for value in values)


def poisson(key: Tensor, rate: Tensor) -> Tensor:
    """Draw whole numbers of the dtype of their rates."""
    return lr.poisson(key, rate.detach()).to(rate.dtype)


# Functions that return a new tensor.


def _rand(keys: Keys, *size: Any, **options: Any) -> Tensor:
    return _made(keys, uniform, _shape(size, options), **options)


def _randn(keys: Keys, *size: Any, **options: Any) -> Tensor:
    return _made(keys, normal, _shape(size, options), **options)


def _randint(keys: Keys, *args: Any, **options: Any) -> Tensor:
    bounds = args if "size" in options else args[:-1]
    shape = options.pop("size") if "size" in options else args[-1]
    return _made(keys, _between(bounds, options), shape, default=torch.int64, **options)


def _randperm(keys: Keys, n: int, **options: Any) -> Tensor:
    return _made(keys, lambda key, shape, dtype: lr.permutation(key, n).to(dtype), (n,), default=torch.int64, **options)


def _rand_like(keys: Keys, input: Tensor, **options: Any) -> Tensor:
    return _made(keys, uniform, tuple(input.shape), **_like(input, options))


def _randn_like(keys: Keys, input: Tensor, **options: Any) -> Tensor:
    return _made(keys, normal, tuple(input.shape), **_like(input, options))


def _randint_like(keys: Keys, input: Tensor, *bounds: int, **options: Any) -> Tensor:
    draw = _between(bounds, options)
    return _made(keys, draw, tuple(input.shape), **_like(input, options))


def _normal(keys: Keys, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **options: Any) -> Tensor:
    tensors = [part for part in (mean, std) if isinstance(part, Tensor)]
    if not tensors:
        return _made(keys, lambda key, shape, dtype: normal(key, shape, dtype, mean, std), size, **options)
    mean, std = (part.detach() if isinstance(part, Tensor) else part for part in (mean, std))

    def draw(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return normal(key, shape, dtype).mul(std).add(mean).to(dtype)

    shape = torch.Size(torch.broadcast_shapes(*(part.shape for part in tensors)))  # type: ignore[no-untyped-call]
    return _made(keys, draw, shape, **_like(tensors[0], options))


def _bernoulli(keys: Keys, input: Tensor, p: float | None = None, **options: Any) -> Tensor:
    def draw(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return lr.bernoulli(key, _probability(input.detach() if p is None else p), shape).to(dtype)

    return _made(keys, draw, tuple(input.shape), **_like(input, options))


def _multinomial(keys: Keys, input: Tensor, num_samples: int, replacement: bool = False, **options: Any) -> Tensor:
    def draw(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # The smallest of independent exponential variables with these rates are such a draw.
        wide = torch.promote_types(input.dtype, torch.float32)
        rates, size = input.detach().to(wide), tuple(input.shape)
        if not replacement:
            return (rates / exponential(key, size, wide)).topk(num_samples).indices
        noise = exponential(key, (*size[:-1], num_samples, size[-1]), wide)
        return (rates.unsqueeze(-2) / noise).argmax(-1)

    return _made(keys, draw, (*input.shape[:-1], num_samples), **_like(input, options, torch.int64))


def _made(
    keys: Keys,
    draw: Callable[[Tensor, Any, torch.dtype], Tensor],
    shape: Sequence[int],
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    requires_grad: bool = False,
    memory_format: torch.memory_format | None = None,
    default: torch.dtype | None = None,
    **layout: Any,
) -> Tensor:
    """Draw a tensor with the options of a torch function that makes one."""
    key = keys.next()
    if out is not None:
        dtype, device = out.dtype, out.device
    if not key.is_meta:  # there only shapes matter
        key = key.to(torch.empty(0).device if device is None else device)
    value = draw(key, shape, dtype or default or torch.get_default_dtype())
    if out is not None:
        return (out if out.shape == value.shape else out.resize_(value.shape)).copy_(value)
    if memory_format not in (None, torch.preserve_format):
        value = value.contiguous(memory_format=memory_format)
    return value.requires_grad_() if requires_grad and not functional() else value


def _shape(size: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if "size" in options:
        return options.pop("size")
    return size[0] if len(size) == 1 and isinstance(size[0], list | tuple) else size


def _like(input: Tensor, options: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {"dtype": dtype or input.dtype, "device": input.device, **given}


def _between(bounds: Sequence[int], options: dict[str, Any]) -> Callable[[Tensor, Any, torch.dtype], Tensor]:
    named = [options.pop(name) for name in ("low", "high") if name in options]
    low, high = (0, *bounds, *named)[-2:]
    return lambda key, shape, dtype: integers(key, shape, low, high).to(dtype)


def _probability(p: Any) -> Any:
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise out_of_range("p", p, "a probability from 0 to 1")
    return p


_DRAWS: dict[Any, Callable[..., Any]] = {
    function: keyed(function, replacement)
    for function, replacement in (
        (torch.rand, _rand),
        (torch.randn, _randn),
        (torch.randint, _randint),
        (torch.randperm, _randperm),
        (torch.rand_like, _rand_like),
        (torch.randn_like, _randn_like),
        (torch.randint_like, _randint_like),
        (torch.normal, _normal),
        (torch.bernoulli, _bernoulli),
        (Tensor.bernoulli, _bernoulli),
        (torch.multinomial, _multinomial),
        (Tensor.multinomial, _multinomial),
    )
}


def fill_uniform(keys: Keys, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Fill a tensor as `Tensor.uniform_` does; its bound `from` is a keyword of Python."""
    return x.copy_(uniform(keys.next(), tuple(x.shape), x.dtype, low, high))


def fill_normal(keys: Keys, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill a tensor as `Tensor.normal_` does."""
    return x.copy_(normal(keys.next(), tuple(x.shape), x.dtype, mean, std))


def _fill_between(keys: Keys, x: Tensor, *bounds: float, **named: float) -> Tensor:
    low, high = bounds[:1] or (named.get("from", 0.0),), bounds[1:] or (named.get("to", 1.0),)
    return fill_uniform(keys, x, *low, *high)


def _fill_bernoulli(keys: Keys, x: Tensor, p: float | Tensor = 0.5) -> Tensor:
    return x.copy_(lr.bernoulli(keys.next(), p, tuple(x.shape)))


def _exponential(keys: Keys, x: Tensor, lambd: float = 1.0) -> Tensor:
    return x.copy_(exponential(keys.next(), tuple(x.shape), x.dtype, lambd))


def _geometric(keys: Keys, x: Tensor, p: float) -> Tensor:
    if not 0 < p < 1:
        raise out_of_range("p", p, "a probability, above 0 and below 1")
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
    """Return how many consecutive integers from 0 a dtype can hold."""
    if dtype == torch.bool:
        return 2
    if dtype.is_floating_point:
        return int(2 / torch.finfo(dtype).eps) + 1
    return torch.iinfo(dtype).max + 1


def _with_parameter(draw: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a replacement of a function of a tensor of parameters, of which each makes a number."""
    return lambda keys, input: draw(keys.next(), input)


def _batchable(function: Any) -> Callable[..., Tensor]:
    """Return a function that makes a tensor batched by vmap, so that random numbers can be written into it.

    Ones are batched by keys only: they may be a mask whose values are read.
    """
    ones = "ones" in function.__name__

    def made(keys: Keys, *args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = function(*args, **kwargs)
        if not functional() or tensor.dtype == torch.uint64:  # a key; torch has no operators for it
            return tensor
        # Under vmap, drawn and computed values are batched, and cannot be written into a tensor that is not.
        real = tensor.is_floating_point() or tensor.is_complex()
        true = keys.batch if real and not ones else keys.rng.new_ones((), dtype=torch.bool)
        return torch.where(true.to(tensor.device), tensor, tensor)

    return made


def _scatter(keys: Keys, x: Tensor, dim: int, index: Tensor, *value: Any, **options: Any) -> Tensor:
    """Scatter a number as a tensor, for which torch has a batching rule."""
    number = value[0] if value else options.get("value")
    if functional() and isinstance(number, int | float) and "reduce" not in options:
        return torch.scatter(x, dim, index, torch.full_like(index, number, dtype=x.dtype))
    return torch.scatter(x, dim, index, *value, **options)


def _scatter_(keys: Keys, x: Tensor, *args: Any, **options: Any) -> Tensor:
    return x.copy_(_scatter(keys, x, *args, **options)) if functional() else x.scatter_(*args, **options)


def _clamp_(keys: Keys, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """Clamp in place by an operator that has a batching rule; torch's gamma distribution clamps what it draws."""
    return x.copy_(x.clamp(*args, **options)) if functional() else x.clamp_(*args, **options)


def _unsupported(name: str, function: Any) -> Callable[..., Any]:
    """Return a replacement that raises, for a function without a counterpart that takes a key."""

    def refused(keys: Keys, *args: Any, **kwargs: Any) -> Any:
        raise LayerError(
            f"{name} draws from torch's global generator, and luxtorch has no {name} that draws from a key.",
            fix="Draw outside of the module and pass the numbers in, or give the function a generator of your own.",
        )

    return keyed(function, refused)


_FILLING: dict[Any, Callable[..., Any]] = {
    **{
        function: keyed(function, replacement)
        for function, replacement in (
            (Tensor.uniform_, _fill_between),
            (Tensor.normal_, fill_normal),
            (Tensor.bernoulli_, _fill_bernoulli),
            (Tensor.exponential_, _exponential),
            (Tensor.geometric_, _geometric),
            (Tensor.cauchy_, _cauchy),
            (Tensor.log_normal_, _log_normal),
            (Tensor.random_, _random),
        )
    },
    **{
        function: _batchable(function)
        for kind in ("empty", "zeros", "ones")
        for function in (getattr(torch, kind), getattr(torch, f"{kind}_like"), getattr(Tensor, f"new_{kind}"))
    },
    Tensor.new: _batchable(Tensor.new),
    torch.eye: _batchable(torch.eye),
    Tensor.scatter_: _scatter_,
    Tensor.scatter: _scatter,
    torch.scatter: _scatter,
    Tensor.clamp_: _clamp_,
    **{
        getattr(torch, name): keyed(getattr(torch, name), _with_parameter(draw))
        for name, draw in (("poisson", poisson), ("_standard_gamma", lr.gamma), ("_sample_dirichlet", lr.dirichlet))
    },
    **{
        getattr(torch, name): _unsupported(f"torch.{name}", getattr(torch, name))
        for name in ("binomial", "native_dropout", "_fused_dropout")
    },
}


def _init_uniform(keys: Keys, tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    with torch.no_grad():
        return fill_uniform(keys, tensor, a, b)


def _init_normal(keys: Keys, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    with torch.no_grad():
        return fill_normal(keys, tensor, mean, std)


def _kaiming_uniform(
    keys: Keys, tensor: Tensor, a: float = 0, mode: Any = "fan_in", nonlinearity: Any = "leaky_relu"
) -> Tensor:
    if 0 in tensor.shape:
        return tensor
    fan = calculate_correct_fan(tensor, mode)
    bound = nn.init.calculate_gain(nonlinearity, a) * math.sqrt(3 / fan)
    return _init_uniform(keys, tensor, -bound, bound)


_INITIALIZERS: dict[Any, Callable[..., Any]] = {
    function: keyed(function, replacement)
    for function, replacement in (
        (nn.init.uniform_, _init_uniform),
        (nn.init.normal_, _init_normal),
        (nn.init.kaiming_uniform_, _kaiming_uniform),
    )
}


def _functional_dropout(
    keys: Keys, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    y = _dropout(keys, input, p, training)
    return _write(input, y) if inplace else y


def _dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return dropped(input, keys.next(), p, tuple(input.shape)) if _drops(p, train) else input


def _feature_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return dropped(input, keys.next(), p, _per_feature(input)) if _drops(p, train) else input


def _alpha_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return alpha_dropped(input, keys.next(), p, tuple(input.shape)) if _drops(p, train) else input


def _feature_alpha_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return alpha_dropped(input, keys.next(), p, _per_feature(input)) if _drops(p, train) else input


def _rrelu(keys: Keys, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Tensor:
    slope: Tensor | float = (lower + upper) / 2
    if training:
        slope = lr.uniform(keys.next(), tuple(input.shape), low=lower, high=upper, dtype=input.dtype)
    # Not leaky_relu, whose derivative reads the input, which may have been overwritten.
    return torch.where(input > 0, input, input * slope)


def _drops(p: float, train: bool) -> bool:
    if not 0 <= p <= 1:
        raise out_of_range("p", p, "a probability from 0 to 1")
    return train and p > 0


def _per_feature(input: Tensor) -> tuple[int, ...]:
    if input.ndim < 2:
        raise InputError(
            "The input must have two or more dimensions, of which the second is the channels.", got=described(input)
        )
    return (*input.shape[:2], *(1,) * (input.ndim - 2))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def in_place(keys: Keys, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _write(input, function(keys, input, *args, **kwargs))

    return in_place


def _write(input: Tensor, y: Tensor) -> Tensor:
    if y is input:
        return input
    try:
        return input.copy_(y)
    except RuntimeError:
        # Under vmap over keys, y may be batched where the input is not. Nearly all code uses the result.
        if not functional():
            raise
        return y


_DROPOUTS: dict[Any, Callable[..., Any]] = {
    F.dropout: _functional_dropout,
    torch.dropout: _dropout,
    torch.dropout_: _in_place(_dropout),
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _in_place(_feature_dropout),
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _in_place(_alpha_dropout),
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _in_place(_feature_alpha_dropout),
    torch.rrelu: keyed(torch.rrelu, _rrelu),
    torch.rrelu_: keyed(torch.rrelu_, _in_place(_rrelu)),
}


def _pooled(kernel: Callable[..., tuple[Tensor, Tensor]], order: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the replacement of a kernel; `order` gives the sample that belongs to each dimension."""

    def pooled(keys: Keys, x: Tensor, window: Any, output: Any, samples: Tensor) -> tuple[Tensor, Tensor]:
        if not functional():
            return kernel(x, window, output, samples)
        dims = len(order)
        sizes, counts = ((given,) * dims if isinstance(given, int) else tuple(given) for given in (window, output))
        # For a batch of one, or without a batch, there may be more samples than needed.
        samples = samples[: 1 if x.ndim == dims + 1 else x.shape[0]].reshape(*x.shape[:-dims], dims)
        index = torch.zeros((), dtype=torch.int64, device=x.device)
        for dim in range(dims):
            full = x.shape[dim - dims]
            rows = _windows(samples[..., order[dim]], full, sizes[dim], counts[dim])
            # (..., windows, places in one), where each dimension multiplies the number of both.
            index = index[..., :, None, :, None] * full + rows[..., None, :, None, :] if dim else rows
            index = index.flatten(-2).flatten(-3, -2) if dim else index
        values = x.flatten(-dims).gather(-1, index.flatten(-2)).view(index.shape)
        best = values.argmax(-1, keepdim=True)
        shape = (*x.shape[:-dims], *counts)
        return values.gather(-1, best).view(shape), index.gather(-1, best).view(shape)

    return pooled


def _windows(sample: Tensor, full: int, size: int, count: int) -> Tensor:
    """Return the indices that each window covers in one dimension, (..., count, size)."""
    u, numbers = sample[..., None], torch.arange(count, device=sample.device)
    step = (full - size) / (count - 1) if count > 1 else 0.0
    starts = ((numbers + u) * step).long() - (u * step).long()
    starts = torch.where(numbers == count - 1, full - size, starts)
    return starts[..., None] + torch.arange(size, device=sample.device)


_POOLS: dict[Any, Callable[..., Any]] = {
    fractional_max_pool2d: _pooled(fractional_max_pool2d, (1, 0)),
    fractional_max_pool3d: _pooled(fractional_max_pool3d, (0, 1, 2)),
}


REPLACEMENTS: dict[Any, Callable[..., Any]] = {**_DRAWS, **_FILLING, **_INITIALIZERS, **_DROPOUTS, **_POOLS}
