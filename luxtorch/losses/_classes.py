"""What losses over several classes share: the class dimension, weights, and targets as indices or probabilities."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import readable, reverse_alone
from luxtorch.core import InputError, out_of_range, wrong_type
from luxtorch.core._sharded import beside, is_sharded
from luxtorch.core._weighted import watched_means

from ._loss import Loss, as_numbers, machine_epsilon, total


class ClassLoss(Loss):
    """Base class of losses over classes, of which each sample has one, or a distribution over all.

    A subclass defines `scores`: minus the loss that a sample would have if it were of a class, for each class.
    """

    dim: int | None = None
    weight: tuple[float, ...] | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None:
            self._set(weight=as_floats(self.weight))

    @abstractmethod
    def scores(self, y_hat: Tensor) -> Tensor:
        """Return minus the loss for each class.

        Args:
            y_hat: The predictions, with the classes in the second dimension, or in the only one.
        """

    def checked(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions with the classes in the second dimension, or in the only one, and fitting targets."""
        self.require_floating(y_hat)
        dim = class_dim(self, y_hat, self.dim)
        self._require_weights(y_hat.shape[dim])
        if y.ndim == y_hat.ndim:
            self.require_shape(y, y_hat.shape, y_hat)
            return moved(y_hat, dim), moved(as_numbers(y, y_hat), dim)
        if y.shape != y_hat.shape[:dim] + y_hat.shape[dim + 1 :]:
            raise self.error(
                "The targets do not fit the predictions: a loss never broadcasts.",
                expected=f"class indices of shape {tuple(y_hat.shape[:dim] + y_hat.shape[dim + 1 :])} or "
                f"probabilities of shape {tuple(y_hat.shape)}, for predictions of shape {tuple(y_hat.shape)}",
                got=f"targets of shape {tuple(y.shape)}",
                fix=f"The classes are in dimension {dim}: choose another by dim=...",
            )
        return moved(y_hat, dim), class_indices(self, y, ", or one probability for each class")

    def value(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the aggregated loss; the mean over class indices is weighted and leaves out what is ignored."""
        y_hat, y = self.checked(y_hat, y)
        if self.agg == "mean" and y.ndim < y_hat.ndim:
            taken = watched_means()
            if taken is not None and self._is_weighted(y):
                taken.append(self)
            return self.picked(self.scores(y_hat), y, "mean")
        return self.aggregate(self.each(y_hat, y))

    def sum_and_weight(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor | int | None]:
        """Return the sum of the losses, and the sum of the weights of the target classes without what is ignored."""
        if self.agg != "mean" or y.ndim == y_hat.ndim:
            return super().sum_and_weight(y_hat, y)
        y_hat, y = self.checked(y_hat, y)
        scores, ignored = self.scores(y_hat), y == self.ignore_index
        share, weight = (~ignored).to(torch.promote_types(scores.dtype, torch.float32)), self.weights(scores)
        if weight is not None:
            share = share * weight[y.masked_fill(ignored, 0)]
        return total(self.picked(scores, y, "none")), share.sum()

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample: 0 for what is ignored."""
        scores = self.scores(y_hat)
        if y.ndim < y_hat.ndim:
            return self.picked(scores, y, "none")
        weight = self.weights(scores)
        if weight is not None:
            scores = scores * along_classes(weight, scores)
        return -expectation(y, scores)

    def picked(self, scores: Tensor, y: Tensor, reduction: str) -> Tensor:
        """Return minus the scores of the target classes."""
        # torch's kernel would gather sharded scores.
        if (scores.ndim > 2 and not reverse_alone()) or (scores.ndim > 1 and is_sharded(scores)):
            return self._gathered(scores, y, reduction)
        try:
            return F.nll_loss(scores, y, self.weights(scores), ignore_index=self.ignore_index, reduction=reduction)
        except (IndexError, RuntimeError) as error:
            if "out of bounds" not in str(error):
                raise
            raise self._out_of_range(scores, error) from error

    def _gathered(self, scores: Tensor, y: Tensor, reduction: str) -> Tensor:
        """Pick without torch's kernel for images, whose third derivative wants what its second does not give."""
        ignored = y == self.ignore_index
        index = y.masked_fill(ignored, 0)
        losses = -scores.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(ignored, 0.0)
        weight = self.weights(scores)
        share = (~ignored).to(scores.dtype) if weight is None else weight[index].masked_fill(ignored, 0.0)
        return losses * share if reduction == "none" else (losses * share).sum() / share.sum()

    def _is_weighted(self, y: Tensor) -> bool:
        """Say whether the mean is weighted by the targets, as far as that is seen without waiting for a device."""
        if self.weight is not None or self.ignore_index != ClassLoss.ignore_index:
            return True
        return readable(y) and bool((y == self.ignore_index).any())

    def weights(self, scores: Tensor) -> Tensor | None:
        """Return the weights of the classes as a tensor beside the scores."""
        if self.weight is None:
            return None
        return beside(torch.tensor(self.weight, dtype=scores.dtype, device=scores.device), scores)

    def _require_weights(self, classes: int) -> None:
        if self.weight is not None and len(self.weight) != classes:
            raise self.error(
                "The weights do not fit the classes.", expected=f"{classes} weights", got=f"{len(self.weight)}"
            )

    def _out_of_range(self, scores: Tensor, error: Exception) -> InputError:
        classes = scores.shape[min(1, scores.ndim - 1)]
        return self.error(
            "A class index is out of range.",
            expected=f"indices from 0 to {classes - 1}, or ignore_index={self.ignore_index}",
            got=str(error),
            fix="Count classes from 0, or have the model predict more of them.",
        )


def class_dim(loss: Loss, y_hat: Tensor, dim: int | None) -> int:
    """Return the dimension of the classes: by default the second, or the only one."""
    if y_hat.ndim == 0 or not -y_hat.ndim <= (dim or 0) < y_hat.ndim:
        raise loss.error(
            "The predictions have no dimension of classes.",
            expected="predictions of shape (batch, classes, ...) or (classes,)"
            if dim is None
            else f"a dimension {dim}",
            got=f"predictions of shape {tuple(y_hat.shape)}",
        )
    return min(1, y_hat.ndim - 1) if dim is None else dim % y_hat.ndim


def class_indices(loss: Loss, y: Tensor, otherwise: str = "") -> Tensor:
    """Return targets as indices of dtype int64."""
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        fix = f"Pass y.long(){otherwise}."
        raise wrong_type("y", y, "class indices of dtype torch.int64", fix=fix, where=repr(loss))
    return y.long()


def moved(y_hat: Tensor, dim: int) -> Tensor:
    """Return a tensor with the dimension of the classes made the second, unless it is that or the only one."""
    return y_hat if dim == min(1, y_hat.ndim - 1) else y_hat.movedim(dim, 1)


def log_probabilities(y_hat: Tensor, logits: bool, epsilon: float | None) -> Tensor:
    """Return the logarithms of probabilities that are given by logits or as themselves."""
    if logits:
        return F.log_softmax(y_hat, min(1, y_hat.ndim - 1))
    return (y_hat + machine_epsilon(y_hat, epsilon)).log()


def smoothed(y: Tensor, label_smoothing: float) -> Tensor:
    """Return distributions over classes, drawn towards the uniform one."""
    if not label_smoothing:
        return y
    return y * (1 - label_smoothing) + label_smoothing / y.shape[min(1, y.ndim - 1)]


def expectation(y: Tensor, scores: Tensor) -> Tensor:
    """Return the sum of the scores over the classes, weighted by probabilities; 0 times minus infinity is 0."""
    impossible = (y == 0) & scores.isneginf()
    return (y * scores.masked_fill(impossible, 0)).sum(min(1, y.ndim - 1))


def along_classes(weight: Tensor, scores: Tensor) -> Tensor:
    """Return the weights of the classes, shaped to multiply scores."""
    return weight.reshape(-1, *(1 for _ in scores.shape[2:]))


def as_floats(weight: object) -> tuple[float, ...]:
    """Return weights as a hashable tuple of numbers; a tensor's values are read once, here."""
    values = weight.tolist() if isinstance(weight, Tensor) else weight
    if not isinstance(values, tuple | list) or not all(isinstance(value, int | float) for value in values):
        raise out_of_range("weight", weight, "a tuple, a list or a tensor of one number for each class")
    return tuple(float(value) for value in values)


Weights: TypeAlias = "float | tuple[Any, ...] | None"
"""A number, or numbers in tuples, or tuples of those: one for each row, and so on."""


def as_weights(loss: Loss, name: str) -> Weights:
    """Return an option of a loss as weights; a tensor's values are read once, here."""
    value = getattr(loss, name)
    try:
        return None if value is None else _frozen(value.tolist() if isinstance(value, Tensor) else value)
    except TypeError as error:
        expected = "a number, or a tuple, a list or a tensor of numbers that broadcasts to the predictions"
        raise out_of_range(name, value, expected, where=type(loss).__name__) from error


def _frozen(value: object) -> float | tuple[Any, ...]:
    """Return a number, or nested tuples whose parts have one shape; raise a TypeError for all else."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, tuple | list) or not value:
        raise TypeError(value)
    parts = tuple(map(_frozen, value))
    if len(set(map(shape_of, parts))) > 1:
        raise TypeError(value)
    return parts


def shape_of(weights: object) -> tuple[int, ...]:
    """Return the shape of the tensor of these weights."""
    return (len(weights), *shape_of(weights[0])) if isinstance(weights, tuple) else ()


def require_weights(loss: Loss, name: str, y_hat: Tensor) -> None:
    """Raise an InputError unless the weights of a loss broadcast to the predictions."""
    shape = shape_of(getattr(loss, name))
    sizes = y_hat.shape[y_hat.ndim - len(shape) :] if len(shape) <= y_hat.ndim else None
    if sizes is None or any(own not in (1, size) for own, size in zip(shape, sizes, strict=True)):
        raise loss.error(
            f"The {name} does not fit the predictions.",
            expected="a number, or numbers that broadcast to the predictions, such as one for each place in the last "
            "dimension",
            got=f"numbers of shape {shape} for predictions of shape {tuple(y_hat.shape)}",
        )


def weights_beside(weights: Weights, y_hat: Tensor) -> Tensor | None:
    """Return weights as a tensor beside the predictions."""
    if weights is None:
        return None
    return beside(torch.tensor(weights, dtype=y_hat.dtype, device=y_hat.device), y_hat)
