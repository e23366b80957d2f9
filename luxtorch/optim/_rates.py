"""Reading hyperparameters that are in force, such as the learning rate of the next step: `rate`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, tree_map, unflatten_names, unknown_name

from ._hyperparameters import unpack
from ._opt_state import OptState
from ._rule import GradientTransformation, ListRule
from ._rule_state import ALL, Hyper, RuleState
from ._torchopt import TorchOpt
from .modifiers import Groups, MixedPrecision, OptimiserChain, ReduceLROnPlateau
from .modifiers._wrappers import PerMember


def rate(opt_state: OptState, name: str = "lr") -> Any:
    """Return the learning rate of the next step, or another hyperparameter: with its schedule at the steps taken.

    It is what the rule's formula computes with; what a rule makes of it itself, as by a warm-up inside of it or by
    averages of gradients, is not in it. `ReduceLROnPlateau` counts, where it stands after the rule. `AccumGrad` does
    not: it is the rate of the next step that is taken. Under `jit` and other transforms it is computed as any tensor.

    Args:
        opt_state: The state.
        name: The hyperparameter, such as "betas".

    Returns:
        A float64 tensor, without dimensions for one number; of many models, as from `torch.vmap` and
        `optim.per_member`, with a first dimension for these. Under `optim.Groups` a dict with that of each group, by
        its path, and "rest"; where `optim.adjust` has given parameters their own, nested dicts by parameter.

    Raises:
        KeyNameError: If the rule has no such hyperparameter.
        InputError: If two rules of a chain have one, or if the optimizer is torchopt's: its numbers cannot be reached.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(1)
        >>> opt_state = optim.setup(optim.Adam(optim.linear(0.1, 0.0, 4)), p)
        >>> for _ in range(3):
        ...     print(round(optim.rate(opt_state).item(), 3))
        ...     opt_state, p = optim.update(opt_state, p, torch.ones(1))
        0.1
        0.075
        0.05
        >>> optim.rate(opt_state, "betas")
        tensor([0.9000, 0.9990], dtype=torch.float64)

    Source: `get_last_lr` of torch.optim's schedulers; here nothing has to be kept beside the state.
    """
    found = _rate(opt_state.layout.rule, opt_state.state, name)
    if found is None:
        raise _unknown(opt_state, name)
    return found


def changing_rate(opt_state: OptState) -> Any:
    """Return the learning rate of the next step if it changes by itself, else None."""
    changing: list[ListRule] = []

    def look(rule: ListRule, state: RuleState) -> RuleState:
        if isinstance(rule, ReduceLROnPlateau) or "lr" in rule.scheduled():
            changing.append(rule)
        return state

    rule, state = opt_state.layout.rule, opt_state.state
    rule.map_states(look, state)
    try:
        return _rate(rule, state, "lr") if changing else None
    except InputError:  # there are two
        return None


def _rate(rule: GradientTransformation, state: Any, name: str) -> Any:
    if isinstance(rule, Groups):
        parts = zip(rule.paths, rule.rules, state.states, strict=True)
        found = {_label(path): _rate(inner, own, name) for path, inner, own in parts}
        return {label: value for label, value in found.items() if value is not None} or None
    if isinstance(rule, OptimiserChain):
        return _of_chain(zip(rule.rules, state, strict=True), name)
    if isinstance(rule, TorchOpt):
        return _of_chain(zip(rule.parts, rule._split(state), strict=True), name)
    if isinstance(rule, MixedPrecision):
        return _rate(rule.rule, state[1], name)
    if isinstance(rule, PerMember):
        return _rate(rule.rule, state, name)
    if not (isinstance(rule, ListRule) and isinstance(state, RuleState) and name in rule.hyperparameters):
        return None
    hyper = _now(rule, state)
    if isinstance(hyper, Tensor):
        return unpack(hyper, rule.hyperparameters)[name]
    rates = {leaf: unpack(vector, rule.hyperparameters)[name] for leaf, vector in hyper.items()}
    return rates[""] if rates.keys() == {""} else unflatten_names(rates)


def _of_chain(parts: Iterable[tuple[GradientTransformation, Any]], name: str) -> Any:
    found = None
    for rule, state in parts:
        if isinstance(rule, ReduceLROnPlateau) and name == "lr" and found is not None:
            scale = state.leaves[ALL]["scale"].squeeze(-1)
            found = tree_map(partial(_times, scale), found)
        value = _rate(rule, state, name)
        if value is None:
            continue
        if found is not None:
            raise InputError(
                f"Two rules of the chain have a hyperparameter '{name}'.",
                fix="Read it of the rule itself: opt_state.rule.",
            )
        found = value
    return found


def _times(scale: Tensor, value: Tensor) -> Tensor:
    return value * scale.to(value)


def _now(rule: ListRule, state: RuleState) -> Hyper:
    """Return the hyperparameters of the next step, also of many models."""
    if not isinstance(state.steps, Tensor) or state.steps.ndim == 0:
        return rule.hyper_now(state)

    def one(hyper: Hyper, steps: Tensor) -> Any:
        return _now(rule, RuleState(hyper, {}, steps))

    return torch.vmap(one)(state.hyper, state.steps)  # type: ignore[no-any-return]


def _label(path: Any) -> str:
    if path is None:
        return "rest"
    return path if isinstance(path, str) else ", ".join(map(str, path))


def _unknown(opt_state: OptState, name: str) -> Exception:
    known: dict[str, None] = {}

    def look(rule: ListRule, state: RuleState) -> RuleState:
        known.update(dict.fromkeys(rule.hyperparameters))
        return state

    opt_state.layout.rule.map_states(look, opt_state.state)
    if known:
        return unknown_name(name, known, "hyperparameter")
    return InputError(
        "The optimizer has no hyperparameters that could be read; torchopt hides its own in functions.",
        fix="Use the rule of the same name in luxtorch.optim.",
    )
