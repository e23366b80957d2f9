"""The adapter for torchopt: any of its optimizers, transformations and chains, as a rule of this package."""

from __future__ import annotations

from typing import Any

from torchopt.base import ChainedGradientTransformation

from ._leaves import Leaves, pair
from ._rule import ChangeState, GradientTransformation, ListRule, Rule, Updates


class TorchOpt(ListRule):
    """A gradient transformation of torchopt, or one that has `init` and `update` alone.

    It gets parameters and gradients as a dict by dotted names, and never works in place. In a torchopt chain each part
    sees what the one before has made, gradients or updates, and what the last one makes is added to the parameters;
    rules of this package in it are adjusted, described and stepped as anywhere.

    Args:
        given: The transformation.
    """

    given: GradientTransformation

    needs_params = True

    @property
    def parts(self) -> tuple[GradientTransformation, ...]:
        """The transformations that the chain is made of."""
        return transformations(self.given)

    def bare(self) -> TorchOpt:
        return TorchOpt(_joined(self.given, [p.bare() if isinstance(p, Rule) else p for p in self.parts]))

    def splits_vectors(self) -> bool:
        return any(part.splits_vectors() for part in self.parts if isinstance(part, ListRule))

    def takes_complex(self) -> bool:
        return True

    def check(self, leaves: Leaves) -> None:
        super().check(leaves)
        for part in self.parts:
            if isinstance(part, ListRule):
                part.check(leaves)

    def map_states(self, change: ChangeState, state: Any) -> Any:
        pairs = zip(self.parts, self._split(state), strict=True)
        return self._joined([p.map_states(change, s) if isinstance(p, ListRule) else s for p, s in pairs])

    def in_force(self, state: Any) -> GradientTransformation:
        pairs = zip(self.parts, self._split(state), strict=True)
        return _joined(self.given, [p.in_force(s) if isinstance(p, ListRule) else p for p, s in pairs])

    def own_numbers(self, state: Any, dtype: Any) -> list[Any]:
        pairs = zip(self.parts, self._split(state), strict=True)
        return [number for p, s in pairs if isinstance(p, ListRule) for number in p.own_numbers(s, dtype)]

    def describe(self, state: Any) -> str:
        texts = [
            part.describe(own) if isinstance(part, ListRule) else repr(part) if isinstance(part, Rule) else ""
            for part, own in zip(self.parts, self._split(state), strict=True)
        ]
        shown = ", ".join(text or "torchopt optimizer" for text in texts)
        return f"chain({shown})" if isinstance(self.given, ChainedGradientTransformation) else shown

    def eval_parameters(self, leaves: Leaves, state: Any) -> list[Any]:
        last = self.parts[-1] if self.parts else None
        return last.eval_parameters(leaves, self._split(state)[-1]) if isinstance(last, ListRule) else leaves.params

    def init(self, params: Any) -> Any:
        leaves = self.leaves_of(params)
        named = dict(zip(leaves.names, leaves.params, strict=True))
        return self._joined([part.init(named) for part in self.parts])

    def updates(self, leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        states = list(self._split(state))
        for i, part in enumerate(self.parts):
            leaves, states[i] = _through(part, leaves, states[i])
        return leaves.grads, self._joined(states)

    def step(self, leaves: Leaves, state: Any) -> tuple[Any, Any]:
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, ListRule) or not last.descends:
            return super().step(leaves, state)
        states = list(self._split(state))
        for i, part in enumerate(self.parts[:-1]):
            leaves, states[i] = _through(part, leaves, states[i])
        params, states[-1] = last.step(leaves, states[-1])  # by its kernel
        return params, self._joined(states)

    def _split(self, state: Any) -> tuple[Any, ...]:
        return state if isinstance(self.given, ChainedGradientTransformation) else (state,)

    def _joined(self, states: list[Any]) -> Any:
        return tuple(states) if isinstance(self.given, ChainedGradientTransformation) else states[0]


def transformations(rule: GradientTransformation) -> tuple[GradientTransformation, ...]:
    """Return what a torchopt chain is made of; any other transformation is one of one."""
    return tuple(rule.transformations) if isinstance(rule, ChainedGradientTransformation) else (rule,)


def _joined(given: GradientTransformation, parts: list[GradientTransformation]) -> GradientTransformation:
    """Return a transformation like the given one, of other parts."""
    if tuple(parts) == transformations(given):
        return given
    return ChainedGradientTransformation(*parts) if isinstance(given, ChainedGradientTransformation) else parts[0]


def _through(part: GradientTransformation, leaves: Leaves, state: Any) -> tuple[Leaves, Any]:
    """Return the leaves with what a transformation makes of their gradients, and its new state."""
    if isinstance(part, ListRule):
        grads, state = part.updates(leaves, state)
        return leaves._replace(grads=grads), state
    params = dict(zip(leaves.names, leaves.params, strict=True))
    named = dict(zip(leaves.names, leaves.grads, strict=True))
    extra = leaves.extra if isinstance(part, Rule) and part.takes_extra else {}
    updates, state = part.update(named, state, params=params, inplace=False, **extra)
    return leaves._replace(grads=pair(params, updates).grads), state
