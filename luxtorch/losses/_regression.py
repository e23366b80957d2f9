"""Regression losses: absolute, squared, squared logarithmic, Huber, smooth L1, Poisson, Gaussian."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import readable, reverse_alone

from ._loss import Loss, as_numbers, checked_parts, machine_epsilon, unlike


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
    `y_hat - y * log(y_hat + epsilon)`; if `full`, plus Stirling's approximation of `log(y!)`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        log_input: Whether the predictions are logarithms of rates, torch's default; Lux's losses take rates.
        epsilon: What is added inside the logarithm; None for the machine epsilon of the predictions' dtype.
        full: Whether to add `y * log(y) - y + log(2 * pi * y) / 2` where `y` is above 1.

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
    full: bool = False

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the negative log-likelihoods."""
        if self.log_input:
            losses = y_hat.exp() - y * y_hat
        else:
            losses = y_hat - y.xlogy(y_hat + machine_epsilon(y_hat, self.epsilon))
        if not self.full:
            return losses
        small = y <= 1
        many = y.masked_fill(small, 1)
        return losses + (many * many.log() - many + (2 * math.pi * many).log() / 2).masked_fill(small, 0)


class GaussianNLLLoss(Loss):
    """Take the negative log-likelihood of numbers under normal distributions, but for a constant.

    `(log(variance) + (y - mean)**2 / variance) / 2`; if `full`, plus the constant `log(2 * pi) / 2`.

    A variance below `eps` counts as `eps`, and has the gradient that it would have there, as in torch: training may
    raise it. A negative one is an error where that is seen without waiting for a device, and else gives NaN.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        full: Whether to add the constant.
        eps: The smallest variance that counts as itself; above 0.

    Shape:
        Predictions `(mean, variance)`: a tensor of any shape, and one of the same shape, or with 1 for the dimensions
        along which the variance is the same, or without the last dimension. Targets of the shape of the mean.

    Raises:
        InputError: If a variance is negative.

    Example:
        >>> import torch, luxtorch as lt
        >>> mean, variance = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
        >>> lt.losses.GaussianNLLLoss()((mean, variance), torch.tensor([1.0, 1.0]))
        tensor(0.5966)

    Source: `torch.nn.GaussianNLLLoss`, which takes three arguments: here mean and variance are the prediction.
    """

    full: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("eps", 0, strict=True)

    def checked(self, y_hat: tuple[Tensor, Tensor], y: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the mean, the variance in a shape that broadcasts to it, and the targets."""
        names, shape = ("mean", "variance"), ", the second with sizes of the first or 1"
        mean, variance = checked_parts(self, y_hat, names, shape)
        self.require_shape(y, mean.shape, mean)
        if variance.ndim == mean.ndim - 1 and variance.shape == mean.shape[:-1]:
            variance = variance.unsqueeze(-1)
        if variance.ndim != mean.ndim or any(
            own not in (1, size) for own, size in zip(variance.shape, mean.shape, strict=True)
        ):
            raise unlike(self, (mean, variance), names, shape)
        if readable(variance) and bool((variance < 0).any()):
            raise self.error(
                "A variance must not be negative.",
                expected="variances of at least 0",
                got=f"{variance.min().item()}",
                fix="Have the model predict its logarithm, and pass (mean, log_variance.exp()).",
            )
        return (mean, variance), as_numbers(y, mean)

    def each(self, y_hat: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """Return the negative log-likelihoods."""
        mean, variance = y_hat
        # Of the value eps, but with the derivative of the variance.
        raised = torch.where(variance < 0, math.nan, variance - variance.detach() + self.eps)
        variance = torch.where(variance < self.eps, raised, variance)
        losses = (variance.log() + (mean - y).square() / variance) / 2
        return losses + math.log(2 * math.pi) / 2 if self.full else losses
