"""Collecting the gradients of a few calls for one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, tree_map

from . import _fused
from ._fused import Slots
from ._leaves import Leaves
from ._list_rule import ListRule, Updates
from ._rule_state import RuleState, check_names


class AccumGrad(ListRule):
    """Step at every n-th call only, by the mean of the gradients since the last step.

    In an `OptimiserChain`, the rules after it see that mean, and what they remember stays as it is in between;
    a schedule of theirs counts steps, not calls. Whether a call is the n-th is found in a tensor: all calls are
    one compiled graph, which computes the step each time and keeps it at the n-th.

    A parameter whose gradient is missing at some calls steps by the mean of those that came; where it is missing
    at the n-th, it keeps what has come for the next time. Each call counts the same, whatever its batch: for weighted
    means, ignored targets and batches of different sizes, `accumulate=n` of a training step is that of the whole.

    Args:
        n: The number of calls.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(1)
        >>> opt_state = optim.setup(optim.OptimiserChain(optim.AccumGrad(2), optim.Descent(0.5)), p)
        >>> for g in (1.0, 3.0, 5.0):
        ...     opt_state, p = optim.update(opt_state, p, torch.tensor([g]))
        ...     print(p)
        tensor([0.])
        tensor([-1.])
        tensor([-1.])

    The name is that of Optimisers.jl.
    """

    n: int

    descends = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.n) is not int or self.n < 1:
            raise InputError("The number of calls is not a positive integer.", expected="n >= 1", got=repr(self.n))

    def counts(self) -> bool:
        return True

    def slots(self, p: Tensor) -> Slots:
        return {"sum": torch.zeros_like(p), "count": torch.zeros((), dtype=torch.float32, device=p.device)}

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        """Return the means where the step is due, and zeros elsewhere."""
        means, state, due = self.collect(leaves, state)
        zeros = [None if g is None else torch.zeros_like(g) for g in means]
        return choose(due, means, zeros), state

    def collect(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState, Tensor | bool]:
        """Return the means so far, the new state, and whether the step is due."""
        check_names(leaves.names, state.leaves)
        assert isinstance(state.steps, Tensor)
        calls = (state.steps + 1) % self.n
        due: Tensor | bool = calls == 0
        if _fused.unobserved() and type(calls) is Tensor and calls.is_cpu and calls.ndim == 0:
            due = bool(calls == 0)  # a step that is not due need not be computed
        means: Updates = []
        slots = dict(state.leaves)
        for name, g in zip(leaves.names, leaves.grads, strict=True):
            if g is None:
                means.append(None)
                continue
            new = {"sum": state.leaves[name]["sum"] + g, "count": state.leaves[name]["count"] + 1}
            means.append(g if due is False else (new["sum"] / new["count"]).to(g.dtype))
            slots[name] = new if due is False else choose(due, _zeros(new), new)
        return means, RuleState(state.hyper, slots, calls), due


def choose(due: Tensor | bool, new: Any, old: Any) -> Any:
    """Return one of two trees, element by element where it depends on tensors."""
    if isinstance(due, bool):
        return new if due else old

    def pick(x: Any, y: Any) -> Any:
        return y if x is y else torch.where(due.to(x.device), x, y)

    return tree_map(pick, new, old)


def _zeros(slots: Slots) -> Slots:
    return {name: torch.zeros_like(value) for name, value in slots.items()}
