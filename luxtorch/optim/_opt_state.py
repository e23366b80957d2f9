"""The state of an optimizer; freezing parameters, and treating the components of a flat vector one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luxtorch.components import Axes, ComponentVector
from luxtorch.core import register_node, tree_map, unknown_name
from luxtorch.core._paths import Path, select

from ._leaves import components
from ._rule import GradientTransformation, ListRule
from ._rule_state import COUNTS, RuleState, Slots


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

    rule: ListRule
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
        return self.layout.rule.in_force(self.state)

    def own_numbers(self, dtype: torch.dtype) -> list[Tensor]:
        """Return what stays as it is where a tree is cast to a dtype: see `RuleState.own_numbers`."""
        return self.layout.rule.own_numbers(self.state, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return OptState, (self.layout, self.state)

    def __repr__(self) -> str:
        layout = self.layout
        frozen = f", frozen: {', '.join(layout.frozen)}" if layout.frozen else ""
        noun = "parameter" if len(layout.names) == 1 else "parameters"
        return f"OptState({layout.rule.describe(self.state)}, {len(layout.names)} {noun}{frozen})"


register_node(
    OptState, lambda opt_state: ([opt_state.state], opt_state.layout), lambda state, layout: OptState(layout, *state)
)


torch.serialization.add_safe_globals([OptState, Layout])


def freeze(opt_state: OptState, path: Path = None) -> OptState:
    """Return a state whose steps leave some parameters, and what the optimizer remembers of them, alone.

    What is frozen is part of the state's structure, like a gradient that is not there: a frozen parameter costs
    nothing, and a compiled step is compiled once more when it is frozen. It is left out of a gradient norm that
    the rule may clip by.

    Args:
        opt_state: The state.
        path: A dotted path such as `"layer_1"`, which stands for everything below it, a glob such as `"*.bias"`, a
            predicate on dotted names, a list of these, or None for all; see `luxtorch.freeze`. The components of a
            ComponentVector have names too: once some of them are told apart, the vector's step is taken component by
            component.

    Returns:
        The new state.

    Raises:
        KeyNameError: If the path stands for no parameter.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.ones(2), "bias": torch.ones(1)}
        >>> opt_state = optim.freeze(optim.setup(optim.Descent(0.5), ps), "bias")
        >>> opt_state
        OptState(Descent(lr=0.5), 2 parameters, frozen: bias)
        >>> opt_state, ps = optim.update(opt_state, ps, ps)
        >>> ps
        {'weight': tensor([0.5000, 0.5000]), 'bias': tensor([1.])}

    The name is that of Optimisers.jl.
    """
    chosen = select(path, opt_state.layout.names)
    return _with_frozen(by_component(opt_state), chosen | set(opt_state.layout.frozen))


def thaw(opt_state: OptState, path: Path = None) -> OptState:
    """Return a state whose steps change parameters again that were frozen.

    Args:
        opt_state: The state.
        path: A dotted path, a glob, a predicate on dotted names, a list of these, or None for all; see `freeze`.

    Returns:
        The new state.

    Raises:
        KeyNameError: If the path stands for no parameter.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> opt_state = optim.setup(optim.Descent(0.5), {"weight": torch.ones(2), "bias": torch.ones(1)})
        >>> optim.thaw(optim.freeze(opt_state), "weight")
        OptState(Descent(lr=0.5), 2 parameters, frozen: bias)

    The name is that of Optimisers.jl.
    """
    chosen = select(path, opt_state.layout.names)
    return _with_frozen(opt_state, set(opt_state.layout.frozen) - chosen)


def _with_frozen(opt_state: OptState, frozen: set[str]) -> OptState:
    layout = opt_state.layout
    return OptState(layout._replace(frozen=tuple(name for name in layout.names if name in frozen)), opt_state.state)


unfreeze = thaw


def slots(opt_state: OptState, name: str) -> Any:
    """Return what an optimizer remembers of each parameter under a name, such as Adam's "exp_avg", as a tree.

    It does not matter which chain, groups or other rules are around the one that remembers it. Parameters of which
    nothing of this name is remembered are left out.

    Args:
        opt_state: The state.
        name: The name.

    Returns:
        Nested dicts like those of the parameters, a ComponentVector where they are one. Lists are dicts by position,
        and of complex parameters there are real and imaginary parts, in a last dimension of two.

    Raises:
        KeyNameError: If nothing of this name is remembered.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"layer": {"weight": torch.ones(2)}}
        >>> opt_state = optim.setup(optim.OptimiserChain(optim.ClipNorm(1.0), optim.MixedPrecision(optim.Adam())), ps)
        >>> optim.slots(opt_state, "exp_avg")
        {'layer': {'weight': tensor([0., 0.])}}
    """
    layout = opt_state.layout
    found: dict[str, Tensor] = {}
    known: dict[str, None] = {}

    def collect(rule: ListRule, state: RuleState) -> RuleState:
        for leaf, own in state.leaves.items():
            known.update(dict.fromkeys(own))
            if name in own:
                found.setdefault(leaf, own[name])
        return state

    layout.rule.map_states(collect, opt_state.state)
    if not found:
        raise unknown_name(name, known, "slot")
    values: dict[str, Any] = dict(found)
    for vector, axes in layout.vectors:
        shapes, whole = components(vector, axes), vector.removesuffix("flat").removesuffix(".")
        if vector in values:
            flat = values.pop(vector)
            values[whole] = ComponentVector.from_flat(flat, axes) if flat.shape[-1:] == (axes.size,) else flat
        elif all(part in values and values[part].shape == shape for part, shape in shapes.items()):
            flat = torch.cat([values.pop(part).reshape(-1) for part in shapes])
            values[whole] = ComponentVector.from_flat(flat, axes)
    if values.keys() == {""}:
        return values[""]
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def by_component(opt_state: OptState) -> OptState:
    """Return a state in which the components of each ComponentVector are leaves of their own.

    Such a state steps as that of a dict of the same components would, bit for bit. The parameters stay one vector.
    """
    layout = opt_state.layout
    if layout.by_component or not layout.vectors:
        return opt_state
    vectors = dict(layout.vectors)
    apart = {part for name, axes in vectors.items() for part in components(name, axes)}
    leaves = {*vectors, *(name for name in layout.names if name not in apart)}

    def splits(node: Any) -> bool:  # torchopt's states have dicts by the names of the leaves, or lists sorted by them
        named = isinstance(node, dict) and node.keys() == leaves
        return named or isinstance(node, RuleState) or (type(node) is list and len(node) == len(leaves))

    def split(node: Any) -> Any:
        if isinstance(node, RuleState):
            return node._replace(leaves=_split_slots(node.leaves, vectors, layout.in_parts))
        if not splits(node):
            return node
        pairs = node.items() if isinstance(node, dict) else zip(sorted(leaves), node, strict=True)
        slots = _split_slots({name: {"": value} for name, value in pairs}, vectors, layout.in_parts)
        new = {name: slot[""] for name, slot in slots.items()}
        return new if isinstance(node, dict) else [new[name] for name in sorted(new)]

    return OptState(layout._replace(by_component=True), tree_map(split, opt_state.state, is_leaf=splits))


def _split_slots(old: Mapping[str, Slots], vectors: Mapping[str, Axes], in_parts: Collection[str]) -> dict[str, Slots]:
    # A slot has a number for each element of the vector, after the leading dimensions of many models from vmap; or it
    # is a count, of which every component gets one.
    leaves: dict[str, Slots] = {}
    for name, slots in old.items():
        if name not in vectors:
            leaves[name] = slots
            continue
        parts = components(name, vectors[name])
        sizes = [prod(shape) for shape in parts.values()]
        pieces: dict[str, list[Tensor]] = {}
        for slot, value in slots.items():
            dim = value.ndim - 1 - (name in in_parts)
            if slot not in COUNTS and dim >= 0 and value.shape[dim] == sum(sizes):
                pieces[slot] = [
                    piece.reshape(*value.shape[:dim], *shape, *value.shape[dim + 1 :])
                    for piece, shape in zip(torch.split(value, sizes, dim), parts.values(), strict=True)
                ]
        for i, part in enumerate(parts):
            leaves[part] = {slot: pieces[slot][i] if slot in pieces else value.clone() for slot, value in slots.items()}
    return leaves
