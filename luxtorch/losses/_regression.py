"""Regression losses: absolute, squared, squared logarithmic, Huber, smooth L1, Poisson."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone

from ._loss import Loss, machine_epsilon


class MAELoss(Loss):
    """Take the absolute error, `|y_hat - y|`; also called `L1Loss`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.MAELoss()(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]))
        tensor(1.5000)

    Source: Lux's `MAELoss`, `torch.nn.L1Loss`.
    """

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return `|y_hat - y|`."""
        return (y_hat - y).abs()


class MSELoss(Loss):
    """Take the squared error, `(y_hat - y)**2`; also called `L2Loss`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.MSELoss()(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]))
        tensor(2.5000)

    Source: Lux's `MSELoss`, `torch.nn.MSELoss`.
    """

    def value(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the aggregated squared errors."""
        # The usual case by the kernel that need not keep the squares, but has no rules for transforms in transforms.
        if self.agg != "mean" or not reverse_alone():
            return super().value(y_hat, y)
        return F.mse_loss(*self.checked(y_hat, y))

    def sum_and_weight(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor | int | None]:
        """Return the sum of the squared errors, and their number."""
        return super().sum_and_weight(y_hat, y)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return `(y_hat - y)**2`."""
        return (y_hat - y).square()


L1Loss = MAELoss
L2Loss = MSELoss


class HuberLoss(Loss):
    """Take half the squared error where it is small, and `delta` times the absolute error where it is large.

    `(y_hat - y)**2 / 2` up to an absolute error of `delta`, `delta * (|y_hat - y| - delta / 2)` beyond.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        delta: The absolute error at which the two meet; above 0.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.HuberLoss()(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]))
        tensor(1.)

    Source: Lux's `HuberLoss`, `torch.nn.HuberLoss`.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("delta", 0, strict=True)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the Huber losses."""
        if reverse_alone():
            return F.huber_loss(y_hat, y, reduction="none", delta=self.delta)
        error = (y_hat - y).abs()
        return torch.where(error <= self.delta, error.square() / 2, self.delta * (error - self.delta / 2))


class SmoothL1Loss(Loss):
    """Take the absolute error, rounded off by a parabola near 0: the Huber loss divided by its `delta`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        beta: The absolute error at which the two meet; with 0 it is the absolute error.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.SmoothL1Loss(beta=2.0)(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]))
        tensor(0.6250)

    Source: `torch.nn.SmoothL1Loss`.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("beta", 0)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the smooth absolute errors."""
        if reverse_alone():
            return F.smooth_l1_loss(y_hat, y, reduction="none", beta=self.beta)
        error = (y_hat - y).abs()
        if self.beta == 0:
            return error
        return torch.where(error < self.beta, error.square() / (2 * self.beta), error - self.beta / 2)


class MSLELoss(Loss):
    """Take the squared difference of logarithms, `(log(y_hat + epsilon) - log(y + epsilon))**2`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        epsilon: What is added inside the logarithms; None for the machine epsilon of the predictions' dtype.

    Shape:
        Predictions and targets of one shape, any; neither negative.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.MSLELoss()(torch.tensor([1.0]), torch.tensor([1.0])).abs()
        tensor(0.)

    Source: Lux's `MSLELoss`.
    """

    epsilon: float | None = None

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the squared differences."""
        epsilon = machine_epsilon(y_hat, self.epsilon)
        return ((y_hat + epsilon).log() - (y + epsilon).log()).square()


class PoissonLoss(Loss):
    """Take the negative log-likelihood of counts under Poisson distributions, but for a term without the predictions.

    With predicted logarithms of the rates `exp(y_hat) - y * y_hat`, with predicted rates
    `y_hat - y * log(y_hat + epsilon)`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        log_input: Whether the predictions are logarithms of rates, torch's default; Lux's losses take rates.
        epsilon: What is added inside the logarithm; None for the machine epsilon of the predictions' dtype.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.PoissonLoss()(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        tensor(0.8591)

    Source: Lux's `PoissonLoss`, `torch.nn.PoissonNLLLoss`.
    """

    log_input: bool = True
    epsilon: float | None = None

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the negative log-likelihoods."""
        if self.log_input:
            return y_hat.exp() - y * y_hat
        return y_hat - y.xlogy(y_hat + machine_epsilon(y_hat, self.epsilon))
