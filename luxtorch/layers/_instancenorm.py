"""Instance normalisation, with running statistics that are returned instead of written."""

from __future__ import annotations

from dataclasses import KW_ONLY

import torch
from torch import Tensor

from luxtorch.core import TRAINING, InputError, Parameters, States
from luxtorch.core._former import renamed_option

from ._activations import activated
from ._normalise import HALVES, FeatureNorm, affine_of, check_channels, group_normalised, normalised, shown


@renamed_option("init_scale", "init_weight")
class InstanceNorm(FeatureNorm):
    """Normalise each channel of each sample over its spatial dimensions.

    It takes inputs of any number of spatial dimensions: it is torch's InstanceNorm1d, 2d and 3d.

    Args:
        num_features: The size of the input's second dimension.
        activation: A function of a tensor, or the name of one; None for none.
        eps: Added to the variance.
        momentum: The weight of the new batch in the running statistics.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        track_running_stats: Whether there are running statistics, which test mode then normalises by.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (num_features,), with `affine=True`
        bias: (num_features,), with `affine=True`, unless `bias=False`

    States:
        running_mean: (num_features,), with `track_running_stats=True`
        running_var: (num_features,), unbiased, with `track_running_stats=True`
        num_batches_tracked: (), with `track_running_stats=True`; it stays zero, as in torch
        training: Whether running statistics are updated, and not used.

    Shape:
        (batch, num_features, length, ...) to the same

    Raises:
        InputError: If the input has another number of features, no spatial dimensions, or a single value to take the
            variance of.

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
        """Return the normalised input, and the state with the new running statistics."""
        check_channels(self, x, self.num_features, 3)
        weight, bias = affine_of(self, ps)
        if self.track_running_stats and not st[TRAINING]:
            y = normalised(x, st["running_mean"], st["running_var"], weight, bias, self.eps)
        else:
            self._check_values(x)
            # Groups of one channel: the same numbers, without the copies of torch's kernel, and for empty batches too.
            y = group_normalised(x, self.num_features, weight, bias, self.eps)
            st = self._updated(x, st) if self.track_running_stats else st
        return activated(y, self.activation), st

    def _updated(self, x: Tensor, st: States) -> States:
        mean, var = instance_statistics(x, st["running_mean"], st["running_var"], self.momentum)
        return {**st, "running_mean": mean, "running_var": var}

    def _check_values(self, x: Tensor) -> None:
        if x.shape[2:].numel() < 2:
            raise InputError(
                "Fewer than two values a channel of a sample have no variance to normalise by.",
                expected="more than one value along the spatial dimensions",
                got=f"a tensor of shape {tuple(x.shape)}",
                fix="Use larger inputs, or with track_running_stats=True lt.test_mode(st).",
            )

    def expected_input(self) -> str:
        """Name the features."""
        return f"a tensor of shape (batch, {self.num_features}, length, ...)"

    def extra_repr(self) -> str:
        """Return for instance `32, relu, affine=True`."""
        return shown(self, self.num_features, activation=self.activation)


def instance_statistics(x: Tensor, mean: Tensor, var: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the running statistics of the samples' moments, in which those of a new batch have the given weight."""
    if x.shape[0] == 0:
        return mean, var
    x, mean, var = x.detach(), mean.detach(), var.detach()
    wide = x.float() if x.dtype in HALVES else x
    new_var, new_mean = torch.var_mean(wide, list(range(2, x.ndim)), correction=1)
    mean = torch.lerp(mean, new_mean.mean(0).to(mean.dtype), weight)
    return mean, torch.lerp(var, new_var.mean(0).to(var.dtype), weight)
