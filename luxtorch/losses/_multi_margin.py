"""Margin losses over several classes, of which each sample has one, or some."""

from __future__ import annotations

import torch
from torch import Tensor

from luxtorch._transforms import readable
from luxtorch.core import out_of_range
from luxtorch.core._sharded import beside

from ._classes import as_floats, class_indices
from ._loss import Loss, log_sigmoid
from ._weights import Weights, as_weights, require_weights, weights_beside


class MultiMarginLoss(Loss):
    """Ask that the score of the target class be the highest, by a margin.

    `sum(max(0, margin - y_hat[y] + y_hat[i])**p) / classes` over the other classes `i`.

    The mean is one over all samples, whatever their weights are, as in torch.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample.
        p: The power, 1 or 2.
        margin: By how much.
        weight: A weight for each class, with which the losses of samples of that class are multiplied; or None.

    Shape:
        Scores (batch, classes) or (classes,).
        Targets: class indices, (batch,) or ().

    Raises:
        DTypeError: If class indices are not integers.
        InputError: If a class index is out of range, where that is seen without waiting for a device.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.losses.MultiMarginLoss()(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3]))
        tensor(0.3250)

    Source: `torch.nn.MultiMarginLoss`.
    """

    p: int = 1
    margin: float = 1.0
    weight: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (1, 2):
            raise out_of_range("p", self.p, "1 or 2", where=type(self).__name__)
        if self.weight is not None:
            self._set(weight=as_floats(self.weight))

    def checked(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and the indices of the target classes."""
        _require_classes(self, y_hat)
        self.require_shape(y, y_hat.shape[:-1], y_hat)
        if self.weight is not None and len(self.weight) != y_hat.shape[-1]:
            expected = f"{y_hat.shape[-1]} weights"
            raise self.error("The weights do not fit the classes.", expected=expected, got=f"{len(self.weight)}")
        return y_hat, _indices(self, y, y_hat, least=0)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample."""
        index = y.unsqueeze(-1)
        missing = (self.margin - y_hat.gather(-1, index) + y_hat).relu()
        missing = missing.masked_fill(index == _classes(y_hat), 0)
        losses = (missing if self.p == 1 else missing.square()).mean(-1)
        weight = weights_beside(self.weight, y_hat)
        return losses if weight is None else losses * weight[y]


class MultiLabelMarginLoss(Loss):
    """Ask that the scores of all target classes be higher than those of all others, by 1.

    `sum(max(0, 1 - y_hat[j] + y_hat[i])) / classes` over the target classes `j` and the other classes `i`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample.

    Shape:
        Scores (batch, classes) or (classes,).
        Targets: class indices, (batch, labels) or (labels,), for samples with fewer ones padded by -1; what follows a
        -1 does not count. All pairs of a label and a class are in memory at once, so few columns are better.

    Raises:
        DTypeError: If class indices are not integers.
        InputError: If a class index is out of range, where that is seen without waiting for a device.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.losses.MultiLabelMarginLoss()(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([[3, 0, -1]]))
        tensor(0.8500)

    Source: `torch.nn.MultiLabelMarginLoss`, which wants as many columns of targets as there are classes.
    """

    def checked(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and the indices of the target classes."""
        _require_classes(self, y_hat)
        self.require_shape(y, (*y_hat.shape[:-1], y.shape[-1] if y.ndim else 1), y_hat)
        return y_hat, _indices(self, y, y_hat, least=-1)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample."""
        counts = (y < 0).cumsum(-1) == 0
        index = y.masked_fill(~counts, 0)
        right = ((index.unsqueeze(-1) == _classes(y_hat)) & counts.unsqueeze(-1)).any(-2)
        missing = (1 - y_hat.gather(-1, index).unsqueeze(-1) + y_hat.unsqueeze(-2)).relu()
        without = right.unsqueeze(-2) | ~counts.unsqueeze(-1)
        return missing.masked_fill(without, 0).sum(-2).mean(-1)


class MultiLabelSoftMarginLoss(Loss):
    """Take the mean over the classes of the binary cross entropies of logits.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample.
        weight: What the cross entropies are multiplied by: a number, or a tuple, a list or a tensor of numbers that
            broadcasts to the predictions, such as one for each class; or None.

    Shape:
        Logits and labels of one shape, (..., classes); the labels are 0 or 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.losses.MultiLabelSoftMarginLoss()(torch.tensor([[0.0, 100.0]]), torch.tensor([[1, 1]]))
        tensor(0.3466)

    Source: `torch.nn.MultiLabelSoftMarginLoss`.
    """

    weight: Weights = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(weight=as_weights(self, "weight"))

    def checked(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and labels of one shape, to which the weights broadcast."""
        if y_hat.ndim == 0:
            raise self.error("The predictions have no classes.", expected="logits (..., classes)", got="shape ()")
        require_weights(self, "weight", y_hat)
        return super().checked(y_hat, y)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample."""
        losses = -y * log_sigmoid(y_hat) - (1 - y) * log_sigmoid(-y_hat)
        weight = weights_beside(self.weight, y_hat)
        return (losses if weight is None else losses * weight).mean(-1)


def _require_classes(loss: Loss, y_hat: Tensor) -> None:
    loss.require_floating(y_hat)
    if y_hat.ndim not in (1, 2):
        raise loss.error(
            "The predictions are not the scores of classes.",
            expected="predictions of shape (batch, classes) or (classes,)",
            got=f"predictions of shape {tuple(y_hat.shape)}",
        )


def _indices(loss: Loss, y: Tensor, y_hat: Tensor, least: int) -> Tensor:
    """Return targets as indices of classes, from the least that is allowed."""
    y, classes = class_indices(loss, y), y_hat.shape[-1]
    if readable(y) and bool(((y < least) | (y >= classes)).any()):
        expected = f"indices from 0 to {classes - 1}" + (", or -1 for no more" if least else "")
        got = f"indices from {y.min().item()} to {y.max().item()}"
        fix = "Count classes from 0, or have the model predict more of them."
        raise loss.error("A class index is out of range.", expected=expected, got=got, fix=fix)
    return y


def _classes(y_hat: Tensor) -> Tensor:
    return beside(torch.arange(y_hat.shape[-1], device=y_hat.device), y_hat)
