"""Normalization with running statistics: `BatchNorm` and `InstanceNorm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import differentiate_again, kernel_with_formula, saved_aside, transformed
from luxtorch.core import TRAINING, InputError, Layer, Parameters, States, Static, described
from luxtorch.core._renamed import renamed_option
from luxtorch.init import Initializer, ones, zeros

from ._activations import Activation, activated, as_activation
from ._layernorm import affine_of, check_channels, group_normalized, initial_affine
from ._shared import HALVES, arguments_text

COUNT = "num_batches_tracked"


class FeatureNorm(Layer):
    """Base class of `BatchNorm` and `InstanceNorm`: weight, bias and running statistics of each feature."""

    num_features: int
    activation: Activation | str | None = None
    _: KW_ONLY
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    bias: bool = True
    track_running_stats: bool = True
    init_weight: Initializer = ones
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        self._set(activation=as_activation(self.activation))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and `bias`, if there are any."""
        return initial_affine(self, key, (self.num_features,))

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the running statistics, if they are tracked, and the mode."""
        st: dict[str, Any] = {}
        if self.track_running_stats:
            st["running_mean"] = torch.zeros(self.num_features, device=key.device)
            st["running_var"] = torch.ones(self.num_features, device=key.device)
            st[COUNT] = torch.zeros((), dtype=torch.int64, device=key.device)
        return {**st, TRAINING: Static(True)}

    def extra_repr(self) -> str:
        """Return for instance `32, relu`."""
        return arguments_text(self, self.num_features)


@renamed_option("init_scale", "init_weight")
class BatchNorm(FeatureNorm):
    """Batch normalization, with running statistics for test mode.

    Inputs have any number of dimensions, features second, as for torch's BatchNorm1d, 2d and 3d.

    Args:
        num_features: The size of the input's second dimension.
        activation: A function of a tensor, or the name of one, such as "relu"; None for none.
        eps: Added to the variance.
        momentum: The weight of the new batch in the running statistics; None for their plain average so far.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        track_running_stats: Whether there are running statistics; without, test mode takes those of the batch too.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (num_features,), unless `affine=False`
        bias: (num_features,), unless `affine=False` or `bias=False`

    States:
        running_mean: (num_features,), with `track_running_stats=True`, like the next two
        running_var: (num_features,), unbiased
        num_batches_tracked: (), the number of batches so far, used with `momentum=None`
        training: Whether the batch's own statistics are used.

    Shape:
        (batch, num_features, ...) to the same; an empty batch is counted, and leaves the statistics unchanged

    Raises:
        InputError: If the input has another number of features, or there is only one value per feature.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.BatchNorm(3)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.arange(6.0).reshape(2, 3), ps, st)
        >>> y
        tensor([[-1.0000, -1.0000, -1.0000],
                [ 1.0000,  1.0000,  1.0000]])
        >>> st["running_mean"]
        tensor([0.1500, 0.2500, 0.3500])

    Source: Lux's `BatchNorm`, `torch.nn.BatchNorm1d`; Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalized input, and the state with the new running statistics."""
        self._check(x, st)
        weight, bias = affine_of(self, ps)
        if not self.track_running_stats:
            y = normalized(x, *moments(x), weight, bias, self.eps)
        elif not st[TRAINING]:
            y = normalized(x, st["running_mean"], st["running_var"], weight, bias, self.eps)
        else:
            y, st = self._train(x, weight, bias, st)
        return activated(y, self.activation), st

    def _train(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, st: States) -> tuple[Tensor, States]:
        mean, var, new = st["running_mean"], st["running_var"], {**st, COUNT: st[COUNT] + 1}
        if x.numel() == 0:  # as in torch, the batch is counted, and the statistics are unchanged
            return normalized(x, mean, var, weight, bias, self.eps), new
        momentum = 1 / new[COUNT].to(mean.dtype) if self.momentum is None else self.momentum
        y, new["running_mean"], new["running_var"] = batch_normalized(x, mean, var, weight, bias, momentum, self.eps)
        return y, new

    def _check(self, x: Tensor, st: States) -> None:
        check_channels(self, x, self.num_features, min_ndim=2)
        if 0 < x.numel() == self.num_features and (st[TRAINING] or not self.track_running_stats):
            raise InputError(
                "Batch statistics need more than one value per feature.",
                got=described(x),
                fix="Use a larger batch, or with track_running_stats=True lt.test_mode(st).",
            )

    def expected_input(self) -> str:
        """Name the features."""
        return f"a tensor of shape (batch, {self.num_features}, ...)"


