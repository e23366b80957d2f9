"""The layers of a model with normalised weights: `weight_norm` and `remove_weight_norm`."""

from __future__ import annotations

from typing import Any

from luxtorch.core import InputError, Layer, Parameters, States, flatten_names
from luxtorch.core._nowhere import NOWHERE
from luxtorch.core._paths import Path
from luxtorch.layers import WeightNorm

from ._layer_map import layer_map
from ._rewired import Rewired, Triple, everywhere, layers_inside
from ._trees import closed, join, matrices, opened, ordered, placed, require_shapes


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
    """Put normalised weights of a model together again: the inverse of `weight_norm`.

    Args:
        layer: The model; it, or layers inside, are `WeightNorm`.
        ps: Its parameters.
        st: Its states.

    Returns:
        `(layer, ps, st)`: the model without `WeightNorm`, which computes the same.

    Raises:
        KeyNameError: If the trees' names are not those of the model.
        InputError: If normalised parameters are frozen or shared.

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
        return layer.layer, ordered(layer.put_together(ps), layer.layer.initial_parameters(NOWHERE)), st

    return layer_map(change, layer, ps, st)
