"""Another rule in the middle of a training, which goes on from what the old one remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from luxtorch.core import InputError

from ._accumgrad import AccumGrad
from ._by_component import by_component
from ._fused import Slots
from ._list_rule import ListRule
from ._opt_state import OptState, map_rules
from ._rule_state import RuleState
from ._setup import setup


def transfer(opt_state: OptState, rule: GradientTransformation, ps: Any, *, steps: int | None = None) -> OptState:
    """Return the state of another rule that goes on with the moments of this one.

    For a constant that becomes a schedule, a `ClipNorm` that is added or taken out, `AdamW` in the place of `Adam`, or
    parameters that are unfrozen. What was remembered of a parameter is kept where the new rule, or a part of it, is of
    the same kind, or remembers things of the same names; all else begins anew, as of parameters that are new or have
    another shape. Hyperparameters are those of the new rule; adjust them by path again. What is frozen stays so.

    Args:
        opt_state: The state of the old rule.
        rule: The new rule.
        ps: The parameters.
        steps: The step at which the schedules of the new rule begin. If None, they go on where those of the old rule
            are, and begin at 0 where it had none.

    Returns:
        The new state.

    Raises:
        InputError: If nothing that the old rule remembers is of use to the new one, or the state is that of many
            models and the new one is not.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.ones(2)}
        >>> opt_state, ps = optim.update(optim.setup(optim.Adam(0.1), ps), ps, {"weight": torch.ones(2)})
        >>> rule = optim.OptimiserChain(optim.ClipNorm(1.0), optim.Adam(optim.cosine(0.1, 0.0, 1000)))
        >>> opt_state = optim.transfer(opt_state, rule, ps)
        >>> opt_state.state[1].leaves["weight"]["exp_avg"]
        tensor([0.1000, 0.1000])
    """
    old, new = opt_state, setup(rule, ps)
    if (old.layout.vectors, old.layout.by_component) != (new.layout.vectors, new.layout.by_component):
        old, new = by_component(old), by_component(new)
    known: list[tuple[ListRule, RuleState]] = []

    def list_states(rule: ListRule, state: RuleState) -> RuleState:
        known.append((rule, state))
        return state

    map_rules(list_states, old.layout.rule, old.state)
    kept: set[tuple[int, str]] = set()
    wanted: list[str] = []

    def going_on(rule: ListRule, state: RuleState) -> RuleState:
        _require_as_many(state, known)
        leaves = {}
        for name, fresh in state.leaves.items():
            found = next((i for i in _candidates(rule, name, fresh, known) if (i, name) not in kept), None)
            leaves[name] = fresh if found is None else _onto(fresh, known[found][1].leaves[name])
            wanted.extend([name] if fresh else [])
            kept.update([] if found is None else [(found, name)])
        return state._replace(leaves=leaves, steps=_steps(rule, state, known, steps))

    state = map_rules(going_on, new.layout.rule, new.state)
    if wanted and not kept and old.layout.names:
        raise InputError(
            "Nothing that the old rule remembers is of use to the new one.",
            expected="rules of luxtorch.optim of the same kind, and parameters of the same names and shapes",
            got=f"{opt_state!r:.200}",
            fix="Begin anew: optim.setup(rule, ps).",
        )
    frozen = tuple(name for name in new.layout.names if name in old.layout.frozen)
    return OptState(new.layout._replace(frozen=frozen), state)


def _candidates(rule: ListRule, name: str, fresh: Slots, known: list[tuple[ListRule, RuleState]]) -> list[int]:
    """Return which of the old states have something of a parameter that a rule can go on with, the likeliest first."""
    fitting = [i for i, (_, state) in enumerate(known) if _fits(state.leaves.get(name, {}), fresh)]
    of_a_kind = [i for i in fitting if type(known[i][0]) is type(rule)]
    return of_a_kind + [i for i in fitting if i not in of_a_kind and known[i][1].leaves[name].keys() == fresh.keys()]


def _fits(slots: Slots, fresh: Slots) -> bool:
    shared = slots.keys() & fresh.keys()
    return bool(shared) and all(slots[name].shape == fresh[name].shape for name in shared)


def _onto(fresh: Slots, slots: Slots) -> Slots:
    """Return what is remembered, in the dtypes and with the names of what begins anew."""
    return {name: slots[name].to(value) if name in slots else value for name, value in fresh.items()}


def _steps(rule: ListRule, state: RuleState, known: list[tuple[ListRule, RuleState]], steps: int | None) -> Any:
    if not isinstance(state.steps, Tensor):
        return state.steps
    collects = isinstance(rule, AccumGrad)
    if steps is not None and not collects:
        return torch.full_like(state.steps, steps)
    counted = [(type(old) is type(rule), old, part.steps) for old, part in known if isinstance(part.steps, Tensor)]
    fitting = [(same, count) for same, old, count in counted if same or not (collects or isinstance(old, AccumGrad))]
    return max(fitting, key=lambda pair: pair[0])[1].to(state.steps) if fitting else state.steps


def _require_as_many(state: RuleState, known: list[tuple[ListRule, RuleState]]) -> None:
    """Raise if an old state is that of many models, and the new one is not."""
    for _, old in known:
        hypers = [next(iter(h.values())) if isinstance(h, dict) else h for h in (old.hyper, state.hyper) if len(h)]
        if len(hypers) == 2 and hypers[0].ndim != hypers[1].ndim:
            raise InputError(
                "The old state is that of many models, and the new one is not, or the other way round.",
                expected="states of as many models",
                got=f"hyperparameters of shape {tuple(hypers[0].shape)}",
                fix="torch.vmap(lambda opt_state, ps: optim.transfer(opt_state, rule, ps))(opt_state, ps)",
            )
