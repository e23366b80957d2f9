"""Parameter groups: other rules for other parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from luxtorch.core import InputError, Static
from luxtorch.core._paths import Name, Path, select
from luxtorch.core._tree import register_names

from .._leaves import Leaves
from .._rule import ChangeState, GradientTransformation, ListRule, Updates, negative
from .._rule_state import check_names
from ._chain import as_rule


class GroupsState(NamedTuple):
    """Hold the state of `Groups`.

    Attributes:
        members: The names of the parameters of each group.
        states: The state of each group's rule.
    """

    members: Static[tuple[tuple[str, ...], ...]]
    states: tuple[Any, ...]


register_names(GroupsState)
torch.serialization.add_safe_globals([GroupsState])


class Groups(ListRule):
    """Give each group of parameters a rule of its own.

    Every parameter belongs to exactly one group. The components of a ComponentVector are parameters of their own.

    Args:
        groups: The rules by path: a dotted path such as `"layer_1"`, which stands for everything below it, a glob
            such as `"*.bias"`, a predicate on dotted names, or a tuple of these; see `luxtorch.freeze`.
        rest: The rule for all other parameters. Without it there may be none.

    Raises:
        KeyNameError: When a state is set up: if a path stands for no parameter.
        InputError: When a state is set up: if a parameter is in two groups or in none.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"layer_1": {"weight": torch.ones(1)}, "layer_2": {"weight": torch.ones(1), "bias": torch.ones(1)}}
        >>> opt_state = optim.setup(optim.Groups({"layer_2.bias": optim.Descent(1.0)}, rest=optim.Descent(0.5)), ps)
        >>> optim.update(opt_state, ps, ps)[1]
        {'layer_1': {'weight': tensor([0.5000])}, 'layer_2': {'weight': tensor([0.5000]), 'bias': tensor([0.])}}

    The parameter groups of torch.optim.
    """

    paths: tuple[Path, ...]
    rules: tuple[ListRule, ...]

    needs_params = True

    def __init__(
        self,
        groups: Mapping[Name | tuple[Name, ...] | frozenset[Name], GradientTransformation],
        rest: GradientTransformation | None = None,
    ) -> None:
        pairs: dict[Any, GradientTransformation] = {**groups} if rest is None else {**groups, None: rest}
        object.__setattr__(self, "paths", tuple(pairs))
        object.__setattr__(self, "rules", tuple(map(as_rule, pairs.values())))

    def __reduce__(self) -> tuple[Any, ...]:
        pairs = dict(zip(self.paths, self.rules, strict=True))
        rest = pairs.pop(None, None)
        return Groups, (pairs, rest)

    def bare(self) -> Self:
        """Return the rule without what its state holds: also without predicates, whose members the state knows."""
        bare = super().bare()
        numbered = (f"<predicate {i}>" if _asks(path) else path for i, path in enumerate(self.paths))
        object.__setattr__(bare, "paths", tuple(numbered))
        return bare

    def splits_vectors(self) -> bool:
        return True

    def check(self, leaves: Leaves) -> None:
        for rule, names in zip(self.rules, self._members(leaves.names), strict=True):
            rule.check(leaves.only(names))

    def keeps_copies(self) -> bool:
        return any(rule.keeps_copies() for rule in self.rules)

    def map_states(self, change: ChangeState, state: GroupsState) -> GroupsState:
        parts = zip(self.rules, state.states, strict=True)
        return state._replace(states=tuple(rule.map_states(change, part) for rule, part in parts))

    def in_force(self, state: GroupsState) -> Groups:
        rule = copy.copy(self)
        parts = zip(self.rules, state.states, strict=True)
        object.__setattr__(rule, "rules", tuple(inner.in_force(part) for inner, part in parts))
        return rule

    def own_numbers(self, state: GroupsState, dtype: torch.dtype) -> list[Tensor]:
        parts = zip(self.rules, state.states, strict=True)
        return [number for rule, part in parts for number in rule.own_numbers(part, dtype)]

    def describe(self, state: GroupsState) -> str:
        parts = zip(self.paths, self.rules, state.states, strict=True)
        texts = (f"{'rest' if path is None else path}: {rule.describe(part)}" for path, rule, part in parts)
        return f"Groups({', '.join(texts)})"

    def eval_parameters(self, leaves: Leaves, state: GroupsState) -> list[Tensor]:
        params: dict[str, Tensor] = {}
        for rule, group, own in self._parts(leaves, state):
            params.update(zip(group.names, rule.eval_parameters(group, own), strict=True))
        return [params[name] for name in leaves.names]

    def init(self, params: Any) -> GroupsState:
        leaves = self.leaves_of(params)
        members = self._members(leaves.names)
        tensors = dict(zip(leaves.names, leaves.params, strict=True))
        states = (
            rule.init({name: tensors[name] for name in group}) for rule, group in zip(self.rules, members, strict=True)
        )
        return GroupsState(Static(members), tuple(states))

    def updates(self, leaves: Leaves, state: GroupsState) -> tuple[Updates, GroupsState]:
        updates: dict[str, Any] = {}
        states = []
        for rule, group, old in self._parts(leaves, state):
            new, old = rule.updates(group, old) if _given(group) else (group.grads, old)
            updates.update(zip(group.names, new if rule.descends else negative(new), strict=True))
            states.append(old)
        return [updates[name] for name in leaves.names], state._replace(states=tuple(states))

    def step(self, leaves: Leaves, state: GroupsState) -> tuple[Any, GroupsState]:
        params: dict[str, Any] = {}
        states = []
        for rule, group, old in self._parts(leaves, state):
            new, old = rule.step(group, old) if _given(group) else (group.params, old)
            params.update(zip(group.names, new, strict=True))
            states.append(old)
        return [params[name] for name in leaves.names], state._replace(states=tuple(states))

    def _parts(self, leaves: Leaves, state: GroupsState) -> list[tuple[ListRule, Leaves, Any]]:
        """Return the rules with their leaves and states."""
        members = state.members.value
        check_names(leaves.names, [name for group in members for name in group])
        return list(zip(self.rules, map(leaves.only, members), state.states, strict=True))

    def _members(self, names: list[str]) -> tuple[tuple[str, ...], ...]:
        owner: dict[str, Any] = {}
        for path in self.paths:
            if path is None:
                continue
            for name in select(path, names):
                if name in owner:
                    raise InputError(
                        "A parameter belongs to two groups.",
                        expected="one group for each parameter",
                        got=f"'{owner[name]}' and '{path}'",
                        where=name,
                    )
                owner[name] = path
        missing = [name for name in names if name not in owner]
        if missing and None not in self.paths:
            raise InputError(
                "Some parameters belong to no group.",
                expected="one group for each parameter",
                got=", ".join(missing),
                fix="Add a group, or rest= with a rule for all others.",
            )
        return tuple(tuple(name for name in names if owner.get(name) == path) for path in self.paths)


def _asks(path: Path) -> bool:
    """Tell whether a path is a predicate, or has one among several."""
    return callable(path) or (isinstance(path, tuple | frozenset) and any(map(callable, path)))


def _given(leaves: Leaves) -> bool:
    return any(g is not None for g in leaves.grads)
