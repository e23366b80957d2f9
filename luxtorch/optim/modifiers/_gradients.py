"""Changing gradients before a step: clipping by value and by norm, weight decay (L2) and sign decay (L1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from luxtorch.core import out_of_range

from .._hyperparameters import Number
from .._kernels import numbers, unobserved
from .._leafwise import LeafwiseRule
from .._leaves import Leaves
from .._rule import ListRule, Updates
from .._rule_state import RuleState, Slots, by_leaf, check_names


class ClipGrad(ListRule):
    """Limit each element of the gradients to `[-delta, delta]`, of a complex one each of its two parts.

    Args:
        delta: The limit.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(3)}
        >>> opt_state = optim.setup(optim.OptimiserChain(optim.ClipGrad(1.0), optim.Descent(0.5)), ps)
        >>> optim.update(opt_state, ps, {"weight": torch.tensor([-9.0, 0.5, 2.0])})[1]
        {'weight': tensor([ 0.5000, -0.2500, -0.5000])}

    The numbers are those of `torch.nn.utils.clip_grad_value_`; the name and the default are those of Optimisers.jl.
    """

    delta: Number = 10.0

    descends = False

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, state.leaves)
        given = {name: g for name, g in zip(leaves.names, leaves.grads, strict=True) if g is not None}
        hyper = by_leaf(self.hyper_now(state), self.hyperparameters, given)
        clipped = {name: _clip(g, hyper[name]["delta"].to(g.dtype)) for name, g in given.items()}
        return [clipped.get(name) for name in leaves.names], state.after(state.leaves)


def _clip(g: Tensor, limit: Tensor) -> Tensor:
    return g.clamp(-limit, limit)


class ClipNorm(ListRule):
    """Scale the gradients down where their norm is above a limit.

    Gradients that are missing or frozen do not count towards the norm. One that is NaN makes all of them NaN. Complex
    elements count by their magnitudes.

    Args:
        max_norm: The limit.
        p: The order of the norm: a positive number, or `math.inf` for the largest element.
        per_array: Whether each parameter is scaled by the norm of its own gradient, instead of all by the norm of
            all. The components of a ComponentVector are parameters of their own then.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2)}
        >>> opt_state = optim.setup(optim.OptimiserChain(optim.ClipNorm(1.0), optim.Descent(1.0)), ps)
        >>> optim.update(opt_state, ps, {"weight": torch.tensor([3.0, -4.0])})[1]
        {'weight': tensor([-0.6000,  0.8000])}

    The numbers are those of `torch.nn.utils.clip_grad_norm_`, which adds 1e-6 to the norm; the name and the default
    are those of Optimisers.jl, whose norm is always per array. Pascanu, Mikolov and Bengio, "On the difficulty of
    training recurrent neural networks", 2013.
    """

    max_norm: Number = 10.0
    p: float | int = 2
    per_array: bool = dataclasses.field(default=False, kw_only=True)

    descends = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.p > 0:
            raise out_of_range("p", self.p, "above 0")

    def splits_vectors(self) -> bool:
        return self.per_array

    def takes_complex(self) -> bool:
        return True

    def by_parameter(self) -> bool:
        return self.per_array

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, state.leaves)
        given = {name: g for name, g in zip(leaves.names, leaves.grads, strict=True) if g is not None}
        if not given:
            return list(leaves.grads), state
        hyper = by_leaf(self.hyper_now(state), self.hyperparameters, given)
        sizes = {name: _magnitudes(g) if name in leaves.in_parts and self.p != 2 else g for name, g in given.items()}
        if self.per_array:
            clipped = {
                name: _scale([g], [_norm(sizes[name], self.p)], self.p, hyper[name]["max_norm"])[0]
                for name, g in given.items()
            }
        else:
            norms = _norms(list(sizes.values()), self.p)
            max_norm = next(iter(hyper.values()))["max_norm"]
            clipped = dict(zip(given, _scale(list(given.values()), norms, self.p, max_norm), strict=True))
        return [clipped.get(name) for name in leaves.names], state.after(state.leaves)


def _magnitudes(parts: Tensor) -> Tensor:
    """Return the magnitudes of complex numbers in parts. The norm of order 2 needs none: it is that of the parts."""
    dtype = torch.promote_types(parts.dtype, torch.float32)
    magnitudes: Tensor = torch.linalg.vector_norm(parts, dim=-1, dtype=dtype)
    return magnitudes


def _norms(grads: Sequence[Tensor], p: float) -> Sequence[Tensor]:
    # One call for all leaves, which has no rule under the transforms.
    if len(grads) > 1 and unobserved() and all(g.dtype in (torch.float32, torch.float64) for g in grads):
        norms: Sequence[Tensor] = torch._foreach_norm(list(grads), p)
        return norms
    return [_norm(g, p) for g in grads]


def _norm(g: Tensor, p: float) -> Tensor:
    """Return the norm of a gradient, in float32 where that is more than the gradient's own dtype."""
    norm: Tensor = torch.linalg.vector_norm(g, p, dtype=torch.promote_types(g.dtype, torch.float32))
    return norm


def _scale(grads: Sequence[Tensor], norms: Sequence[Tensor], p: float, max_norm: Tensor) -> Sequence[Tensor]:
    """Return gradients scaled down by the norm of their norms."""
    first = norms[0]
    total = first if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(first) for n in norms]), p)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if unobserved():
        number = numbers(factor.reshape(1))
        if number == [1.0]:  # that spares a pass over the gradients
            return grads
        if number is not None:
            scaled: Sequence[Tensor] = torch._foreach_mul(list(grads), number[0])
            return scaled
    return [(g * factor.to(g.device)).to(g.dtype) for g in grads]


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
