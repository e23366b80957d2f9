"""Activations that are layers, having a size or a parameter: `GLU` and `PReLU`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone, transformed
from luxtorch.core import InputError, Layer, Parameters, States


class GLU(Layer):
    """Halve the input along a dimension, and gate one half by the other: `a * sigmoid(b)`.

    Args:
        dim: The dimension to halve.

    Shape:
        (..., 2 * size, ...) to (..., size, ...)

    Raises:
        InputError: If the dimension's size is odd, or the input has no such dimension.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.GLU()(torch.tensor([1.0, 2.0, 0.0, 0.0]), {}, {})
        >>> y
        tensor([0.5000, 1.0000])

    Source: `torch.nn.GLU`, `glu` in NNlib; Dauphin et al., "Language modeling with gated convolutional networks", 2017.
    """

    dim: int = -1

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the gated half and `st`."""
        return gated(x, self.dim), st

    def expected_input(self) -> str:
        """Name the dimension."""
        return f"a tensor whose size is even along dimension {self.dim}"


def gated(x: Tensor, dim: int = -1) -> Tensor:
    """Return one half of a tensor along a dimension, gated by the other."""
    # Derivatives that torch takes of its kernel by forward mode have none themselves. It says best what does not fit.
    if reverse_alone() or not -x.ndim <= dim < x.ndim or x.shape[dim] % 2:
        return F.glu(x, dim)
    half, gate = x.chunk(2, dim)
    return half * gate.sigmoid()


class PReLU(Layer):
    """Keep what is positive, and multiply what is negative by a parameter.

    Args:
        num_parameters: The size of the input's second dimension, for a parameter each; or 1, for one in all.
        init: The initial value.

    Parameters:
        weight: (num_parameters,)

    Shape:
        (batch, num_parameters, ...) to the same; with one parameter, any shape.

    Raises:
        InputError: If there are no parameters, or the input has another second dimension.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.PReLU())
        >>> y, st = lt.PReLU()(torch.tensor([-1.0, 2.0]), ps, st)
        >>> y
        tensor([-0.2500,  2.0000])

    Source: `torch.nn.PReLU`; He et al., "Delving deep into rectifiers", 2015.
    """

    num_parameters: int = 1
    init: float = 0.25

    def __post_init__(self) -> None:
        if not (isinstance(self.num_parameters, int) and self.num_parameters >= 1):
            raise InputError(
                "PReLU has parameters.", expected="a whole number of at least 1", got=f"{self.num_parameters!r}"
            )

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return `weight`."""
        return {"weight": torch.full((self.num_parameters,), self.init, device=key.device)}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the input with its negative part multiplied, and `st`."""
        weight = ps["weight"]
        if self.num_parameters > 1 and (x.ndim < 2 or x.shape[1] != self.num_parameters):
            raise InputError(
                "The input's channels are not as many as the parameters.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}",
            )
        if not transformed():
            return F.prelu(x, weight), st
        # torch's kernel has no proper rule for a batch of weights.
        weight = weight.reshape(-1, *[1] * (x.ndim - 2)) if self.num_parameters > 1 else weight[0]
        return torch.where(x > 0, x, weight * x), st

    def expected_input(self) -> str:
        """Name the second dimension, if there is to be one."""
        return "a tensor" if self.num_parameters == 1 else f"a tensor of shape (batch, {self.num_parameters}, ...)"
