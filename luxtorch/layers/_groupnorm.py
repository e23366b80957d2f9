"""Group normalisation."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States
from luxtorch.core._former import renamed_option
from luxtorch.init import Initializer, ones, zeros

from ._activations import Activation, activated, as_activation
from ._normalise import affine_of, check_channels, group_normalised, initial_affine, shown


@renamed_option("init_scale", "init_weight")
class GroupNorm(Layer):
    """Normalise each sample over groups of neighbouring channels, the same in train and in test mode.

    Args:
        num_channels: The size of the input's second dimension. It comes first, as in Lux; torch has the groups first.
        num_groups: The number of groups; it divides `num_channels`.
        activation: A function of a tensor, or the name of one; None for none.
        eps: Added to the variance.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: (num_channels,), unless `affine=False`
        bias: (num_channels,), unless `affine=False` or `bias=False`

    Shape:
        (batch, num_channels, ...) to the same

    Raises:
        InputError: If the groups do not divide the channels, or the input has another number of channels.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.GroupNorm(4, 2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[0.0, 2.0, 10.0, 30.0]]), ps, st)
        >>> y
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])

    Source: Lux's `GroupNorm`, `torch.nn.GroupNorm`; Wu and He, "Group Normalization", 2018.
    """

    num_channels: int
    num_groups: int
    activation: Activation | str | None = None
    _: KW_ONLY
    eps: float = 1e-5
    affine: bool = True
    bias: bool = True
    init_weight: Initializer = ones
    init_bias: Initializer = zeros

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.num_channels < 1 or self.num_channels % self.num_groups:
            raise InputError(
                "The groups of GroupNorm do not divide its channels.",
                expected="num_channels a multiple of num_groups",
                got=f"num_channels={self.num_channels}, num_groups={self.num_groups}",
                fix="The channels come first: GroupNorm(num_channels, num_groups); torch has them second.",
            )
        self._set(activation=as_activation(self.activation))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and `bias`, if there are any."""
        return initial_affine(self, key, (self.num_channels,))

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalised input and `st`."""
        check_channels(self, x, self.num_channels, 2)
        return activated(group_normalised(x, self.num_groups, *affine_of(self, ps), self.eps), self.activation), st

    def expected_input(self) -> str:
        """Name the channels."""
        return f"a tensor of shape (batch, {self.num_channels}, ...)"

    def extra_repr(self) -> str:
        """Return for instance `32, 4, relu`."""
        return shown(self, self.num_channels, self.num_groups, activation=self.activation)
