"""Change, read or replace layers of a model: `layer_map`, `get_layer`, `replace_layer`, `weight_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luxtorch.core import (
    InputError,
    Layer,
    Parameters,
    States,
    described,
    flatten_names,
    nested_dicts,
    out_of_range,
    unknown_name,
)
from luxtorch.core._paths import Path
from luxtorch.core._tree import META_KEY
from luxtorch.layers import WeightNorm

from ._frozen import frozen_names, unfrozen
from ._partition import closed, join, ordered
from ._rewired import (
    Rewired,
    Triple,
    everywhere,
    layers_inside,
    layers_of,
    matrices,
    misfit,
    opened,
    placed,
    require_shapes,
)


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
        raise out_of_range("f", f, "a function f(layer, ps, st, path)", fix=f"The order is {call}.")
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
            "A layer can only be replaced by a layer with its trees.",
            expected="(layer, ps, st)",
            got=described(triple),
            fix="Return the three also where nothing changes.",
        )
    error = misfit(*triple)
    if error is not None:
        raise error
    return triple


def get_layer(layer: Layer, ps: Parameters, st: States, path: str) -> tuple[Layer, Any, dict[str, Any]]:
    """Return one layer of a model with its parameters and states, to be called by itself.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states.
        path: The names that lead to the layer's parameters, such as `"encoder.layer_1"`. What a wrapper such as
            `RepeatedLayer` holds has no path of its own.

    Returns:
        `(layer, ps, st)` of that layer, frozen parameters among `ps`.

    Raises:
        KeyNameError: If the path leads to no layer, or the trees' names are not those of the model.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> layer, own_ps, own_st = lt.get_layer(model, ps, st, "layer_1")
        >>> y, own_st = layer(torch.ones(4, 2), own_ps, own_st)
        >>> y.shape
        torch.Size([4, 8])

    Source: `torch.nn.Module.get_submodule`.
    """
    own_ps, own_st = opened("get_layer(layer, ps, st, path)", layer, ps, st)
    _require_layer(layer, path)
    found: list[Triple] = []

    def change(layer: Layer, ps: Any, st: Any, place: str) -> Triple | None:
        if place == path:
            found.append((layer, ps, st))
        return None if _leads(place, path) else (layer, ps, st)

    everywhere(change, layer, own_ps, own_st)
    layer, own_ps, own_st = found[0]
    return layer, closed(own_ps, ps), own_st


def replace_layer(
    layer: Layer, ps: Parameters, st: States, path: str, new: Layer, new_ps: Parameters, new_st: States
) -> tuple[Layer, Any, dict[str, Any]]:
    """Return a model in which one layer, with its parameters and states, is replaced.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states.
        path: The names that lead to the old layer's parameters; see `get_layer`.
        new: The new layer.
        new_ps: Its parameters, for instance from `lt.setup`.
        new_st: Its states.

    Returns:
        `(layer, ps, st)`, changed; what was passed in stays as it is. What was frozen of the old layer is not frozen
        of the new one; the rest of the model stays frozen.

    Raises:
        KeyNameError: If the path leads to no layer, or the names of trees are not those of their layer.
        InputError: If parameters of the old layer are shared with others.

    Example:
        A new head:

        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 10))
        >>> ps, st = lt.setup(0, model)
        >>> head = lt.Dense(8, 3)
        >>> model, ps, st = lt.replace_layer(model, ps, st, "layer_2", head, *lt.setup(1, head))
        >>> y, st = model(torch.ones(4, 2), ps, st)
        >>> y.shape
        torch.Size([4, 3])

    Source: `torch.nn.Module.set_submodule`; `tree_at` of Equinox.
    """
    own_ps, own_st = opened("replace_layer(layer, ps, st, path, new, new_ps, new_st)", layer, ps, st)
    _require_layer(layer, path)
    old = [name for name in frozen_names(layer) if not path or name.startswith(f"{path}.")]
    layer, own_ps, own_st = unfrozen(layer, own_ps, own_st, old)
    with placed(path):
        fitting((new, new_ps, new_st))

    def change(layer: Layer, ps: Any, st: Any, place: str) -> Triple | None:
        if place == path:
            return new, nested_dicts(new_ps), nested_dicts(new_st)
        return None if _leads(place, path) else (layer, ps, st)

    layer, own_ps, own_st = everywhere(change, layer, own_ps, own_st)
    return layer, closed(own_ps, ps), own_st


def _leads(place: str, path: str) -> bool:
    """Tell whether one place is above another."""
    return not place or path.startswith(f"{place}.")


def _require_layer(layer: Layer, path: str) -> None:
    names = [name for name in dict(layers_of(layer)) if name]
    if path and path not in names:
        raise unknown_name(path, names, "layer")


def weight_norm(
    layer: Layer, ps: Parameters, st: States, *paths: Path, dim: int | None = 0
) -> tuple[Layer, Any, dict[str, Any]]:
    """Take weights of a model apart into lengths and directions: their layers become `WeightNorm`.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states.
        *paths: Which weights: dotted paths such as `"layer_1"`, which stand for everything below them, globs such as
            `"*.attention"`, predicates on dotted names, or lists of these; see `freeze`. Of these, all with at least
            two dimensions; without paths, of all parameters.
        dim: The dimension along which each slice has a length of its own; None for one length in all.

    Returns:
        `(layer, ps, st)`: the model computes what it did before; what was passed in stays as it is.

    Raises:
        KeyNameError: If a path stands for no parameter, or the trees' names are not those of the model.
        InputError: If a slice of a weight is zero and has no direction, if a weight is a container's own, or has not
            the shape that it has in its layer, or if other parameters of its layer are frozen or shared.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> model, ps, st = lt.weight_norm(model, ps, st, "layer_1")
        >>> list(lt.flatten_names(ps["layer_1"]))
        ['normalized.weight_g', 'normalized.weight_v', 'unnormalized.bias']

    Source: `torch.nn.utils.parametrizations.weight_norm`.
    """
    own_ps, own_st = opened("weight_norm(layer, ps, st, *paths)", layer, ps, st)
    left = set(matrices(paths, flatten_names(own_ps)))

    def change(layer: Layer, ps: Any, st: Any, path: str) -> Triple | None:
        names = [name for name in ps if join(path, name) in left]
        # A wrapper such as Recurrence is taken as a whole: it may ask the layer inside for more than to be called.
        if not names or isinstance(layer, Rewired) or layers_inside(layer).keys() - {""}:
            return None
        left.difference_update(join(path, name) for name in names)
        with placed(path):
            require_shapes(layer, ps, names)
            normalized = WeightNorm(layer, tuple(names), dim=dim)
            return normalized, normalized.taken_apart(ps), st

    layer, own_ps, own_st = everywhere(change, layer, own_ps, own_st)
    if left:
        raise InputError(
            f"'{min(left)}' is not the parameter of a layer that can be wrapped.",
            expected="parameters of layers without others inside, not nested in groups",
            fix="Wrap a container itself, as lt.WeightNorm(container, names).",
        )
    return layer, closed(own_ps, ps), own_st


def remove_weight_norm(layer: Layer, ps: Parameters, st: States) -> tuple[Layer, Any, dict[str, Any]]:
    """Put normalized weights of a model together again: the inverse of `weight_norm`.

    Args:
        layer: The model; it, or layers inside, are `WeightNorm`.
        ps: Its parameters.
        st: Its states.

    Returns:
        `(layer, ps, st)`: the model without `WeightNorm`, which computes the same.

    Raises:
        KeyNameError: If the trees' names are not those of the model.
        InputError: If normalized parameters are frozen or shared.

    Example:
        >>> import luxtorch as lt
        >>> model = lt.Dense(2, 8)
        >>> ps, st = lt.setup(0, model)
        >>> same, ps, st = lt.remove_weight_norm(*lt.weight_norm(model, ps, st))
        >>> same == model, list(ps)
        (True, ['weight', 'bias'])

    Source: `torch.nn.utils.remove_weight_norm`.
    """

    def change(layer: Layer, ps: Any, st: Any, _: str) -> Triple:
        if not isinstance(layer, WeightNorm):
            return layer, ps, st
        return layer.layer, ordered(layer.put_together(ps), layer.layer.initial_parameters(META_KEY)), st

    return layer_map(change, layer, ps, st)
