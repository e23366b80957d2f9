"""A layer whose output is perturbed, and kept, by way of its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States, WrapperLayer, tree_leaves, tree_map, tree_structure
from luxtorch.core._replace import replace_children

# In the state of a layer that is perturbed, beside its own: what to add to its output, and what the output was.
PERTURBATION, OUTPUT = "(perturbation)", "(output)"


class Tap(WrapperLayer):
    """Add the perturbation in the state to what a layer returns, and keep the sum there."""

    layer: Layer

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer, and no perturbation."""
        return {**self.layer.initial_states(key), PERTURBATION: (), OUTPUT: ()}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the perturbed output."""
        y, new = self.layer(x, ps, without_tap(st))
        y = added(y, st[PERTURBATION])
        return y, {**new, PERTURBATION: st[PERTURBATION], OUTPUT: (y,)}

    def __getattr__(self, name: str) -> Any:
        # What a container asks its layer for besides its output, such as its width.
        if name == "layer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.layer, name)


def with_tap(model: Layer, names: list[str]) -> Layer:
    """Return a model with a tap at the end of a path."""
    if not names:
        return Tap(model)
    children = model.children()
    # A single layer inside whose trees are not nested is not named in a path either.
    name, rest = ("", names) if "" in children else (names[0], names[1:])
    if not children and hasattr(type(model), "tapped"):  # it holds something else than layers
        return model.tapped(".".join(names))  # type: ignore[attr-defined,no-any-return]
    child = children.get(name)
    return replace_children(model, {name: model if child is None else with_tap(child, rest)})


def added(y: Any, perturbation: Any) -> Any:
    """Return an output with a perturbation added, unless it is `()`, which is none."""
    if isinstance(perturbation, tuple) and not perturbation:
        return y
    if tree_structure(perturbation) == tree_structure(y):
        pairs = zip(tree_leaves(perturbation), tree_leaves(y), strict=True)
        if all(_broadcasts(tuple(leaf.shape), tuple(to.shape)) for leaf, to in pairs):
            return tree_map(torch.add, y, perturbation)
    raise InputError(
        "The perturbation does not fit what the layer returns.",
        expected=f"{tree_map(_shape, y)}",
        got=f"{tree_map(_shape, perturbation)}",
        fix="Start from torch.zeros_like of what the perturbed model returns for the layer.",
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in ends)


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf


def changed(tree: States, names: list[str], change: Callable[[States], States]) -> States:
    """Return a tree with a function applied to a part of it; a tree without that part as it is."""
    if not names:
        return change(tree)
    if names[0] not in tree:  # the layer that misses it will say so
        return tree
    return {**tree, names[0]: changed(tree[names[0]], names[1:], change)}


def without_tap(st: States) -> dict[str, Any]:
    """Return the state of a layer without what a tap has in it."""
    return {name: value for name, value in st.items() if name not in (PERTURBATION, OUTPUT)}


def with_perturbation(perturbation: Any) -> Callable[[States], States]:
    """Return a function that puts a perturbation into the state of a layer."""
    return lambda st: {**st, PERTURBATION: perturbation, OUTPUT: ()}


def without_output(path: str, outputs: dict[str, Any]) -> Callable[[States], States]:
    """Return a function that takes a layer's output out of its state, and puts it into a dict."""

    def without(st: States) -> States:
        if not st[OUTPUT]:
            raise InputError(
                f"The layer '{path}' returned nothing.",
                expected="a layer that its container calls as layer(x, ps, st)",
                fix="Perturb the container, or another layer.",
            )
        (outputs[path],) = st[OUTPUT]
        return without_tap(st)

    return without
