"""The state of an optimizer: a rule, and what it remembers of the parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import ChainedGradientTransformation, GradientTransformation

from luxtorch.components import Axes
from luxtorch.core import register_node

from ._list_rule import ChangeState, ListRule
from ._rule import Rule


class Layout(NamedTuple):
    """Hold what is static in a state.

    Attributes:
        rule: The rule, without the values of its hyperparameters.
        names: The dotted names of all parameters, those inside ComponentVectors too.
        frozen: Those of them that are frozen.
        vectors: The names of the leaves that are flat vectors, with their axes.
        by_component: Whether the components of ComponentVectors are leaves of their own: they are from the
            moment when some of them are treated differently from others.
        in_parts: The names of the flat vectors that are complex.
    """

    rule: GradientTransformation
    names: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    vectors: tuple[tuple[str, Axes], ...] = ()
    by_component: bool = False
    in_parts: tuple[str, ...] = ()


class OptState:
    """Hold an optimizer's state: a pytree whose leaves are all tensors.

    Made by `setup`, carried on by `update`, changed by `adjust`, `freeze` and `thaw`; never changed in place.

    Args:
        layout: What is static: the rule, the names, what is frozen. Part of the tree's structure.
        state: What the rule's `init` and `update` return.
    """

    __slots__ = ("layout", "state")

    def __init__(self, layout: Layout, state: Any) -> None:
        self.layout = layout
        self.state = state

    @property
    def rule(self) -> GradientTransformation:
        """The rule, with the hyperparameters that are in force; None for one that parameters have different values of.

        Of a torchopt optimizer, the rule as it was given: its hyperparameters cannot be read.
        """
        return in_force(self.layout.rule, self.state)

    def own_numbers(self, dtype: torch.dtype) -> list[Tensor]:
        """Return what stays as it is where a tree is cast to a dtype: see `RuleState.own_numbers`."""
        return _own_numbers(self.layout.rule, self.state, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return OptState, (self.layout, self.state)

    def __repr__(self) -> str:
        layout = self.layout
        frozen = f", frozen: {', '.join(layout.frozen)}" if layout.frozen else ""
        noun = "parameter" if len(layout.names) == 1 else "parameters"
        return f"OptState({_describe(layout.rule, self.state)}, {len(layout.names)} {noun}{frozen})"


def map_rules(change: ChangeState, rule: GradientTransformation, state: Any) -> Any:
    """Return a state with that of each rule of this package in it changed."""
    if isinstance(rule, ChainedGradientTransformation):
        return tuple(map_rules(change, *part) for part in zip(rule.transformations, state, strict=True))
    return rule.map_states(change, state) if isinstance(rule, ListRule) else state


def in_force(rule: GradientTransformation, state: Any) -> GradientTransformation:
    """Return a rule with the hyperparameters that its state holds."""
    if isinstance(rule, ChainedGradientTransformation):
        parts = tuple(map(in_force, rule.transformations, state))
        return rule if parts == tuple(rule.transformations) else ChainedGradientTransformation(*parts)
    return rule.in_force(state) if isinstance(rule, ListRule) else rule


def _own_numbers(rule: GradientTransformation, state: Any, dtype: torch.dtype) -> list[Tensor]:
    if isinstance(rule, ChainedGradientTransformation):
        parts = zip(rule.transformations, state, strict=True)
        return [number for part in parts for number in _own_numbers(*part, dtype)]
    return rule.own_numbers(state, dtype) if isinstance(rule, ListRule) else []


def splits_vectors(rule: GradientTransformation) -> bool:
    """Say whether a rule, alone or in a chain, has to see the components of flat vectors in their shapes."""
    if isinstance(rule, ChainedGradientTransformation):
        return any(map(splits_vectors, rule.transformations))
    return isinstance(rule, ListRule) and rule.splits_vectors()


def _describe(rule: GradientTransformation, state: Any) -> str:
    """Return a rule as it was written, with the hyperparameters that the state holds by now."""
    if isinstance(rule, ChainedGradientTransformation):
        parts = zip(rule.transformations, state, strict=True)
        return f"chain({', '.join(_describe(*part) for part in parts)})"
    if isinstance(rule, ListRule):
        return rule.describe(state)
    return repr(rule) if isinstance(rule, Rule) else "torchopt optimizer"


register_node(
    OptState, lambda opt_state: ([opt_state.state], opt_state.layout), lambda state, layout: OptState(layout, *state)
)
torch.serialization.add_safe_globals([OptState, Layout])
