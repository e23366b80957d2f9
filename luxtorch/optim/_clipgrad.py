"""Limiting each element of the gradients."""

from __future__ import annotations

from torch import Tensor

from ._hyperparameters import Number
from ._leaves import Leaves
from ._list_rule import ListRule, Updates
from ._rule_state import RuleState, by_leaf, check_names


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
