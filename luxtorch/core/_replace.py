"""`replace_children`: copy a container with some of its layers replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from luxtorch._errors import unknown_name

from ._layer import Layer

L = TypeVar("L", bound=Layer)


def replace_children(layer: L, children: Mapping[str, Layer]) -> L:
    """Return a copy of a container with some of its layers replaced.

    The constructor is not called again, so its checks are not repeated.

    Args:
        layer: A container or wrapper.
        children: The new layers, by their names in `layer.children()`.

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
            raise unknown_name(name, old, "layer", where=type(layer).__name__)
    # Equal layers are often one object. In a copy of the container without such sharing, each has one name.
    origins: dict[int, Layer] = {}

    def unshared(child: Layer) -> Layer:
        copied = _with_layers(child, lambda inner: inner)
        origins[id(copied)] = child
        return copied

    copy = _with_layers(layer, unshared)
    named = {id(child): name for name, child in copy.children().items() if id(child) in origins}
    # A field that is not in children() may hold the same layer as one that is.
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
