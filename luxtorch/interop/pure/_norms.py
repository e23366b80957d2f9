"""Normalizations, norms and distances with right higher derivatives, where torch's are wrong or missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._torch import weight_norm
from luxtorch._transforms import functional, reverse_alone
from luxtorch.layers._batchnorm import batch_normalized, instance_statistics, moments, normalized
from luxtorch.layers._layernorm import group_normalized, layer_normalized
from luxtorch.layers._weight_norms import euclidean_norm

from ._keys import Keys


def _layer_norm(
    keys: Keys,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return layer_normalized(input, tuple(normalized_shape), weight, bias, eps)


def _batch_norm(
    keys: Keys,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training and running_mean is not None and running_var is not None:
        return normalized(input, running_mean, running_var, weight, bias, eps)
    # For one sample the kernel's derivative is wrong if the incoming gradient is transposed.
    if not (functional() or input.shape[0] == 1) or input.numel() <= input.shape[1]:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is None or running_var is None:
        return normalized(input, *moments(input), weight, bias, eps)
    y, mean, var = batch_normalized(input, running_mean, running_var, weight, bias, momentum, eps)
    running_mean.copy_(mean)
    running_var.copy_(var)
    return y


def _instance_norm(
    keys: Keys,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None and running_var is not None:
        if not use_input_stats:
            return normalized(input, running_mean, running_var, weight, bias, eps)
        mean, var = instance_statistics(input, running_mean, running_var, momentum)
        running_mean.copy_(mean)
        running_var.copy_(var)
    return instance_normalized(input, weight, bias, eps)


def instance_normalized(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize each channel of each sample; torch reshapes to one sample for the kernel of batch normalization."""
    if input.shape[2:].numel() < 2 or input.numel() == 0:
        return F.instance_norm(input, None, None, weight, bias, True, 0.0, eps)
    return group_normalized(input, input.shape[1], weight, bias, eps)


def _normalize(
    keys: Keys, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    if p == 2 and not reverse_alone():
        y = input / euclidean_norm(input, [dim], keepdim=True).clamp_min(eps)
    else:
        y = F.normalize(input, p, dim, eps)
    # Spectral norms of torch.nn.utils pass their buffer as `out`, which no transform supports.
    # They run under no_grad, which does not stop tangents.
    return y if out is None else out.copy_(y.detach())


def _vector_norm(
    keys: Keys, x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **options: Any
) -> Tensor:
    if reverse_alone() or ord != 2 or x.is_complex() or any(value is not None for value in options.values()):
        norm: Tensor = torch.linalg.vector_norm(x, ord, dim, keepdim, **options)
        return norm
    dims = [dim] if isinstance(dim, int) else None if dim is None else list(dim)
    return euclidean_norm(x, dims, keepdim=keepdim)


def _cosine_similarity(keys: Keys, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    if reverse_alone():
        return F.cosine_similarity(x1, x2, dim, eps)
    lengths = (euclidean_norm(x, [dim], keepdim=True).clamp_min(eps) for x in (x1, x2))
    a, b = (x / length for x, length in zip((x1, x2), lengths, strict=True))
    return (a * b).sum(dim)


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """Return the distances of pairs; torch lacks their third derivative through forward mode."""
    if p != 2 or reverse_alone():
        return F.pairwise_distance(x1, x2, p, eps, keepdim)
    return euclidean_norm(x1 - x2 + eps, [-1], keepdim=keepdim)


def _pairwise_distance(keys: Keys, *args: Any, **kwargs: Any) -> Tensor:
    return pairwise_distance(*args, **kwargs)


def _cdist(keys: Keys, x1: Tensor, x2: Tensor, p: float = 2.0, *mode: str, **named: str) -> Tensor:
    if p != 2 or reverse_alone():
        return torch.cdist(x1, x2, p, *mode, **named)
    return euclidean_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), [-1])  # the kernel has no derivative in forward mode


def _weight_norm(keys: Keys, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The second derivative of the kernel is wrong: its backward pass treats the norms as constants.
    if not functional() and not (torch.is_grad_enabled() and (v.requires_grad or g.requires_grad)):
        return weight_norm(v, g, dim)
    others = list(range(v.ndim)) if dim == -1 else [other for other in range(v.ndim) if other != dim % v.ndim]
    return v * (g / euclidean_norm(v, others, keepdim=dim != -1))


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.cosine_similarity: _cosine_similarity,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.normalize: _normalize,
    F.pairwise_distance: _pairwise_distance,
    torch.cdist: _cdist,
    torch.layer_norm: _layer_norm,
    torch.linalg.vector_norm: _vector_norm,
    weight_norm: _weight_norm,
}
