"""Margin losses: hinge for labels of -1 and 1; contrastive, cosine and triplet losses for embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone

from ._loss import Loss, as_numbers


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

    `max(0, |anchor - positive| - |anchor - negative| + margin)`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        margin: By how much; above 0.
        p: The degree of the norm.
        eps: What is added to each difference, so that a norm of 0 has a derivative.
        swap: Whether the negative's distance is that to the nearer of anchor and positive.

    Shape:
        Predictions `(anchor, positive, negative)`: three tensors of one shape, (batch, features) or (features,).
        There are no targets: pass None.

    Example:
        >>> import torch, luxtorch as lt
        >>> anchor, positive, negative = torch.tensor([[[0.0]], [[1.0]], [[3.0]]])
        >>> lt.TripletMarginLoss(margin=4.0)((anchor, positive, negative), None)
        tensor(2.)

    Source: `torch.nn.TripletMarginLoss`, which takes three arguments: here all three are the prediction.
    """

    margin: float = 1.0
    p: float = 2.0
    eps: float = 1e-6
    swap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("margin", 0, strict=True)
        self.require_number("p", 0, strict=True)

    def checked(self, y_hat: tuple[Tensor, Tensor, Tensor], y: None) -> tuple[tuple[Tensor, ...], None]:
        """Return the three embeddings."""
        if y is not None:
            raise self.error(
                "y must be None: triplets have no targets.",
                expected="loss((anchor, positive, negative), None)",
                got="targets",
            )
        return checked_embeddings(self, y_hat, ("anchor", "positive", "negative")), None

    def each(self, y_hat: tuple[Tensor, Tensor, Tensor], y: None) -> Tensor:
        """Return the losses of the triples."""
        anchor, positive, negative = y_hat
        to_positive = _distance(anchor, positive, self.p, self.eps)
        to_negative = _distance(anchor, negative, self.p, self.eps)
        if self.swap:
            to_negative = to_negative.minimum(_distance(positive, negative, self.p, self.eps))
        return (to_positive - to_negative + self.margin).relu()


def _distance(a: Tensor, b: Tensor, p: float, eps: float) -> Tensor:
    """Return `torch.nn.functional.pairwise_distance`, whose third derivative torch cannot take through forward mode."""
    if reverse_alone():
        return F.pairwise_distance(a, b, p, eps)
    apart = (a - b + eps).abs()
    if p == math.inf:
        return apart.amax(-1)
    return apart.sum(-1) if p == 1 else apart.pow(p).sum(-1).pow(1 / p)


def checked_embeddings(loss: Loss, y_hat: Any, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return predictions that are a tuple of floating-point tensors of one shape."""
    expected = f"a tuple ({', '.join(names)}) of tensors of one shape, (batch, features) or (features,)"
    if not isinstance(y_hat, tuple | list) or len(y_hat) != len(names):
        got = f"{len(y_hat)} tensors" if isinstance(y_hat, tuple | list) else type(y_hat).__name__
        raise loss.error("The predictions are not the tensors that the loss compares.", expected=expected, got=got)
    for x in y_hat:
        loss.require_floating(x)
    if y_hat[0].ndim not in (1, 2) or any(x.shape != y_hat[0].shape for x in y_hat):
        raise loss.error(
            "The predictions do not fit each other: a loss never broadcasts.",
            expected=expected,
            got=", ".join(f"{name} of shape {tuple(x.shape)}" for name, x in zip(names, y_hat, strict=True)),
        )
    return tuple(y_hat)
