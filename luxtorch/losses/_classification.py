"""Losses over several classes: cross entropy, negative log-likelihood, focal loss, Kullback-Leibler, CTC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._formulas import ctc_losses
from luxtorch._transforms import traced, transformed
from luxtorch.core import DTypeError, out_of_range

from ._classes import ClassLoss, along_classes, class_dim, expectation, log_probabilities, moved, smoothed
from ._loss import Loss, machine_epsilon, total


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


class CTCLoss(Loss):
    """Take the negative log-likelihood of a sequence of labels, summed over all its alignments with the predictions.

    The mean is that of torch: each sequence's loss is divided by its length first. Under the transforms of torch.func,
    forward-mode differentiation, torch.compile and `lt.jit`, for which torch's kernel has no rules, the recursion is
    run in plain operations, one step after another. On an ordinary autograd tape there is no second derivative.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sequence.
        blank: The class that stands for no label.
        zero_infinity: Whether a sequence too long to be aligned costs nothing, instead of infinity.

    Shape:
        Predictions (time, batch, classes): log-probabilities, as from `log_softmax(2)`.
        Targets `(labels, input_lengths, target_lengths)`: integers, (batch, longest), (batch,) and (batch,).

    Example:
        >>> import torch, luxtorch as lt
        >>> log_probabilities = torch.full((2, 1, 2), 0.5).log()
        >>> y = torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1])
        >>> lt.CTCLoss()(log_probabilities, y)
        tensor(0.2877)

    Source: `torch.nn.CTCLoss`, which takes four arguments: here the last three are the target, and labels
    are padded, not concatenated. Graves and others (2006).
    """

    blank: int = 0
    zero_infinity: bool = False

    def checked(self, y_hat: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the log-probabilities and `(labels, input_lengths, target_lengths)`."""
        self.require_floating(y_hat)
        fits = y_hat.ndim == 3 and isinstance(y, tuple | list) and len(y) == 3
        batch = y_hat.shape[1] if fits else 0
        if not fits or y[0].ndim != 2 or y[0].shape[0] != batch or any(part.shape != (batch,) for part in y[1:]):
            got = ", ".join(str(tuple(part.shape)) for part in y) if isinstance(y, tuple | list) else type(y).__name__
            raise self.error(
                "The targets do not fit the predictions.",
                expected="predictions of shape (time, batch, classes), targets (labels, input_lengths, target_lengths) "
                "of shapes (batch, longest), (batch,), (batch,)",
                got=f"predictions of shape {tuple(y_hat.shape)}, targets of shapes {got}",
            )
        if not all(y_hat.shape[1:]):
            raise self.error(
                "There must be at least one sequence and one class.",
                expected="at least one sequence and one class",
                got=f"predictions of shape {tuple(y_hat.shape)}",
            )
        if not 0 <= self.blank < y_hat.shape[2]:
            raise out_of_range("blank", self.blank, f"a class from 0 to {y_hat.shape[2] - 1}", where=repr(self))
        if any(part.dtype not in (torch.int32, torch.int64) for part in y):
            raise DTypeError(
                "Labels and lengths must be integers.",
                expected="targets of dtype torch.int64",
                got=", ".join(str(part.dtype) for part in y),
                where=repr(self),
            )
        return y_hat, (y[0].long(), y[1].long(), y[2].long())

    def value(self, y_hat: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the aggregated loss; the mean is that of the losses divided by the sequences' lengths."""
        return self.aggregate(self._shares(y_hat, y))

    def sum_and_weight(self, y_hat: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | int | None]:
        """Return the sum of the losses divided by the sequences' lengths, and the number of sequences."""
        if self.agg != "mean":
            return super().sum_and_weight(y_hat, y)
        losses = self._shares(y_hat, y)
        return total(losses), losses.numel()

    def _shares(self, y_hat: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y_hat, y = self.checked(y_hat, y)
        losses = self.each(y_hat, y)
        return losses / y[2].clamp_min(1).to(losses.dtype) if self.agg == "mean" else losses

    def each(self, y_hat: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return one loss a sequence."""
        log_p = y_hat.float() if y_hat.dtype in (torch.float16, torch.bfloat16) else y_hat
        if transformed() or traced():
            return ctc_losses(log_p, *y, self.blank, self.zero_infinity).to(y_hat.dtype)
        if y_hat.device.type == "cpu":
            self._require_range(y_hat, *y)
        losses = F.ctc_loss(log_p, *y, blank=self.blank, reduction="none", zero_infinity=self.zero_infinity)
        return losses.to(y_hat.dtype)

    def _require_range(self, y_hat: Tensor, labels: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> None:
        """Raise an InputError where a label or a length is out of range: torch's kernel reads beyond its input."""
        time, _, classes = y_hat.shape
        longest = labels.shape[1]
        used = labels[torch.arange(longest) < target_lengths[:, None]]
        for name, values, end in (
            ("label", used, classes - 1),
            ("input length", input_lengths, time),
            ("target length", target_lengths, longest),
        ):
            wrong = values[(values < 0) | (values > end)]
            if len(wrong):
                raise self.error(f"A {name} is out of range.", expected=f"from 0 to {end}", got=str(int(wrong[0])))
