"""Parameters of low precision, optimized in high precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from luxtorch.core import InputError, tree_leaves

from ._hyperparameters import pack
from ._leaves import Leaves, pair, to_components
from ._list_rule import ChangeState, ListRule, Updates
from ._optimiserchain import list_rule
from ._rule_state import RuleState, check_names


class MixedPrecision(ListRule):
    """Keep a copy of the parameters in high precision, let a rule step on it, and round the result.

    Small steps then add up that would be lost in the rounding of parameters in bfloat16. The state holds the
    copies; what happens to the parameters outside the steps is overwritten by them. A parameter that has the
    dtype of the copies already has none. Where all is cast, as by `lt.bf16(ts)`, copies and averages stay as they are.

    Args:
        rule: The rule, or a chain of all rules.
        dtype: The dtype of the copies and of what the rule remembers.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
        >>> for rule in (optim.Descent(1e-3), optim.MixedPrecision(optim.Descent(1e-3))):
        ...     opt_state, new = optim.setup(rule, p), p
        ...     for _ in range(100):
        ...         opt_state, new = optim.update(opt_state, new, g)
        ...     print(new)
        tensor([1.], dtype=torch.bfloat16)
        tensor([0.8984], dtype=torch.bfloat16)

    The name is that of Optimisers.jl. Micikevicius et al., "Mixed precision training", 2018.
    """

    rule: ListRule
    dtype: torch.dtype = torch.float32

    needs_params = True

    def __init__(self, rule: GradientTransformation, dtype: torch.dtype = torch.float32) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError("The copies cannot have this dtype.", expected="a floating point dtype", got=repr(dtype))
        object.__setattr__(self, "rule", list_rule(rule))
        object.__setattr__(self, "dtype", dtype)

    def splits_vectors(self) -> bool:
        return self.rule.splits_vectors()

    def check(self, leaves: Leaves) -> None:
        self.rule.check(leaves)

    def keeps_copies(self) -> bool:
        return True

    def map_states(self, change: ChangeState, state: Any) -> Any:
        masters, inner = state
        return change(self, masters), self.rule.map_states(change, inner)

    def in_force(self, state: Any) -> MixedPrecision:
        return MixedPrecision(self.rule.in_force(state[1]), self.dtype)

    def own_numbers(self, state: Any, dtype: torch.dtype) -> list[Tensor]:
        return tree_leaves(state)  # its precision is that of the copies

    def describe(self, state: Any) -> str:
        return f"MixedPrecision({self.rule.describe(state[1])}, {self.dtype})"

    def init(self, params: Any) -> Any:
        leaves = pair(to_components(params) if self.splits_vectors() else params, None)
        self.check(leaves)
        names, tensors = leaves.names, leaves.params
        masters = [p.to(self.dtype) for p in tensors]
        inner = self.rule.init(dict(zip(names, masters, strict=True)))
        slots = {
            name: {} if p.dtype == self.dtype else {"master": master}
            for name, p, master in zip(names, tensors, masters, strict=True)
        }
        return RuleState(pack({}, beside=torch.device("cpu")), slots), inner

    def updates(self, leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        new, state = self.step(leaves, state)
        return [None if g is None else x - p for x, p, g in zip(new, leaves.params, leaves.grads, strict=True)], state

    def step(self, leaves: Leaves, state: Any) -> tuple[Any, Any]:
        copies, inner = state
        check_names(leaves.names, copies.leaves)
        masters = [  # there is none yet where a parameter had the dtype of the copies before a cast
            copies.leaves[name].get("master", p).to(self.dtype)
            for name, p in zip(leaves.names, leaves.params, strict=True)
        ]
        grads = [None if g is None else g.to(self.dtype) for g in leaves.grads]
        new, inner = self.rule.step(leaves._replace(params=masters, grads=grads), inner)
        slots = {
            name: {} if p.dtype == self.dtype else {"master": master}
            for name, p, master in zip(leaves.names, leaves.params, new, strict=True)
        }
        params = [
            p if g is None else master.to(p.dtype)
            for p, g, master in zip(leaves.params, leaves.grads, new, strict=True)
        ]
        return params, (copies._replace(leaves=slots), inner)
