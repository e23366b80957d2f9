"""The same change to each layer of a model: `layer_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luxtorch.core import InputError, Layer, Parameters, States

from ._rewired import Triple, everywhere, layers_inside
from ._trees import closed, misfit, opened, placed


def layer_map(
    f: Callable[[Layer, Any, Any, str], Triple], layer: Layer, ps: Parameters, st: States
) -> tuple[Layer, Any, dict[str, Any]]:
    """Change each layer of a model that holds no other layers, with its parameters and states.

    Args:
        f: A function `f(layer, ps, st, path)` of such a layer, its own parameters and states, and the dotted path that
            leads to them, such as `"layer_1.layer_2"`; it returns what is to stand there, a triple of the same kind.
            The path of a model that is a single layer is empty.
        layer: The model.
        ps: Its parameters.
        st: Its states.

    Returns:
        `(layer, ps, st)`, changed; what was passed in stays as it is. A layer that a wrapper such as `RepeatedLayer`
        holds has the wrapper's path; inside an `Ensemble`, trees are those of all members, stacked. Frozen parameters
        are among `ps`, and stay frozen.

    Raises:
        InputError: If `f` returns something else than a layer and its trees, or if it changes what is frozen, shared
            or adapted by `lora` so that it cannot be so any more.
        KeyNameError: If the names of trees are not those of their layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> def small(layer, ps, st, path):
        ...     if isinstance(layer, lt.Dense):
        ...         ps = {**ps, "weight": 0.1 * ps["weight"]}
        ...     return layer, ps, st
        >>> model, smaller, st = lt.layer_map(small, model, ps, st)
        >>> torch.allclose(smaller["layer_2"]["weight"], 0.1 * ps["layer_2"]["weight"])
        True

    Source: Lux's `Experimental.layer_map`.
    """
    call = "layer_map(f, layer, ps, st)"
    if isinstance(f, Layer) or not callable(f):
        raise InputError(
            "layer_map takes a function first.",
            expected=f"{call} with f(layer, ps, st, path)",
            got=f"{f!r:.80} of type {type(f).__name__}",
        )
    own_ps, own_st = opened(call, layer, ps, st)

    def change(layer: Layer, ps: Any, st: Any, path: str) -> Triple | None:
        if layers_inside(layer):
            return None
        with placed(path):
            return fitting(f(layer, ps, st, path))

    layer, new_ps, new_st = everywhere(change, layer, own_ps, own_st)
    return layer, closed(new_ps, ps), new_st


def fitting(triple: Any) -> Triple:
    """Return a triple, after a look at its parts and their names.

    Raises:
        InputError: If it is none.
        KeyNameError: If the names of trees are not those of the layer.
    """
    if not (isinstance(triple, tuple) and len(triple) == 3 and isinstance(triple[0], Layer)):
        raise InputError(
            "What is to stand in a layer's place is not a layer with its trees.",
            expected="(layer, ps, st)",
            got=f"a tuple of {len(triple)}" if isinstance(triple, tuple) else f"a {type(triple).__name__}",
            fix="Return the three also where nothing changes.",
        )
    error = misfit(*triple)
    if error is not None:
        raise error
    return triple
