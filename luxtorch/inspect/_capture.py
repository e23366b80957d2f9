"""Intermediate outputs of a model, returned beside its output: `capture`."""

from __future__ import annotations

from typing import Any

from luxtorch._torch import compile_constant
from luxtorch.core import Layer, Parameters, States
from luxtorch.core._paths import Path
from luxtorch.layers import Perturbed
from luxtorch.layers._perturbed import (
    OUTPUT,
    changed,
    layer_paths,
    tappable,
    with_perturbation,
    without_output,
    without_tap,
)


def capture(
    layer: Layer, x: Any, ps: Parameters, st: States, paths: Path = None
) -> tuple[tuple[Any, dict[str, Any]], States]:
    """Call a model, and return what layers inside return beside its output.

    It is an ordinary pure function, and all the transforms apply: the gradient of something that depends on an
    intermediate value, intermediate values per sample by `torch.vmap`, or in a compiled graph. For gradients *with
    respect to* intermediate values there is `intermediate_gradients`.

    Args:
        layer: The model.
        x: Its input.
        ps: Its parameters.
        st: Its states.
        paths: The layers inside, by the names that lead to their parameters: `"layer_2"`, `"encoder.layer_1"`; in a
            module from `lt.from_torch`, the modules' own names. Or globs such as `"*.attention"`, which stand for the
            layers whose whole path they match (`*` is any number of characters, dots among them); predicates on paths;
            a list, tuple or set of these. None stands for every layer that is called as one: not for the cell in a
            `Recurrence`, nor for modules of torch.nn inside others.

    Returns:
        `((y, inside), st)`: the output, a dict of what the layers return by path, and the new states. Of a layer that
        is called several times, the last output.

    Raises:
        InputError: If a layer that was asked for was not called.
        KeyNameError: If a path leads to no layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> (y, inside), st = lt.capture(model, torch.ones(4, 2), ps, st, "layer_1")
        >>> inside["layer_1"].shape
        torch.Size([4, 8])
        >>> (y, inside), st = lt.capture(model, torch.ones(4, 2), ps, st)
        >>> list(inside)
        ['layer_1', 'layer_2']

    Source: `capture_intermediates` of Flax; forward hooks in torch, which know no transforms.
    """
    one = isinstance(paths, str) or callable(paths)
    chosen = None if paths is None else layer_paths(layer, (paths,) if one else tuple(paths))  # type: ignore[arg-type]
    model: Perturbed | None = getattr(_MADE, _name(layer, chosen))
    if model is None:
        y, st = layer(x, ps, st)
        return (y, {}), st
    if chosen is not None:
        return model((x, {}), ps, st)
    for path in model.paths:
        st = changed(st, path.split("."), with_perturbation(()))
    y, st = model._tapped(x, ps, st)
    inside: dict[str, Any] = {}
    for path in model.paths:
        take = without_output(path, inside)
        st = changed(st, path.split("."), lambda own, take=take: take(own) if own[OUTPUT] else without_tap(own))  # type: ignore[misc]
    return (y, inside), st


class _Made:
    """Hold, in attributes, the perturbed models that were made."""


_MADE, _NAMES = _Made(), dict[tuple[Layer, tuple[str, ...] | None], str]()


@compile_constant  # which cannot trace how a layer is made
def _name(layer: Layer, paths: tuple[str, ...] | None) -> str:
    """Return the attribute that holds a model with taps at the ends of paths, or wherever there can be one."""
    if (layer, paths) not in _NAMES:
        chosen = tuple(dict.fromkeys(tappable(layer))) if paths is None else paths
        name = f"model_{len(_NAMES)}"
        setattr(_MADE, name, Perturbed(layer, *chosen) if chosen else None)
        _NAMES[layer, paths] = name
    return _NAMES[layer, paths]
