"""Changing hyperparameters in the middle of training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from luxtorch.core import InputError, KeyNameError, suggest
from luxtorch.core._paths import Path, select

from ._by_component import by_component
from ._hyperparameters import Number, Numbers, replace
from ._list_rule import ListRule
from ._opt_state import OptState, map_rules
from ._rule_state import RuleState, map_hyper


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

    state = map_rules(adjusted, opt_state.layout.rule, opt_state.state)
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
    return state._replace(hyper=map_hyper(lambda old: replace(old, rule.hyperparameters, values), hyper, chosen))


def _unknown(name: str, known: set[str]) -> InputError | KeyNameError:
    if known:
        return KeyNameError(
            f"The rule has no hyperparameter '{name}'.",
            expected=", ".join(sorted(known)),
            got=name,
            fix=suggest(name, known),
        )
    return InputError(
        "The optimizer has no hyperparameters that could be adjusted; torchopt hides its own in functions.",
        fix="Use the rule of the same name in luxtorch.optim, or set up a new optimizer.",
    )
