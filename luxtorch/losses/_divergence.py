"""Losses between distributions over classes."""

from __future__ import annotations

from torch import Tensor

from ._classes import class_dim, expectation, log_probabilities, moved, smoothed
from ._loss import Loss


class KLDivergenceLoss(Loss):
    """Take the Kullback-Leibler divergence of a predicted distribution from the target, `sum(y * log(y / p))`.

    The sum is over the classes, the mean over all samples; torch's "batchmean" is that of a (batch, classes) matrix.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample.
        dim: The dimension of the classes; None for the second, or the only one.
        label_smoothing: How far the targets are drawn towards the uniform distribution, from 0 to 1.
        logits: Whether the predictions are logits, of which log-probabilities are a special case; with False they
            are probabilities, as in Lux.
        epsilon: What is added to probabilities inside the logarithm; None for the machine epsilon of their dtype.

    Shape:
        Predictions and target probabilities of one shape, (batch, classes, ...) or (classes,).

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.KLDivergenceLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.6931)

    Source: Lux's `KLDivergenceLoss`, `torch.nn.KLDivLoss`.
    """

    dim: int | None = None
    label_smoothing: float = 0.0
    logits: bool = True
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("label_smoothing", 0, 1)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one divergence a sample."""
        dim = class_dim(self, y_hat, self.dim)
        y = smoothed(moved(y, dim), self.label_smoothing)
        log_p = log_probabilities(moved(y_hat, dim), self.logits, self.epsilon)
        return y.xlogy(y).sum(min(1, y.ndim - 1)) - expectation(y, log_p)
