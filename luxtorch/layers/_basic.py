"""Layers without parameters or states: `NoOpLayer`, `WrappedFunction`, `FlattenLayer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import Layer, Parameters, States
from luxtorch.core._container import refuse_modules


class NoOpLayer(Layer):
    """Return the input as it is.

    Shape:
        Anything to the same.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.NoOpLayer()(torch.ones(2), {}, {})
        >>> y
        tensor([1., 1.])

    Source: Lux's `NoOpLayer`, `torch.nn.Identity`.
    """

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(x, st)`."""
        return x, st


class WrappedFunction(Layer):
    """Make a layer of a function of the input.

    Args:
        function: Any pure function of the input. A module-level function can be pickled with the model, a lambda not.

    Shape:
        Whatever the function takes to whatever it returns.

    Raises:
        InputError: If the function is, or refers to, a module of torch.nn with tensors of its own, or a tensor that
            requires grad: `lt.from_torch` makes a layer of a module.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.WrappedFunction(torch.exp)(torch.zeros(2), {}, {})
        >>> y
        tensor([1., 1.])

    Source: Lux's `WrappedFunction`.
    """

    function: Callable[[Any], Any]

    def __post_init__(self) -> None:
        refuse_modules(self.function, "A function in a model")

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(function(x), st)`."""
        return self.function(x), st


class FlattenLayer(Layer):
    """Flatten a range of dimensions into one; by default, all but the batch.

    Args:
        start_dim: The first dimension to flatten.
        end_dim: The last dimension to flatten.

    Shape:
        (batch, *dims) to (batch, prod(dims))

    Raises:
        InputError: If the input has too few dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.FlattenLayer()(torch.ones(2, 3, 4), {}, {})
        >>> y.shape
        torch.Size([2, 12])

    Source: Lux's `FlattenLayer`, `torch.nn.Flatten`.
    """

    start_dim: int = 1
    end_dim: int = -1

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the flattened input and `st`."""
        return torch.flatten(x, self.start_dim, self.end_dim), st

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor with the dimensions {self.start_dim} to {self.end_dim}"
