"""More distributions, made of the draws of `_draws.py` by operators that all transforms know."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from luxtorch._errors import InputError, out_of_range, wrong_shape, wrong_type
from luxtorch._transforms import readable

from . import _gamma
from ._checks import common_shape, drawn, parameters, require, single, spread
from ._draws import normal, permutation, randint, rows, uniform
from ._key import is_whole


def exponential(key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype | None = None) -> Tensor:
    """Draw from the exponential distribution with mean 1.

    Args:
        key: A key; or a batch of keys of shape (*batch, 2), which draw a slice each: `shape` then starts with `batch`.
        shape: The shape of the output.
        dtype: A real floating dtype; the default dtype of torch if None.

    Returns:
        A tensor of `shape` on the key's device. Divide it by a rate for another one.

    Example:
        >>> import luxtorch.random as lr
        >>> bool((lr.exponential(lr.key(0), (1000,)) > 0).all())
        True
    """
    return _gamma.exponential(key, *drawn(key, shape, dtype))


def gumbel(key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype | None = None) -> Tensor:
    """Draw from the standard Gumbel distribution, that of the maximum of many variables.

    Args:
        key: A key, or a batch of keys.
        shape: The shape of the output.
        dtype: A real floating dtype; the default dtype of torch if None.

    Returns:
        A tensor of `shape` on the key's device.

    Example:
        >>> import luxtorch.random as lr
        >>> lr.gumbel(lr.key(0), (2, 3)).shape
        torch.Size([2, 3])
    """
    shape, dtype = drawn(key, shape, dtype)
    return -_gamma.exponential(key, shape, torch.promote_types(dtype, torch.float32)).log().to(dtype)


def categorical(key: Tensor, logits: Tensor, dim: int = -1, shape: Sequence[int] | None = None) -> Tensor:
    """Draw a category with probabilities in proportion to exp(logits).

    Args:
        key: A key, or a batch of keys.
        logits: Logarithms of the probabilities, up to a constant; `-inf` for a category that is never drawn.
        dim: The dimension of the categories.
        shape: The shape of the output, to which that of `logits` without `dim` broadcasts; the latter if None.

    Returns:
        An int64 tensor of `shape` on the key's device, by the largest of the logits with Gumbel noise.

    Raises:
        InputError: If there is no category, or all logits are `-inf`, or one is NaN or `inf`: where that can be seen
            without waiting for a device; elsewhere, the category is -1.
        DTypeError: If `logits` is not a floating point tensor.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> logits = torch.tensor([0.5, 0.0, 0.5]).log()
        >>> sorted(set(lr.categorical(lr.key(0), logits, shape=(100,)).tolist()))
        [0, 2]
    """
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        raise wrong_type("logits", logits, "a floating point tensor")
    if not is_whole(dim):
        raise wrong_type("dim", dim, "an int")
    if not -logits.ndim <= dim < logits.ndim:
        raise out_of_range("dim", dim, f"a dimension of logits, which has {logits.ndim}")
    logits = logits.detach().movedim(dim, -1)
    *batch, number = logits.shape
    if not number:
        raise wrong_shape("logits", logits, "one category at least")
    shape, dtype = drawn(key, batch if shape is None else shape, torch.promote_types(logits.dtype, torch.float32))
    logits = spread("logits", logits, (*shape, number))
    largest, category = (logits + gumbel(key, (*shape, number), dtype=dtype)).max(-1)
    return _index("logits", category, largest, largest.isfinite(), "below inf, and above -inf in one category at least")


def choice(
    key: Tensor,
    x: int | Tensor,
    shape: Sequence[int] = (),
    *,
    replace: bool = True,
    p: Tensor | None = None,
) -> Tensor:
    """Draw from the numbers 0, ..., x - 1, or from the rows of a tensor.

    Args:
        key: One key; for a batch of keys, use `torch.vmap`.
        x: How many numbers; or a tensor, of which rows are drawn along its first dimension.
        shape: The shape of the draws.
        replace: Whether one number can be drawn again.
        p: A weight for each number or row; they need not add up to 1. All the same if None.

    Returns:
        An int64 tensor of `shape` on the key's device; or a tensor of shape (*shape, *x.shape[1:]).

    Raises:
        InputError: If there is nothing to draw from, or too little without replacement; or a weight is negative or not
            finite, where that can be seen without waiting for a device: elsewhere, the number is -1, and rows are asked
            for that are not there, which torch reports.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> lr.choice(lr.key(0), 3, (3,), replace=False).sort().values
        tensor([0, 1, 2])
        >>> lr.choice(lr.key(0), torch.eye(2), (2,), p=torch.tensor([0.0, 1.0]))
        tensor([[0., 1.],
                [0., 1.]])
    """
    number = rows(x)
    shape, _ = drawn(single(key), shape, None)
    size = math.prod(shape)
    if size > (math.inf if replace and number else number):
        fix = "" if replace else "Pass replace=True."
        raise out_of_range("x", number, f"at least {1 if replace else size}, to draw {size}", fix=fix)
    if p is not None:
        index = _weighted(key, p, number, size, replace).reshape(shape)
    elif replace:
        index = randint(key, shape, 0, max(number, 1))
    else:
        index = permutation(key, number)[:size].reshape(shape)
    if not isinstance(x, Tensor):
        return index
    # Compiled code would take the last row for -1.
    index = torch.where(index < 0, number, index) if p is not None else index
    return x.index_select(0, index.flatten()).reshape(*shape, *x.shape[1:])


def _weighted(key: Tensor, p: Tensor, number: int, size: int, replace: bool) -> Tensor:
    """Draw some of `number` indices by their weights."""
    if not isinstance(p, Tensor) or p.is_complex():
        raise wrong_type("p", p, "a tensor of weights")
    if p.shape != (number,):
        raise wrong_shape("p", p, (number,))
    if not size:
        return torch.empty(0, dtype=torch.int64, device=key.device)
    p = p.detach().double()
    good = (p >= 0) & (p < torch.inf)
    require("p", p, good, "weights that are at least 0 and finite")
    if replace:
        ends = p.cumsum(0)
        # Above zero, so that no weight of zero is found at the start.
        places = ends[-1] * (1 - uniform(key, (size,), dtype=torch.float64))
        index, total = torch.searchsorted(ends, places), ends[-1].expand(size)
        return _index(
            "p", index, total, (total > 0) & total.isfinite() & good.all(), "weights of which one is positive"
        )
    scores, index = (p.log() + gumbel(key, (number,), dtype=torch.float64)).topk(size)
    return _index("p", index, scores.exp(), scores.isfinite() & good.all(), f"weights of which {size} are positive")


def _index(name: str, index: Tensor, value: Tensor, ok: Tensor, expected: str) -> Tensor:
    """Return drawn integers, -1 where they could not be drawn, or raise where that is seen."""
    require(name, value, ok, expected)
    return torch.where(ok, index, -1)


def gamma(
    key: Tensor,
    concentration: float | Tensor,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw from the gamma distribution with rate 1.

    Args:
        key: A key, or a batch of keys.
        concentration: The shape parameter, a positive number or a tensor that broadcasts to `shape`.
        shape: The shape of the output; that of `concentration` if None.
        dtype: A real floating dtype; that of `concentration` if None.

    Returns:
        A tensor of `shape` on the key's device. It has a first derivative by `concentration`, exact to about 1e-3, by
        implicit reparametrization. Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000.

    Raises:
        InputError: If `concentration` is not positive, where that can be seen without waiting for a device; elsewhere,
            the draw is NaN.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> concentration = torch.tensor([0.5, 2.0, 100.0])
        >>> slopes = torch.func.grad(lambda c: lr.gamma(lr.key(0), c).sum())(concentration)
        >>> bool((slopes > 0).all())
        True
    """
    shape, dtype, (a,) = parameters(key, shape, dtype, _positive, "positive", concentration=concentration)
    factor, log_other = _gamma.gamma_parts(key, a)
    return (factor * log_other.exp()).to(dtype)


