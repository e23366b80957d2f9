"""A layer of a model, with its trees, read or replaced: `get_layer` and `replace_layer`."""

from __future__ import annotations

from typing import Any

from luxtorch.core import KeyNameError, Layer, Parameters, States, nested_dicts, suggest

from ._frozen import frozen_names, thawed
from ._layer_map import fitting
from ._rewired import Triple, everywhere, layers_of
from ._trees import closed, opened, placed


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
    layer, own_ps, own_st = thawed(layer, own_ps, own_st, old)
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
        raise KeyNameError(
            f"The model has no layer '{path}'.",
            expected=", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            or "'', as there are no layers inside",
            got=f"'{path}'",
            fix=suggest(str(path), names),
        )
