"""Changing an optimizer in the middle of training: other hyperparameters, or another rule with the same moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, KeyNameError, unknown_name
from luxtorch.core._paths import Path, select

from ._hyperparameters import Number, Numbers, replace
from ._opt_state import OptState, by_component
from ._rule import GradientTransformation, ListRule
from ._rule_state import RuleState, Slots, map_hyper
from ._update import setup
from .modifiers._chain import AccumGrad


def adjust(
    opt_state: OptState, lr: Number | None = None, *, path: Path = None, **hyperparameters: Number | Numbers
) -> OptState:
    """Return a state with other values of some hyperparameters.

    Args:
        opt_state: The state. In a chain, every rule that has the hyperparameter gets the value.
        lr: The learning rate.
        path: For which parameters: a dotted path such as `"layer_1"`, which stands for everything below it, a glob
            such as `"*.bias"`, a predicate on dotted names, a list of these, or None for all; see `luxtorch.freeze`.
            A compiled step stays as it is for None; the first use of a path changes the structure of the state, so
            that it is compiled once more.
        **hyperparameters: Others by their names, such as `betas`, `eps`, `weight_decay`, `momentum`.

    Returns:
        The new state. Tensors are taken as they are, so that derivatives flow into them.

    Raises:
        KeyNameError: If the rule has no such hyperparameter, or the path stands for no parameter.
        InputError: If a value is out of range or has the wrong shape, if there is none, if the hyperparameter
            follows a schedule, or if the optimizer is torchopt's: its hyperparameters cannot be reached.
        DTypeError: If a value is not a number or a floating point tensor.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> opt_state = optim.setup(optim.Adam(1e-3), torch.zeros(2))
        >>> optim.adjust(opt_state, 1e-4, betas=(0.8, 0.99))
        OptState(Adam(lr=0.0001, betas=(0.8, 0.99), eps=1e-08), 1 parameter)

    The name is that of Optimisers.jl.
    """
    values = hyperparameters if lr is None else {"lr": lr, **hyperparameters}
    if not values:
        raise InputError("There is nothing to adjust.", fix="Name a hyperparameter: adjust(opt_state, lr=1e-4).")
    chosen = None
    if path is not None:
        chosen = select(path, opt_state.layout.names)
        opt_state = by_component(opt_state)
    known: set[str] = set()

    def adjusted(rule: ListRule, state: RuleState) -> RuleState:
        if chosen is not None and chosen.isdisjoint(state.leaves):
            return state
        known.update(rule.hyperparameters)
        own = {name: value for name, value in values.items() if name in rule.hyperparameters}
        return _replace(rule, state, own, chosen) if own else state

    state = opt_state.layout.rule.map_states(adjusted, opt_state.state)
    for name in values:
        if name not in known:
            raise _unknown(name, known)
    return OptState(opt_state.layout, state)


def _replace(
    rule: ListRule, state: RuleState, values: Mapping[str, Number | Numbers], chosen: set[str] | None
) -> RuleState:
    """Return a state with new values for all parameters, or for the chosen ones."""
    for name in rule.scheduled():
        if name in values:
            raise InputError(
                f"The hyperparameter '{name}' follows a schedule and cannot be adjusted.",
                expected="a hyperparameter that is a number",
                got=f"{name}={getattr(rule, name)!r}",
                fix="Write the change into the schedule, with optim.join or optim.piecewise.",
            )
    hyper = state.hyper
    if chosen is not None:
        if not rule.by_parameter():
            raise InputError(
                f"{type(rule).__name__} treats all parameters together: its hyperparameters have no path.",
                got=", ".join(values),
                fix="Leave the path out.",
            )
        if isinstance(hyper, Tensor):
            hyper = dict.fromkeys(state.leaves, hyper)
    new = map_hyper(lambda old: replace(old, rule.hyperparameters, rule.ranges, values), hyper, chosen)
    rule.check_adjusted(values, state)
    return state._replace(hyper=new)


def _unknown(name: str, known: set[str]) -> InputError | KeyNameError:
    if known:
        return unknown_name(name, sorted(known), "hyperparameter")
    return InputError(
        "The optimizer has no hyperparameters that could be adjusted; torchopt hides its own in functions.",
        fix="Use the rule of the same name in luxtorch.optim, or set up a new optimizer.",
    )


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

    old.layout.rule.map_states(list_states, old.state)
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

    state = new.layout.rule.map_states(going_on, new.state)
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
