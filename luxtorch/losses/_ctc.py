"""CTC: the loss of a sequence of labels that is not aligned with the predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._ctc import ctc_losses
from luxtorch._transforms import traced, transformed
from luxtorch.core import DTypeError, out_of_range

from ._loss import Loss, total


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
