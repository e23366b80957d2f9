"""Losses over several classes: cross entropy, negative log-likelihood, focal loss, Kullback-Leibler divergence."""

from __future__ import annotations

from torch import Tensor

from ._classes import ClassLoss, along_classes, class_dim, expectation, log_probabilities, moved, smoothed
from ._loss import Loss, machine_epsilon


class CrossEntropyLoss(ClassLoss):
    """Take the negative log-likelihood of the target classes.

    The mean is one over the samples: with class indices it is weighted by the weights of the target classes and
    leaves out the ignored samples, as in torch; it is NaN if all are ignored.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample, 0 where ignored.
        dim: The dimension of the classes; None for the second, or the only one.
        weight: A weight for each class, or None.
        ignore_index: The class index of samples to leave out.
        label_smoothing: How far the targets are drawn towards the uniform distribution, from 0 to 1.
        logits: Whether the predictions are logits; with False, Lux's default, they are probabilities.
        epsilon: What is added to probabilities inside the logarithm; None for the machine epsilon of their dtype.

    Shape:
        Predictions (batch, classes, ...) or (classes,).
        Targets: class indices of the same shape but without the classes, or probabilities of the same shape.

    Raises:
        DTypeError: If class indices are not integers.
        InputError: If a class index is out of range, where that is seen without waiting for a device.

    Example:
        >>> import torch, luxtorch as lt
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
        >>> lt.CrossEntropyLoss()(logits, torch.tensor([0, 1]))
        tensor(0.3466)
        >>> lt.CrossEntropyLoss(logits=False, agg="sum")(logits.softmax(1), torch.eye(2))
        tensor(0.6931)

    Source: Lux's `CrossEntropyLoss`, `torch.nn.CrossEntropyLoss`.
    """

    label_smoothing: float = 0.0
    logits: bool = True
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("label_smoothing", 0, 1)

    def scores(self, y_hat: Tensor) -> Tensor:
        """Return the log-probabilities."""
        return log_probabilities(y_hat, self.logits, self.epsilon)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample."""
        return super().each(y_hat, smoothed(y, self.label_smoothing) if y.ndim == y_hat.ndim else y)

    def picked(self, scores: Tensor, y: Tensor, reduction: str) -> Tensor:
        """Return minus the log-probabilities of the target classes, after smoothing."""
        sharp = super().picked(scores, y, reduction)
        if not self.label_smoothing:
            return sharp
        weight = self.weights(scores)
        ignored = y == self.ignore_index
        uniform = scores if weight is None else scores * along_classes(weight, scores)
        uniform = -uniform.mean(min(1, scores.ndim - 1)).masked_fill(ignored, 0)
        if reduction == "mean":
            share = (~ignored).to(scores.dtype)
            if weight is not None:
                share = share * weight[y.masked_fill(ignored, 0)]
            uniform = uniform.sum() / share.sum()
        return (1 - self.label_smoothing) * sharp + self.label_smoothing * uniform


class NLLLoss(ClassLoss):
    """Take the negative log-likelihood of the target classes, given log-probabilities.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample, 0 where ignored.
        dim: The dimension of the classes; None for the second, or the only one.
        weight: A weight for each class, or None.
        ignore_index: The class index of samples to leave out.

    Shape:
        Predictions (batch, classes, ...) or (classes,).
        Targets: class indices of the same shape but without the classes, or probabilities of the same shape.

    Raises:
        DTypeError: If class indices are not integers.
        InputError: If a class index is out of range, where that is seen without waiting for a device.

    Example:
        >>> import torch, luxtorch as lt
        >>> log_probabilities = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log()
        >>> lt.NLLLoss()(log_probabilities, torch.tensor([0, 1]))
        tensor(0.3466)

    Source: `torch.nn.NLLLoss`.
    """

    def scores(self, y_hat: Tensor) -> Tensor:
        """Return the log-probabilities."""
        return y_hat


class FocalLoss(ClassLoss):
    """Take the cross entropy, with less weight on what is predicted well already.

    `-sum(y * (1 - p)**gamma * log(p))` over the classes.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample, 0 where ignored.
        dim: The dimension of the classes; None for the second, or the only one.
        weight: A weight for each class, or None.
        ignore_index: The class index of samples to leave out.
        gamma: How strongly the weight falls; with 0 it is the cross entropy.
        logits: Whether the predictions are logits; with False, Lux's default, they are probabilities.
        epsilon: What is added to probabilities inside the logarithm; None for the machine epsilon of their dtype.

    Shape:
        Predictions (batch, classes, ...) or (classes,).
        Targets: class indices of the same shape but without the classes, or probabilities of the same shape.

    Raises:
        DTypeError: If class indices are not integers.
        InputError: If a class index is out of range, where that is seen without waiting for a device.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.FocalLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.1733)

    Source: Lux's `FocalLoss`; Lin and others (2017).
    """

    gamma: float = 2.0
    logits: bool = True
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("gamma", 0)

    def scores(self, y_hat: Tensor) -> Tensor:
        """Return the log-probabilities, weighted."""
        log_p = log_probabilities(y_hat, self.logits, self.epsilon)
        if not self.gamma:
            return log_p
        # 1 - p, kept off 0, where a power of less than 2 has no derivative.
        rest = -log_p.expm1()
        return rest.clamp_min(machine_epsilon(y_hat, None)) ** self.gamma * log_p


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
        log_target: Whether the targets are logarithms of probabilities.

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
    log_target: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("label_smoothing", 0, 1)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one divergence a sample."""
        dim = class_dim(self, y_hat, self.dim)
        log_p = log_probabilities(moved(y_hat, dim), self.logits, self.epsilon)
        y = moved(y, dim)
        if self.log_target and not self.label_smoothing:
            return expectation(y.exp(), y) - expectation(y.exp(), log_p)
        y = smoothed(y.exp() if self.log_target else y, self.label_smoothing)
        return y.xlogy(y).sum(min(1, y.ndim - 1)) - expectation(y, log_p)
