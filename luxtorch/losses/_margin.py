"""Margin losses: hinge, soft margin, ranking; losses of distances and of embeddings; and those over several classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import readable, reverse_alone
from luxtorch.core import described, out_of_range
from luxtorch.core._sharded import beside

from ._classes import Weights, as_floats, as_weights, class_indices, require_weights, weights_beside
from ._loss import Loss, as_numbers, checked_parts, log_sigmoid, unlike


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


class SoftMarginLoss(Loss):
    """Take the logistic loss of a score for labels of -1 and 1, `log(1 + exp(-y * y_hat))`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Scores and labels of one shape, any; the labels are -1 or 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.losses.SoftMarginLoss()(torch.tensor([0.0, 100.0]), torch.tensor([-1.0, 1.0]))
        tensor(0.3466)

    Source: `torch.nn.SoftMarginLoss`, which overflows where `y * y_hat` is below -88.
    """

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the logistic losses."""
        return -log_sigmoid(y * y_hat)


class MarginRankingLoss(Loss):
    """Ask that of two scores the right one be higher, by a margin: `max(0, margin - y * (x1 - x2))`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        margin: By how much.

    Shape:
        Predictions `(x1, x2)`: two tensors of one shape, any.
        Labels of that shape: 1 where `x1` should be the higher one, -1 where `x2` should.

    Example:
        >>> import torch, luxtorch as lt
        >>> x1, x2 = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
        >>> lt.losses.MarginRankingLoss(margin=0.5)((x1, x2), torch.tensor([1, 1]))
        tensor(0.7500)

    Source: `torch.nn.MarginRankingLoss`, which takes three arguments: here the pair is the prediction.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("margin", -math.inf)

    def checked(self, y_hat: tuple[Tensor, Tensor], y: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the pair and the labels."""
        x1, x2 = checked_embeddings(self, y_hat, ("x1", "x2"), any_shape=True)
        self.require_shape(y, x1.shape, x1)
        return (x1, x2), as_numbers(y, x1)

    def each(self, y_hat: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """Return how much is missing of the margin."""
        x1, x2 = y_hat
        return (self.margin - y * (x1 - x2)).clamp_min(0)


class HingeEmbeddingLoss(Loss):
    """Draw pairs with label 1 together and push pairs with label -1 apart, up to a margin.

    `y_hat` for a label of 1, `max(0, margin - y_hat)` for a label of -1, where `y_hat` is the distance of a pair.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        margin: The distance from which an unlike pair costs nothing.

    Shape:
        Distances and labels of one shape, any; the labels are -1 or 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.losses.HingeEmbeddingLoss()(torch.tensor([2.0, 0.5]), torch.tensor([1, -1]))
        tensor(1.2500)

    Source: `torch.nn.HingeEmbeddingLoss`; `SiameseContrastiveLoss` squares both parts.
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("margin", -math.inf)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the distances, or what is missing of the margin."""
        together = torch.where(y != -1, y_hat, 0.0)
        return together + torch.where(y != 1, (self.margin - y_hat).clamp_min(0), 0.0)


_NOT_ZERO = 1e-12
"""What torch adds to squared lengths before it divides by them."""


class SiameseContrastiveLoss(Loss):
    """Draw pairs with label 0 together and push pairs with label 1 apart, up to a margin.

    `(1 - y) * y_hat**2 + y * max(0, margin - y_hat)**2`, where `y_hat` is the distance of a pair.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        margin: The distance from which an unlike pair costs nothing; not negative.

    Shape:
        Distances and labels of one shape, any; the labels are 0 or 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.SiameseContrastiveLoss()(torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0]))
        tensor(2.1250)

    Source: Lux's `SiameseContrastiveLoss`; Hadsell, Chopra and LeCun (2006).
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("margin", 0)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the contrastive losses."""
        return (1 - y) * y_hat.square() + y * (self.margin - y_hat).relu().square()


class CosineEmbeddingLoss(Loss):
    """Turn pairs with label 1 in one direction, and pairs with label -1 away from each other.

    `1 - cos(x1, x2)` for a label of 1, `max(0, cos(x1, x2) - margin)` for a label of -1.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        margin: The cosine up to which an unlike pair costs nothing; from -1 to 1.

    Shape:
        Predictions `(x1, x2)`: two tensors of one shape, (batch, features) or (features,).
        Labels -1 or 1: (batch,) or ().

    Example:
        >>> import torch, luxtorch as lt
        >>> x1, x2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> lt.CosineEmbeddingLoss()((x1, x2), torch.tensor([1]))
        tensor(1.)

    Source: `torch.nn.CosineEmbeddingLoss`, which takes three arguments: here the pair is the prediction.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("margin", -1, 1)

    def checked(self, y_hat: tuple[Tensor, Tensor], y: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the pair and the labels."""
        x1, x2 = checked_embeddings(self, y_hat, ("x1", "x2"))
        self.require_shape(y, x1.shape[:-1], x1)
        return (x1, x2), as_numbers(y, x1)

    def each(self, y_hat: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """Return the losses of the pairs."""
        if reverse_alone():
            return F.cosine_embedding_loss(*y_hat, y, margin=self.margin, reduction="none")
        x1, x2 = y_hat
        lengths = ((x1.square().sum(-1) + _NOT_ZERO) * (x2.square().sum(-1) + _NOT_ZERO)).sqrt()
        cosine = (x1 * x2).sum(-1) / lengths
        return torch.where(y == 1, 1 - cosine, torch.where(y == -1, (cosine - self.margin).relu(), 0.0))


class TripletMarginLoss(Loss):
    """Ask that an anchor be nearer to a positive than to a negative, by a margin.

    `max(0, |anchor - positive| - |anchor - negative| + margin)`, with the distances that a norm or a function gives.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        margin: By how much; above 0.
        p: The degree of the norm.
        eps: What is added to each difference, so that a norm of 0 has a derivative.
        swap: Whether the negative's distance is that to the nearer of anchor and positive.
        distance: A function of two tensors that takes the place of the norm, of `p` and of `eps`: it returns a
            distance for each sample.

    Shape:
        Predictions `(anchor, positive, negative)`: three tensors of one shape, (batch, features) or (features,); with
        `distance`, any that it takes. There are no targets: pass None.

    Example:
        >>> import torch, luxtorch as lt
        >>> anchor, positive, negative = torch.tensor([[[0.0]], [[1.0]], [[3.0]]])
        >>> lt.TripletMarginLoss(margin=4.0)((anchor, positive, negative), None)
        tensor(2.)
        >>> far = lambda a, b: (a - b).abs().amax(-1)
        >>> lt.TripletMarginLoss(distance=far)((anchor, positive, negative), None)
        tensor(0.)

    Source: `torch.nn.TripletMarginLoss` and `torch.nn.TripletMarginWithDistanceLoss`, which take three arguments: here
    all three are the prediction.
    """

    margin: float = 1.0
    p: float = 2.0
    eps: float = 1e-6
    swap: bool = False
    distance: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("margin", 0, strict=True)
        self.require_number("p", 0, strict=True)
        if self.distance is not None and not callable(self.distance):
            expected = "a function of two tensors, or None for the norm"
            raise out_of_range("distance", self.distance, expected, where=type(self).__name__)

    def checked(self, y_hat: tuple[Tensor, Tensor, Tensor], y: None) -> tuple[tuple[Tensor, ...], None]:
        """Return the three embeddings."""
        if y is not None:
            raise self.error(
                "y must be None: triplets have no targets.",
                expected="loss((anchor, positive, negative), None)",
                got="targets",
            )
        names = ("anchor", "positive", "negative")
        return checked_embeddings(self, y_hat, names, any_shape=self.distance is not None), None

    def each(self, y_hat: tuple[Tensor, Tensor, Tensor], y: None) -> Tensor:
        """Return the losses of the triples."""
        anchor, positive, negative = y_hat
        to_positive, to_negative = self._apart(anchor, positive), self._apart(anchor, negative)
        if self.swap:
            to_negative = to_negative.minimum(self._apart(positive, negative))
        return (to_positive - to_negative + self.margin).clamp_min(0)

    def _apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of the samples of two tensors."""
        if self.distance is None:
            return _distance(a, b, self.p, self.eps)
        apart = self.distance(a, b)
        if not isinstance(apart, Tensor) or (a.ndim > 1 and apart.shape[:1] != a.shape[:1]):
            raise self.error(
                "The distances are not those of the samples.",
                expected=f"a distance for each of {len(a)} samples, from tensors of shape {tuple(a.shape)}",
                got=described(apart),
                fix="Reduce the last dimension only, for instance (a - b).norm(dim=-1).",
            )
        return apart


def _distance(a: Tensor, b: Tensor, p: float, eps: float) -> Tensor:
    """Return `torch.nn.functional.pairwise_distance`, whose third derivative torch cannot take through forward mode."""
    if reverse_alone():
        return F.pairwise_distance(a, b, p, eps)
    apart = (a - b + eps).abs()
    if p == math.inf:
        return apart.amax(-1)
    return apart.sum(-1) if p == 1 else apart.pow(p).sum(-1).pow(1 / p)


def checked_embeddings(loss: Loss, y_hat: Any, names: tuple[str, ...], any_shape: bool = False) -> tuple[Tensor, ...]:
    """Return predictions that are a tuple of floating-point tensors of one shape, that of embeddings if not any."""
    shape = " of one shape" + ("" if any_shape else ", (batch, features) or (features,)")
    parts = checked_parts(loss, y_hat, names, shape)
    if not (any_shape or parts[0].ndim in (1, 2)) or any(x.shape != parts[0].shape for x in parts):
        raise unlike(loss, parts, names, shape)
    return parts


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
