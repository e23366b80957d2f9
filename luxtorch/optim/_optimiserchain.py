"""One rule after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchopt.base import ChainedGradientTransformation, GradientTransformation

from luxtorch.core import DTypeError, InputError

from ._accumgrad import AccumGrad, choose
from ._decay import SignDecay, WeightDecay
from ._leaves import Leaves, to_components
from ._list_rule import ChangeState, ListRule, Updates


class OptimiserChain(ListRule):
    """Hand the gradients from one rule to the next.

    What the last one makes of them is subtracted from the parameters; alone, a rule that only changes gradients
    is gradient descent with learning rate 1, and so is an empty chain. The last rule steps as if it were alone: by
    its fused kernel where it has one.

    Args:
        rules: The rules. Chains among them are spliced.

    Raises:
        DTypeError: If one is not a rule of this package. Those of torchopt chain by `torchopt.chain`.
        InputError: If a rule that keeps copies of the parameters is not the last.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2)}
        >>> rule = optim.OptimiserChain(optim.ClipNorm(1.0), optim.AdamW(1e-3))
        >>> opt_state = optim.adjust(optim.setup(rule, ps), max_norm=0.5, lr=0.1)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2)})
        >>> ps
        {'weight': tensor([-0.1000, -0.1000])}

    The name is that of Optimisers.jl.
    """

    rules: tuple[ListRule, ...]

    needs_params = True

    def __init__(self, *rules: GradientTransformation) -> None:
        parts = tuple(
            part
            for rule in map(list_rule, rules)
            for part in (rule.rules if isinstance(rule, OptimiserChain) else [rule])
        )
        for part in parts[:-1]:
            if part.keeps_copies():
                raise InputError(
                    f"{type(part).__name__} keeps copies of the parameters, and is not the last rule of the chain.",
                    expected="MixedPrecision(OptimiserChain(...)), or at the end of the chain",
                    fix="Put the rules that come after it into the rule that it wraps.",
                )
        object.__setattr__(self, "rules", parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimiserChain, self.rules

    def splits_vectors(self) -> bool:
        return any(rule.splits_vectors() for rule in self.rules)

    def check(self, leaves: Leaves) -> None:
        for rule in self.rules:
            rule.check(leaves)

    def keeps_copies(self) -> bool:
        return any(rule.keeps_copies() for rule in self.rules)

    def map_states(self, change: ChangeState, state: Any) -> Any:
        return tuple(rule.map_states(change, part) for rule, part in zip(self.rules, state, strict=True))

    def in_force(self, state: Any) -> OptimiserChain:
        return OptimiserChain(*(rule.in_force(part) for rule, part in zip(self.rules, state, strict=True)))

    def own_numbers(self, state: Any, dtype: torch.dtype) -> list[Tensor]:
        parts = zip(self.rules, state, strict=True)
        return [number for rule, part in parts for number in rule.own_numbers(part, dtype)]

    def describe(self, state: Any) -> str:
        parts = (rule.describe(part) for rule, part in zip(self.rules, state, strict=True))
        return f"OptimiserChain({', '.join(parts)})"

    def init(self, params: Any) -> Any:
        if self.splits_vectors():
            params = to_components(params)
        return tuple(rule.init(params) for rule in self.rules)

    def updates(self, leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        return _run(self.rules, leaves, state, stepping=False)

    def step(self, leaves: Leaves, state: Any) -> tuple[Any, Any]:
        return _run(self.rules, leaves, state, stepping=True)


def _run(rules: Sequence[ListRule], leaves: Leaves, states: Sequence[Any], *, stepping: bool) -> tuple[Any, Any]:
    """Return the new parameters, or what to add to them, and the new states of the rules."""
    if not rules:
        if not stepping:
            return negative(leaves.grads), ()
        return [p if g is None else p - g for p, g in zip(leaves.params, leaves.grads, strict=True)], ()
    (rule, *rest), (state, *rest_states) = rules, states
    if isinstance(rule, AccumGrad):
        means, state, due = rule.collect(leaves, state)
        unchanged = leaves.params if stepping else [None if g is None else torch.zeros_like(g) for g in means]
        new, new_states = unchanged, tuple(rest_states)
        if due is not False:
            new, new_states = _run(rest, leaves._replace(grads=means), rest_states, stepping=stepping)
            new, new_states = choose(due, (new, new_states), (unchanged, tuple(rest_states)))
        return new, (state, *new_states)
    if not rest:
        if stepping:
            params, state = rule.step(leaves, state)
            return params, (state,)
        updates, state = rule.updates(leaves, state)
        return updates if rule.descends else negative(updates), (state,)
    updates, state = rule.updates(leaves, state)
    grads = negative(updates) if rule.descends else updates
    new, new_states = _run(rest, leaves._replace(grads=grads), rest_states, stepping=stepping)
    return new, (state, *new_states)


def negative(updates: Updates) -> Updates:
    """Return what is to be added where the given is to be subtracted, and the other way round."""
    return [None if u is None else -u for u in updates]


def list_rule(rule: GradientTransformation) -> ListRule:
    """Return a rule of this package, also for a torchopt chain of such.

    Raises:
        DTypeError: If it is something else.
    """
    rule = as_one(rule)
    if isinstance(rule, ListRule):
        return rule
    raise DTypeError(
        "A part of a rule is not a rule of luxtorch.optim.",
        expected="rules such as optim.Adam(1e-3)",
        got=repr(rule) if isinstance(rule, type) else type(rule).__name__,
        fix="Chain it by torchopt.chain, which takes both kinds.",
    )


def as_one(rule: GradientTransformation) -> GradientTransformation:
    """Return an `OptimiserChain` for a torchopt chain that means the same, and any other rule as it is.

    It does where all rules before the last only change gradients. After one that descends, a rule of a torchopt
    chain sees what is to be added to the parameters, and not a gradient.

    Raises:
        InputError: If a torchopt chain has a rule that it cannot serve.
    """
    if not isinstance(rule, ChainedGradientTransformation):
        return rule
    parts = rule.transformations
    descending = [part for part in parts if isinstance(part, ListRule) and part.descends]
    if all(isinstance(part, ListRule) for part in parts) and descending in ([], [parts[-1]]):
        return OptimiserChain(*parts)
    for i, part in enumerate(parts):
        if isinstance(part, AccumGrad):
            problem = "AccumGrad cannot hold back the other rules of a torchopt chain."
        elif isinstance(part, (SignDecay, WeightDecay)) and any(known in parts[:i] for known in descending):
            problem = (
                f"In a torchopt chain, {type(part).__name__} would have the wrong sign after a rule that descends."
            )
        else:
            continue
        raise InputError(problem, fix="Use rules of luxtorch.optim in an OptimiserChain.")
    return rule
