"""Binary losses: cross entropy and focal loss for a yes or no at each element, Dice loss for masks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone

from ._classes import Weights, as_weights, require_weights, weights_beside
from ._loss import Loss, log_sigmoid, machine_epsilon


class BinaryCrossEntropyLoss(Loss):
    """Take the negative log-likelihood of labels of 0 and 1, `-y * log(p) - (1 - y) * log(1 - p)`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        weight: What the losses are multiplied by: a number, or a tuple, a list or a tensor of numbers that broadcasts
            to the predictions, such as one for each place in the last dimension; or None.
        pos_weight: The same for the part of the losses that `y` multiplies: above 1, it counts what was missed more.
        logits: Whether the predictions are logits, `p = sigmoid(y_hat)`; with False they are probabilities.
        label_smoothing: How far the labels are drawn towards 1/2, from 0 to 1.
        epsilon: What is added to probabilities inside the logarithms; None for the machine epsilon of their dtype.

    Shape:
        Predictions and labels of one shape, any; a label may be anything from 0 to 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> y = torch.tensor([1.0, 0.0])
        >>> lt.BinaryCrossEntropyLoss()(torch.tensor([0.0, -100.0]), y)
        tensor(0.3466)
        >>> lt.BinaryCrossEntropyLoss(logits=False)(torch.tensor([0.5, 0.0]), y)
        tensor(0.3466)

    Source: Lux's `BinaryCrossEntropyLoss`, `torch.nn.BCEWithLogitsLoss`.
    """

    weight: Weights = None
    pos_weight: Weights = None
    logits: bool = True
    label_smoothing: float = 0.0
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("label_smoothing", 0, 1)
        for name in ("weight", "pos_weight"):
            self._set(**{name: as_weights(self, name)})

    def checked(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and labels of one shape, to which the weights broadcast."""
        y_hat, y = super().checked(y_hat, y)
        for name in ("weight", "pos_weight"):
            require_weights(self, name, y_hat)
        return y_hat, y

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the negative log-likelihoods."""
        if self.label_smoothing:
            y = y * (1 - self.label_smoothing) + self.label_smoothing / 2
        weight, pos_weight = weights_beside(self.weight, y_hat), weights_beside(self.pos_weight, y_hat)
        if self.logits:
            if reverse_alone():
                return F.binary_cross_entropy_with_logits(y_hat, y, weight, reduction="none", pos_weight=pos_weight)
            share = 1 if pos_weight is None else (pos_weight - 1) * y + 1
            losses = (1 - y) * y_hat - share * log_sigmoid(y_hat)
            return losses if weight is None else weight * losses
        epsilon = machine_epsilon(y_hat, self.epsilon)
        yes, no = y.xlogy(y_hat + epsilon), (1 - y).xlogy(1 - y_hat + epsilon)
        losses = -(yes if pos_weight is None else pos_weight * yes) - no
        return losses if weight is None else weight * losses


class BinaryFocalLoss(Loss):
    """Take the binary cross entropy, with less weight on what is predicted well already.

    `-y * (1 - p)**gamma * log(p) - (1 - y) * p**gamma * log(1 - p)`.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.
        gamma: How strongly the weight falls; with 0 it is the binary cross entropy.
        logits: Whether the predictions are logits, `p = sigmoid(y_hat)`; with False they are probabilities.
        epsilon: What is added to probabilities inside the logarithms; None for the machine epsilon of their dtype.

    Shape:
        Predictions and labels of one shape, any; a label may be anything from 0 to 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.BinaryFocalLoss()(torch.tensor([0.0]), torch.tensor([1.0]))
        tensor(0.1733)

    Source: Lux's `BinaryFocalLoss`; Lin and others (2017).
    """

    gamma: float = 2.0
    logits: bool = True
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("gamma", 0)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the weighted negative log-likelihoods."""
        if self.logits:
            log_yes, log_no = log_sigmoid(y_hat), log_sigmoid(-y_hat)
        else:
            epsilon = machine_epsilon(y_hat, self.epsilon)
            log_yes, log_no = (y_hat + epsilon).log(), (1 - y_hat + epsilon).log()
        # The powers as exponentials of logarithms: their derivatives are finite for every gamma.
        yes = (self.gamma * log_no).exp() * log_yes
        no = (self.gamma * log_yes).exp() * log_no
        return -y * yes - (1 - y) * no


class DiceCoeffLoss(Loss):
    """Take how little two masks overlap, `1 - (2 * sum(y_hat * y) + smooth) / (sum(y_hat**2) + sum(y**2) + smooth)`.

    The sums are over all dimensions but the first, the batch.

    Args:
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses, one a sample.
        smooth: What keeps the quotient of two empty masks at 1; not negative.

    Shape:
        Masks of one shape, (batch, ...): probabilities, and labels from 0 to 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.DiceCoeffLoss()(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0, 1, 1]]))
        tensor(0.4000)

    Source: Lux's `DiceCoeffLoss`; Milletari, Navab and Ahmadi (2016).
    """

    smooth: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("smooth", 0)

    def checked(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return two masks of one shape."""
        y_hat, y = super().checked(y_hat, y)
        if y_hat.ndim < 2:
            raise self.error(
                "The masks have no dimension besides the batch.",
                expected="masks of shape (batch, ...)",
                got=f"masks of shape {tuple(y_hat.shape)}",
                fix="Add a batch dimension: y_hat[None], y[None].",
            )
        return y_hat, y

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample."""
        y_hat, y = y_hat.flatten(1), y.flatten(1)
        overlap = 2 * (y_hat * y).sum(1) + self.smooth
        total = (y_hat.square() + y.square()).sum(1) + self.smooth
        return 1 - overlap / total
