"""Chains of rules, and gradient accumulation, which holds back the rules after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError, described, out_of_range, tree_map

from .._kernels import unobserved
from .._leaves import Leaves, to_components
from .._rule import ChangeState, GradientTransformation, ListRule, Updates, negative
from .._rule_state import RuleState, Slots, check_names
from .._torchopt import TorchOpt, transformations


class OptimiserChain(ListRule):
    """Hand the gradients from one rule to the next.

    What the last one makes of them is subtracted from the parameters; alone, a rule that only changes gradients
    is gradient descent with learning rate 1, and so is an empty chain. The last rule steps as if it were alone: by
    its fused kernel where it has one.

    Args:
        rules: The rules. Chains among them are spliced.

    Raises:
        DTypeError: If one is not a gradient transformation.
        InputError: If a rule that keeps copies of the parameters, or one of torchopt, is not the last: `torchopt.chain`
            takes both kinds, in any order.

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
            for rule in map(as_rule, rules)
            for part in (rule.rules if isinstance(rule, OptimiserChain) else [rule])
        )
        for part in parts[:-1]:
            if isinstance(part, TorchOpt):
                raise InputError(
                    "A torchopt transformation is not the last rule of the chain.",
                    fix="Chain it by torchopt.chain, which takes both kinds.",
                )
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

    def eval_parameters(self, leaves: Leaves, state: Any) -> list[Tensor]:
        return self.rules[-1].eval_parameters(leaves, state[-1]) if self.rules else leaves.params

    def init(self, params: Any) -> Any:
        params = to_components(params) if self.splits_vectors() else params
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
            raise out_of_range("n", self.n, "a positive integer")

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
        if unobserved() and type(calls) is Tensor and calls.is_cpu and calls.ndim == 0:
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


def as_rule(rule: GradientTransformation) -> ListRule:
    """Return a rule of this package for any gradient transformation: itself, an `OptimiserChain`, or an adapter.

    A torchopt chain of rules of this package is an `OptimiserChain` where all before the last only change gradients.
    After one that descends, a rule of a torchopt chain sees what is to be added to the parameters, and not a gradient.

    Raises:
        DTypeError: If it is something else.
        InputError: If a torchopt chain has a rule that it cannot serve.
    """
    if isinstance(rule, ListRule):
        return rule
    if not isinstance(rule, GradientTransformation):
        raise DTypeError(
            "The rule is not a gradient transformation.",
            expected="a rule such as optim.Adam(1e-3), or a torchopt optimizer",
            got=described(rule),
            fix="torch.optim optimizers change parameters in place; use the rule of the same name here.",
        )
    parts = transformations(rule)
    descending = [part for part in parts if isinstance(part, ListRule) and part.descends]
    if all(isinstance(part, ListRule) for part in parts) and descending in ([], [parts[-1]]):
        return OptimiserChain(*parts)
    for i, part in enumerate(parts):
        if isinstance(part, AccumGrad):
            problem = "AccumGrad cannot hold back the other rules of a torchopt chain."
        elif _decays(part) and any(known in parts[:i] for known in descending):
            problem = (
                f"In a torchopt chain, {type(part).__name__} would have the wrong sign after a rule that descends."
            )
        else:
            continue
        raise InputError(problem, fix="Use rules of luxtorch.optim in an OptimiserChain.")
    return TorchOpt(rule)


def _decays(part: GradientTransformation) -> bool:
    """Say whether a rule adds something of the parameters to the gradients."""
    return isinstance(part, ListRule) and part.needs_params and not part.descends
