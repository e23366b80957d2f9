"""A container with other layers in the places of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from luxtorch._errors import KeyNameError, suggest

from ._layer import Layer

L = TypeVar("L", bound=Layer)


def replace_children(layer: L, children: Mapping[str, Layer]) -> L:
    """Return a container in which some of the layers inside are replaced.

    Its constructor is not called again: what it checks, and what it derives from the layers, stays as it was.

    Args:
        layer: A container or wrapper.
        children: The new layers, by the names that `layer.children()` has for the old ones.

    Raises:
        KeyNameError: If the container has no layer of a name.

    Example:
        >>> import torch, luxtorch as lt
        >>> replace_children(lt.Chain(lt.Dense(2, 2), lt.Dense(2, 2)), {"layer_2": lt.Dropout(0.1)})
        Chain(
            layer_1 = Dense(2 -> 2),    # 6 parameters: weight (2, 2), bias (2,)
            layer_2 = Dropout(0.1),     # 2 states
        )                               # total: 6 parameters, 2 states
    """
    old = layer.children()
    for name in children:
        if name not in old:
            raise KeyNameError(
                f"{type(layer).__name__} has no layer '{name}'.",
                expected=", ".join(old) or "no name, as there are no layers inside",
                got=name,
                fix=suggest(name, old),
            )
    # Equal layers are often one object. In a copy of the container where none is, the names tell them apart.
    origins: dict[int, Layer] = {}

    def apart(child: Layer) -> Layer:
        copied = _with_layers(child, lambda inner: inner)
        origins[id(copied)] = child
        return copied

    copy = _with_layers(layer, apart)
    named = {id(child): name for name, child in copy.children().items() if id(child) in origins}
    # A field without a name of its own may hold a layer that another field has under a name.
    followed = {id(origins[child]): name for child, name in named.items()}
    wanted = {**old, **children}

    def placed(child: Layer) -> Layer:
        origin = origins[id(child)]
        name = named.get(id(child), followed.get(id(origin)))
        return origin if name is None else wanted[name]

    return _with_layers(copy, placed)


def _with_layers(layer: L, change: Callable[[Layer], Layer]) -> L:
    """Return a copy of a layer with a function applied to the layers in its fields."""
    cls = type(layer)
    values = {
        name: _mapped(change, value)
        for name, value in vars(layer).items()
        if not isinstance(getattr(cls, name, None), cached_property)  # these are computed from the layers
    }
    new = cls.__new__(cls)
    new._set(**values)
    return new


def _mapped(change: Callable[[Layer], Layer], value: Any) -> Any:
    if isinstance(value, Layer):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([_mapped(change, item) for item in value])
    if type(value) is dict:
        return {name: _mapped(change, item) for name, item in value.items()}
    return value
