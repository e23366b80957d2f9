"""`setup`, `update`, and hyperparameters in the middle of training: read them, change them, or take another rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, KeyNameError, tree_map, unflatten_names, unknown_name
from luxtorch.core._paths import Path, select

from ._hyperparameters import Number, Numbers, replace, unpack
from ._leaves import components, from_components, pair, rebuild, to_components, vectors, with_extra
from ._opt_state import Layout, OptState, by_component
from ._rule import GradientTransformation, ListRule
from ._rule_state import ALL, Hyper, RuleState, Slots, map_hyper
from ._torchopt import TorchOpt
from .modifiers import Groups, MixedPrecision, OptimiserChain, ReduceLROnPlateau
from .modifiers._chain import AccumGrad, as_rule
from .modifiers._wrappers import PerMember


def setup(rule: GradientTransformation, ps: Any) -> OptState:
    """Return the state of an optimizer before the first step.

    Args:
        rule: A rule of this package, or any torchopt optimizer or chain. torchopt's are used as they are, but
            never in place; a torchopt chain of rules of this package becomes an `OptimiserChain`.
        ps: The parameters: nested dicts of tensors, a ComponentVector, a tensor, or any pytree of these; on the
            device where they will be trained. The hyperparameters stay on the CPU: there the kernels read them.

    A complex parameter steps as torch.optim has it: a rule, and its state, has real and imaginary parts as numbers of
    their own, in a last dimension of two.

    Returns:
        The state: a pytree of tensors, for `update`.

    Raises:
        InputError: If a torchopt chain has a rule that works in an `OptimiserChain` only.
        DTypeError: If the rule is not a gradient transformation, if a parameter is not a tensor, or if it is complex
            and the rule is one for matrices, such as `Muon`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> optim.setup(optim.Descent(0.01), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        OptState(Descent(lr=0.01), 2 parameters)

    The name is that of Optimisers.jl.
    """
    own = as_rule(rule)
    axes, leaves = vectors(ps), pair(ps, None)
    names = [part for name in leaves.names for part in (components(name, axes[name]) if name in axes else [name])]
    apart = bool(axes) and own.splits_vectors()
    layout = Layout(
        own.bare(),
        tuple(names),
        vectors=tuple(axes.items()),
        by_component=apart,
        in_parts=tuple(name for name in axes if name in leaves.in_parts),
    )
    return OptState(layout, own.init(to_components(ps) if apart else ps))


def update(opt_state: OptState, ps: Any, grads: Any, **extra: Any) -> tuple[OptState, Any]:
    """Take one step, out of place.

    Args:
        opt_state: The state, from `setup` or from the step before.
        ps: The parameters.
        grads: The gradients, a tree like `ps`. Where a leaf or a whole subtree is None or not there, the
            parameters and what the optimizer remembers of them are left alone: no decay, no step counted.
            NaN in a gradient goes through to its parameter.
        **extra: What some rules ask for besides: `value`, the loss; `value_fn`, a function of the parameters that
            returns it; `hessian`, the diagonal of its Hessian, a tree like `ps`. Other rules ignore them.

    Returns:
        The new state and the new parameters. Nothing that was passed is changed; what is left alone is shared.

    Raises:
        KeyNameError: If the gradients have a name that the parameters lack, or the state is that of other
            parameters.
        InputError: If the structure or a shape differs.
        DTypeError: If a dtype differs.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.ones(2), "bias": torch.ones(1)}
        >>> opt_state = optim.setup(optim.Descent(0.5), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2), "bias": None})
        >>> ps
        {'weight': tensor([0.5000, 0.5000]), 'bias': tensor([1.])}

    The name is that of Optimisers.jl.
    """
    layout = opt_state.layout
    tree = ps
    if layout.by_component:
        tree, grads = to_components(ps), to_components(grads)
    leaves = pair(tree, grads)
    if extra:
        whole = (lambda new: from_components(ps, new)) if layout.by_component else None
        leaves = with_extra(leaves, tree, extra, whole)
    if layout.frozen:
        frozen = set(layout.frozen)
        grads = [None if name in frozen else g for name, g in zip(leaves.names, leaves.grads, strict=True)]
        leaves = leaves._replace(grads=grads)
    if all(g is None for g in leaves.grads):
        return opt_state, ps
    params, state = layout.rule.step(leaves, opt_state.state)
    new = rebuild(tree, iter(params))
    return OptState(layout, state), from_components(ps, new) if layout.by_component else new


def eval_parameters(opt_state: OptState, ps: Any) -> Any:
    """Return the parameters to evaluate a model with.

    For most rules these are `ps` itself; for those that average, such as `ScheduleFreeAdamW` and `ASGD`, the average.

    Args:
        opt_state: The state.
        ps: The parameters that are trained.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2)}
        >>> opt_state = optim.setup(optim.ASGD(0.5, t0=0.0), ps)
        >>> for _ in range(3):
        ...     opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2)})
        >>> optim.eval_parameters(opt_state, ps)
        {'weight': tensor([-1.2499, -1.2499])}

    `schedule_free_eval_params` of optax.
    """
    layout = opt_state.layout
    tree = to_components(ps) if layout.by_component else ps
    leaves = pair(tree, None)
    params = layout.rule.eval_parameters(leaves, opt_state.state)
    if params is leaves.params:
        return ps
    new = rebuild(tree, iter(params))
    return from_components(ps, new) if layout.by_component else new


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
        "The optimizer has no hyperparameters that can be reached; torchopt hides its own in functions.",
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
        raise _unknown(name, _names(opt_state))
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


def _names(opt_state: OptState) -> set[str]:
    """Return the names of all hyperparameters."""
    found: set[str] = set()

    def look(rule: ListRule, state: RuleState) -> RuleState:
        found.update(rule.hyperparameters)
        return state

    opt_state.layout.rule.map_states(look, opt_state.state)
    return found