def batch_normalized(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the batch's moments; return also the running ones, updated with the weight `momentum`."""
    mean, var = mean.detach(), var.detach()
    # For one sample the kernel's derivative is wrong with a transposed gradient.
    if isinstance(momentum, float) and x.shape[0] != 1 and not transformed():
        # torch's kernel updates the statistics in place: it gets copies.
        mean, var = mean.clone(), var.clone()
        # It also needs all four in one dtype; the input may be of a lower precision.
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        kernel = partial(_kernel, mean=mean, var=var, momentum=momentum, eps=eps)
        if saved_aside():
            return kernel_with_formula(kernel, partial(_formula, eps=eps), x, weight, bias), mean, var
        return differentiate_again(kernel(x, weight, bias), _formula_of_node(eps)), mean, var
    batch_mean, batch_var = moments(x)
    y = normalized(x, batch_mean, batch_var, weight, bias, eps)
    count = x.numel() // x.shape[1]
    mean = torch.lerp(mean, batch_mean.detach().to(mean.dtype), momentum)
    var = torch.lerp(var, batch_var.detach().to(var.dtype) * (count / (count - 1)), momentum)
    return y, mean, var


def _kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)


def _formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    return normalized(x, *moments(x), weight, bias, eps)


@lru_cache
def _formula_of_node(eps: float) -> Callable[[Any], Callable[..., Tensor] | None]:
    return lambda node: partial(_formula, eps=eps) if hasattr(node, "_saved_weight") else None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each feature, in at least single precision; zeros of an empty batch."""
    wide = x.float() if x.dtype in HALVES else x
    if x.numel() == 0:
        return wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
    var, mean = torch.var_mean(wide, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    return mean, var


@renamed_option("init_scale", "init_weight")
class InstanceNorm(FeatureNorm):
    """Instance normalization: normalize each channel of each sample over its spatial dimensions.

    Inputs have any number of spatial dimensions, as for torch's InstanceNorm1d, 2d and 3d.

    Args:
        num_features: The size of the input's second dimension.
        activation: A function of a tensor, or the name of one; None for none.
        eps: Added to the variance.
        momentum: The weight of the new batch in the running statistics.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        track_running_stats: Whether there are running statistics, which test mode then normalizes by.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (num_features,), with `affine=True`
        bias: (num_features,), with `affine=True`, unless `bias=False`

    States:
        running_mean: (num_features,), with `track_running_stats=True`
        running_var: (num_features,), unbiased, with `track_running_stats=True`
        num_batches_tracked: (), with `track_running_stats=True`; it stays zero, as in torch
        training: Whether running statistics are updated, instead of used.

    Shape:
        (batch, num_features, length, ...) to the same

    Raises:
        InputError: If the input has another number of features, no spatial dimensions, or only one value per
            channel of a sample.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.InstanceNorm(1)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[[0.0, 2.0]], [[30.0, 10.0]]]), ps, st)
        >>> y
        tensor([[[-1.0000,  1.0000]],
        <BLANKLINE>
                [[ 1.0000, -1.0000]]])

    Source: Lux's `InstanceNorm`, `torch.nn.InstanceNorm1d`; Ulyanov et al., "Instance Normalization", 2016.
    """

    _: KW_ONLY
    momentum: float = 0.1
    affine: bool = False
    track_running_stats: bool = False

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalized input, and the state with the new running statistics."""
        check_channels(self, x, self.num_features, 3)
        weight, bias = affine_of(self, ps)
        if self.track_running_stats and not st[TRAINING]:
            y = normalized(x, st["running_mean"], st["running_var"], weight, bias, self.eps)
        else:
            self._check_values(x)
            # Groups of one channel: the same numbers, without the copies of torch's kernel, and for empty batches too.
            y = group_normalized(x, self.num_features, weight, bias, self.eps)
            st = self._updated(x, st) if self.track_running_stats else st
        return activated(y, self.activation), st

    def _updated(self, x: Tensor, st: States) -> States:
        mean, var = instance_statistics(x, st["running_mean"], st["running_var"], self.momentum)
        return {**st, "running_mean": mean, "running_var": var}

    def _check_values(self, x: Tensor) -> None:
        if x.shape[2:].numel() < 2:
            raise InputError(
                "Instance statistics need more than one value along the spatial dimensions.",
                got=described(x),
                fix="Use larger inputs, or with track_running_stats=True lt.test_mode(st).",
            )

    def expected_input(self) -> str:
        """Name the features."""
        return f"a tensor of shape (batch, {self.num_features}, length, ...)"


def instance_statistics(x: Tensor, mean: Tensor, var: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the running statistics, updated by the average moments of a batch's samples with the given weight."""
    if x.shape[0] == 0:
        return mean, var
    x, mean, var = x.detach(), mean.detach(), var.detach()
    wide = x.float() if x.dtype in HALVES else x
    new_var, new_mean = torch.var_mean(wide, list(range(2, x.ndim)), correction=1)
    mean = torch.lerp(mean, new_mean.mean(0).to(mean.dtype), weight)
    return mean, torch.lerp(var, new_var.mean(0).to(var.dtype), weight)


def normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize each channel by given moments, in operations that every transform knows."""
    shape = (-1, *(1,) * (x.ndim - 2))
    factor = torch.rsqrt(var + eps)
    factor = factor if weight is None else factor * weight
    y = (x - mean.view(shape)) * factor.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)
