"""Losses for labels of -1 and 1 that stop at a margin."""

from __future__ import annotations

from torch import Tensor

from ._loss import Loss


class HingeLoss(Loss):
    """Take how far a score is from the right side of the margin, `max(0, 1 - y * y_hat)`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Scores and labels of one shape, any; the labels are -1 or 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.HingeLoss()(torch.tensor([0.5, 3.0]), torch.tensor([-1.0, 1.0]))
        tensor(0.7500)

    Source: Lux's `HingeLoss`; `torch.nn.HingeEmbeddingLoss` is another loss.
    """

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the distances."""
        return (1 - y * y_hat).relu()


class SquaredHingeLoss(Loss):
    """Take the square of the hinge loss, `max(0, 1 - y * y_hat)**2`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Scores and labels of one shape, any; the labels are -1 or 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.SquaredHingeLoss()(torch.tensor([0.5, 3.0]), torch.tensor([-1.0, 1.0]))
        tensor(1.1250)

    Source: Lux's `SquaredHingeLoss`.
    """

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the squared distances."""
        return (1 - y * y_hat).relu().square()
