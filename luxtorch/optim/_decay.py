"""Pulling the parameters towards zero, by way of the gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ._hyperparameters import Number
from ._leafwise import LeafwiseRule, Slots


class WeightDecay(LeafwiseRule):
    """Add the parameters, times a number, to the gradients: the gradient of `lambda_ / 2 * p**2`.

    Before a rule such as `Adam` in an `OptimiserChain` this is L2 regularization; after it, the decay is
    decoupled, and not multiplied by the learning rate.

    Args:
        lambda_: The number.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.tensor([1.0, -2.0])}
        >>> opt_state = optim.setup(optim.OptimiserChain(optim.WeightDecay(0.5), optim.Descent(0.1)), ps)
        >>> optim.update(opt_state, ps, {"weight": torch.zeros(2)})[1]
        {'weight': tensor([ 0.9500, -1.9000])}

    The numbers are those of `weight_decay` in `torch.optim.SGD` and `torch.optim.Adam`; the name and the default
    are those of Optimisers.jl.
    """

    lambda_: Number = 5e-4

    descends = False
    needs_params = True

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return g + h["lambda_"] * p, slots


class SignDecay(LeafwiseRule):
    """Add the signs of the parameters, times a number, to the gradients: the gradient of `lambda_ * abs(p)`.

    Real and imaginary part of a complex parameter have a sign each.

    Args:
        lambda_: The number.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.tensor([1.0, -2.0])}
        >>> opt_state = optim.setup(optim.OptimiserChain(optim.SignDecay(0.5), optim.Descent(0.1)), ps)
        >>> optim.update(opt_state, ps, {"weight": torch.zeros(2)})[1]
        {'weight': tensor([ 0.9500, -1.9500])}

    The name and the default are those of Optimisers.jl.
    """

    lambda_: Number = 1e-3

    descends = False
    needs_params = True

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return g + h["lambda_"] * p.sign(), slots
