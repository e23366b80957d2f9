"""Changing hyperparameters in the middle of training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from luxtorch.core import InputError, KeyNameError, suggest

from ._by_component import by_component
from ._hyperparameters import Number, Numbers, Shapes, replace
from ._leafwise import LeafwiseRule, RuleState
from ._opt_state import OptState, map_rules
from ._paths import Path, select


def adjust(
    opt_state: OptState, lr: Number | None = None, *, path: Path = None, **hyperparameters: Number | Numbers
) -> OptState:
    """Return a state with other values of some hyperparameters.

    Args:
        opt_state: The state. In a chain, every rule that has the hyperparameter gets the value.
        lr: The learning rate.
        path: For which parameters: a dotted path such as `"layer_1"`, which stands for everything below it, a
            predicate on dotted names, or None for all. A compiled step stays as it is for None; the first use of
            a path changes the structure of the state, so that it is compiled once more.
        **hyperparameters: Others by their names, such as `betas`, `eps`, `weight_decay`, `momentum`.

    Returns:
        The new state. Tensors are taken as they are, so that derivatives flow into them.

    Raises:
        KeyNameError: If the rule has no such hyperparameter, or the path stands for no parameter.
        InputError: If a value is out of range or has the wrong shape, if there is none, or if the optimizer is
            torchopt's: its hyperparameters cannot be reached.
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

    def adjusted(rule: LeafwiseRule, state: RuleState) -> RuleState:
        known.update(rule.hyperparameters)
        own = {name: value for name, value in values.items() if name in rule.hyperparameters}
        return _replace(state, rule.hyperparameters, own, chosen)

    state = map_rules(adjusted, opt_state.layout.rule, opt_state.state)
    for name in values:
        if name not in known:
            raise _unknown(name, known)
    return OptState(opt_state.layout, state)


def _replace(
    state: RuleState, shapes: Shapes, values: Mapping[str, Number | Numbers], chosen: set[str] | None
) -> RuleState:
    """Return a state with new values for all parameters, or for the chosen ones."""
    hyper = state.hyper
    if not values:
        return state
    if not isinstance(hyper, dict):
        if chosen is None:
            return state._replace(hyper=replace(hyper, shapes, values))
        hyper = dict.fromkeys(state.leaves, hyper)
    # One new vector for each old one: parameters that share one, and so a call of the fused kernel, still do.
    # (No table by `id`: torch.compile would take the tensors' addresses for constants.)
    pairs: list[tuple[Tensor, Tensor]] = []
    changed = dict(hyper)
    for leaf, old in hyper.items():
        if chosen is None or leaf in chosen:
            new = next((new for known, new in pairs if known is old), None)
            if new is None:
                new = replace(old, shapes, values)
                pairs.append((old, new))
            changed[leaf] = new
    return state._replace(hyper=changed)


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
