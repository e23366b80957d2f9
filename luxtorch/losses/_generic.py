"""A loss from any function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field

from torch import Tensor

from ._loss import Loss


class GenericLossFunction(Loss):
    """Make a loss of a function of predictions and targets.

    Args:
        function: An elementwise function `function(y_hat, y)` of two tensors of one shape.
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> loss = lt.GenericLossFunction(lambda y_hat, y: (y_hat - y).cosh().log())
        >>> loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(0.)

    Source: Lux's `GenericLossFunction`.
    """

    function: Callable[[Tensor, Tensor], Tensor] = field(kw_only=False)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return `function(y_hat, y)`."""
        return self.function(y_hat, y)