def _positive(x: float | Tensor) -> bool | Tensor:
    return x > 0


def beta(
    key: Tensor,
    a: float | Tensor,
    b: float | Tensor,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw from the beta distribution.

    Args:
        key: A key, or a batch of keys.
        a: The first shape parameter, a positive number or a tensor that broadcasts to `shape`.
        b: The second one.
        shape: The shape of the output; that to which `a` and `b` broadcast if None.
        dtype: A real floating dtype; that of `a` and `b` if None.

    Returns:
        A tensor of `shape` on the key's device, with first derivatives as those of `gamma`.

    Raises:
        InputError: If a parameter is not positive, as for `gamma`.

    Example:
        >>> import luxtorch.random as lr
        >>> draw = lr.beta(lr.key(0), 2.0, 3.0, (1000,))
        >>> bool(draw.min() > 0), bool(draw.max() < 1)
        (True, True)
    """
    shape, dtype, both = parameters(key, shape, dtype, _positive, "positive", a=a, b=b)
    return _shares(key, torch.stack(both, -1))[..., 0].to(dtype)


def dirichlet(key: Tensor, concentration: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Draw from the Dirichlet distribution: shares that add up to 1.

    Args:
        key: A key, or a batch of keys.
        concentration: Positive, of shape (..., k).
        shape: The shape of the output without its last dimension, k; that of `concentration` if None.

    Returns:
        A tensor of shape (*shape, k) on the key's device, with first derivatives as those of `gamma`.

    Raises:
        InputError: If `concentration` is not positive, as for `gamma`, or k is 0.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> lr.dirichlet(lr.key(0), torch.ones(3), (2,)).sum(-1)
        tensor([1.0000, 1.0000])
    """
    if not isinstance(concentration, Tensor):
        raise wrong_type("concentration", concentration, "a tensor")
    if concentration.ndim == 0 or concentration.shape[-1] == 0:
        raise wrong_shape("concentration", concentration, "(..., k), with k of 1 at least")
    shape, _ = drawn(key, concentration.shape[:-1] if shape is None else shape, None)
    wanted = (*shape, concentration.shape[-1])
    _, dtype, (a,) = parameters(key, wanted, None, _positive, "positive", concentration=concentration)
    return _shares(key, a).to(dtype)


def _shares(key: Tensor, concentration: Tensor) -> Tensor:
    """Draw gamma variables, divided by their sums along the last dimension, which would underflow as they are."""
    factor, log_other = _gamma.gamma_parts(key, concentration)
    weight = factor * (log_other - log_other.detach().amax(-1, keepdim=True)).exp()
    return weight / weight.sum(-1, keepdim=True)


_MANY = 10
"""From this rate on, an expansion is near enough to the quantile; below, some steps lead to it."""

_STEPS = 45
"""Poisson variables of smaller rates are below this, but for a probability of 1e-16."""


def poisson(key: Tensor, rate: float | Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Draw from the Poisson distribution, by inversion of its distribution function.

    Args:
        key: A key, or a batch of keys.
        rate: The mean, a number from 0 to 2^53 or a tensor that broadcasts to `shape`.
        shape: The shape of the output; that of `rate` if None.

    Returns:
        An int64 tensor of `shape` on the key's device.

    Raises:
        InputError: If `rate` is out of its range, where that can be seen without waiting for a device; elsewhere, the
            draw is -1.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> draw = lr.poisson(lr.key(0), torch.tensor([0.0, 1e6]))
        >>> int(draw[0]), bool((draw[1] - 1e6).abs() < 1e4)
        (0, True)
    """
    given = rate
    shape, dtype, (rate,) = parameters(key, shape, torch.float64, _countable, "from 0 to 2**53", rate=rate)
    rate, u = rate.detach(), uniform(key, shape, dtype=dtype)
    if not isinstance(given, Tensor):
        return (_steps if given < _MANY else _expanded)(u, rate).long()
    few = ~(rate >= _MANY)
    count = torch.where(few, _steps(u, torch.where(few, rate, 0)), _expanded(u, torch.where(few, _MANY, rate)))
    return torch.where(rate.isnan(), -1, count.long())


def _countable(rate: float | Tensor) -> bool | Tensor:
    return (rate >= 0) & (rate <= 2**53)


def _steps(u: Tensor, rate: Tensor) -> Tensor:
    """Return where a Poisson distribution function exceeds u, by adding up the probabilities of 0, 1, ..."""
    probability = (-rate).exp()
    below, count = probability, torch.zeros_like(u)
    for k in range(1, _STEPS + 1):
        more = u >= below
        if readable(more) and not bool(more.any()):
            break
        count = count + more
        probability = probability * (rate / k)
        below = below + probability
    return count


def _expanded(u: Tensor, rate: Tensor) -> Tensor:
    """Return where a Poisson distribution function exceeds u: one of two neighbors, which an expansion finds.

    Source: Giles, "Approximation of the inverse Poisson cumulative distribution function", 2016.
    """
    w = torch.special.ndtri(u.clamp_min(2.0**-54))
    root, square = rate.sqrt(), w * w
    last = (-8 / 405 + square * (7 / 810 + square / 270)) / rate
    near = rate + root * w + (1 / 3 + square / 6) - w * (1 / 36 + square / 72) / root + last
    upper: Tensor = near.round().clamp_min(1)
    # The regularized gamma function is the probability of less than `upper`.
    return (upper - 1).add(u >= torch.special.gammaincc(upper, rate))


def multivariate_normal(
    key: Tensor,
    mean: Tensor,
    covariance: Tensor | None = None,
    shape: Sequence[int] | None = None,
    *,
    scale_tril: Tensor | None = None,
) -> Tensor:
    """Draw vectors from the multivariate normal distribution.

    Args:
        key: A key, or a batch of keys.
        mean: The mean, of shape (..., n).
        covariance: The covariance, symmetric and positive definite, of shape (..., n, n).
        shape: The shape of the output without its last dimension, n; that to which those of the parameters broadcast if
            None.
        scale_tril: Instead of the covariance a factor of it, `covariance = scale_tril @ scale_tril.mT`, for instance
            its Cholesky factor. A covariance without an inverse has one, too.

    Returns:
        A tensor of shape (*shape, n) on the key's device, with derivatives by the parameters.

    Raises:
        InputError: If not one of `covariance` and `scale_tril` is given, or the shapes do not fit; or the covariance is
            not positive definite, where that can be seen without waiting for a device: elsewhere, the draw is NaN.
        DTypeError: If a parameter is not a floating point tensor.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> x = lr.multivariate_normal(lr.key(0), torch.zeros(2), covariance, (10_000,))
        >>> torch.allclose(x.T.cov(), covariance, atol=0.1)
        True
    """
    given = [(name, one) for name, one in (("covariance", covariance), ("scale_tril", scale_tril)) if one is not None]
    if len(given) != 1:
        raise InputError("One of covariance and scale_tril must be given.", got="both" if given else "none")
    [(name, matrix)] = given
    for what, value in (("mean", mean), (name, matrix)):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise wrong_type(what, value, "a floating point tensor")
    if mean.ndim == 0:
        raise wrong_shape("mean", mean, "(..., n)")
    n = mean.shape[-1]
    if matrix.shape[-2:] != (n, n):
        raise wrong_shape(name, matrix, f"(..., {n}, {n})", fix=f"The mean has {n} entries.")
    if shape is None:
        shape = common_shape(**{"mean": mean.shape[:-1], name: matrix.shape[:-2]})
    shape, dtype = drawn(key, shape, torch.promote_types(mean.dtype, matrix.dtype))
    mean = spread("mean", mean, (*shape, n))
    spread(name, matrix, (*shape, n, n))
    wide = torch.promote_types(dtype, torch.float32)
    factor = matrix.to(wide) if covariance is None else _factor(matrix.to(wide))
    noise = normal(key, (*shape, n), dtype=wide)
    return ((noise.unsqueeze(-2) @ factor.mT).squeeze(-2) + mean).to(dtype)


def _factor(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor, NaN where there is none, or raise where that is seen."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if readable(failed) and bool(failed.any()):
        fix = "For a covariance without an inverse, pass a factor of it as scale_tril."
        raise InputError("covariance must be positive definite.", fix=fix)
    return torch.where((failed == 0)[..., None, None], factor, torch.nan)


def orthogonal(key: Tensor, n: int, shape: Sequence[int] = (), *, dtype: torch.dtype | None = None) -> Tensor:
    """Draw orthogonal matrices uniformly (by the Haar measure).

    Args:
        key: A key, or a batch of keys.
        n: The number of rows, and of columns.
        shape: How many matrices, as a shape.
        dtype: A real floating dtype; the default dtype of torch if None. Half types are drawn in float32 and rounded.

    Returns:
        A tensor of shape (*shape, n, n) on the key's device. `init.orthogonal` has rectangular ones. Source: Mezzadri,
        "How to generate random matrices from the classical compact groups", 2007.

    Raises:
        DTypeError: If `n` is not an integer.
        InputError: If `n` is negative.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> q = lr.orthogonal(lr.key(0), 3)
        >>> torch.allclose(q @ q.T, torch.eye(3), atol=1e-6)
        True
    """
    if not is_whole(n):
        raise wrong_type("n", n, "an int")
    if n < 0:
        raise out_of_range("n", n, "at least 0")
    shape, dtype = drawn(key, shape, dtype)
    q, r = torch.linalg.qr(normal(key, (*shape, n, n), dtype=torch.promote_types(dtype, torch.float32)))
    # QR is unique up to these signs; without them the distribution would not be uniform.
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)
    matrix: Tensor = q * signs.unsqueeze(-2)
    return matrix.to(dtype)
