"""Normalisation of a sample's last dimensions: `LayerNorm` and `RMSNorm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States
from luxtorch.core._former import renamed_option
from luxtorch.init import Initializer, ones, zeros
from luxtorch.random import fold_in

from ._activations import Activation, activated, as_activation
from ._normalise import affine_of, initial_affine, layer_normalised, shown


@renamed_option("init_scale", "init_weight")
class LayerNorm(Layer):
    """Normalise over the last dimensions, each sample by itself, the same in train and in test mode.

    Lux's default is one mean and variance over the whole array, the batch included; here, as in torch, the
    normalised dimensions are always those of `shape`.

    Args:
        shape: The size of the input's last dimension, or the shape of its last dimensions.
        activation: A function of a tensor, or the name of one; None for none.
        eps: Added to the variance.
        affine: Whether there are a weight and a bias.
        bias: Whether there is a bias where there is a weight.
        init_weight: The initializer of the weight.
        init_bias: The initializer of the bias.

    Parameters:
        weight: shape, unless `affine=False`
        bias: shape, unless `affine=False` or `bias=False`

    Shape:
        (..., *shape) to the same

    Raises:
        InputError: If the input's last dimensions are others.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.LayerNorm(2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([[0.0, 2.0], [30.0, 10.0]]), ps, st)
        >>> y
        tensor([[-1.0000,  1.0000],
                [ 1.0000, -1.0000]])

    Source: Lux's `LayerNorm`, `torch.nn.LayerNorm`; Ba et al., "Layer Normalization", 2016.
    """

    shape: tuple[int, ...]
    activation: Activation | str | None
    eps: float
    affine: bool
    bias: bool
    init_weight: Initializer
    init_bias: Initializer

    def __init__(
        self,
        shape: int | Sequence[int],
        activation: Activation | str | None = None,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        init_weight: Initializer = ones,
        init_bias: Initializer = zeros,
    ) -> None:
        self._set(
            shape=_last_dimensions(shape), activation=as_activation(activation), eps=eps, affine=affine, bias=bias
        )
        self._set(init_weight=init_weight, init_bias=init_bias)

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight` and `bias`, if there are any."""
        return initial_affine(self, key, self.shape)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalised input and `st`."""
        return activated(layer_normalised(x, self.shape, *affine_of(self, ps), self.eps), self.activation), st

    def expected_input(self) -> str:
        """Name the last dimensions."""
        return f"a tensor of shape (..., {', '.join(map(str, self.shape))})"

    def extra_repr(self) -> str:
        """Return for instance `32, relu`."""
        return shown(self, *self.shape, activation=self.activation)


@renamed_option("init_scale", "init_weight")
class RMSNorm(Layer):
    """Divide by the root mean square over the last dimensions, each sample by itself.

    Args:
        shape: The size of the input's last dimension, or the shape of its last dimensions.
        eps: Added to the mean square; None for the smallest step of the input's dtype, `torch.finfo(dtype).eps`.
        affine: Whether there is a weight.
        init_weight: The initializer of the weight.

    Parameters:
        weight: shape, unless `affine=False`

    Shape:
        (..., *shape) to the same

    Raises:
        InputError: If the input's last dimensions are others.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.RMSNorm(2)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.tensor([1.0, 7.0]), ps, st)
        >>> y
        tensor([0.2000, 1.4000])

    Source: Lux's `RMSNorm`, `torch.nn.RMSNorm`; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    shape: tuple[int, ...]
    eps: float | None
    affine: bool
    init_weight: Initializer

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        eps: float | None = None,
        affine: bool = True,
        init_weight: Initializer = ones,
    ) -> None:
        self._set(shape=_last_dimensions(shape), eps=eps, affine=affine, init_weight=init_weight)

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight`, if there is one."""
        return {"weight": self.init_weight(fold_in(key, "weight"), self.shape)} if self.affine else {}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the normalised input and `st`."""
        return F.rms_norm(x, self.shape, ps["weight"] if self.affine else None, self.eps), st

    def expected_input(self) -> str:
        """Name the last dimensions."""
        return f"a tensor of shape (..., {', '.join(map(str, self.shape))})"

    def extra_repr(self) -> str:
        """Return for instance `32`."""
        return shown(self, *self.shape, activation=None)


def _last_dimensions(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a layer normalises, as a tuple."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or min(sizes) < 1:
        raise InputError(
            "There is nothing to normalise over.", expected="a size, or a shape of sizes, above 0", got=f"shape={shape}"
        )
    return sizes
