"""Layers side by side: `Parallel`, and `SkipConnection` around a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luxtorch.core import ContainerLayer, InputError, Layer, Parameters, States

from ._chain import Connection, LayerLike, as_layer, check_combines, show_combines, some_layers


class Parallel(ContainerLayer):
    """Call layers side by side and combine their outputs.

    Args:
        connection: Combines the outputs: a function, called as `connection(y_1, ..., y_n)`; a layer, called on the
            tuple of outputs; or None, to return the tuple.
        *layers: Layers and plain functions; lists and tuples of them are spliced in.
        **named: The same with names of your own.

    Parameters:
        Those of each layer, under `layer_1`, `layer_2`, ... or under the given names. If the connection is a layer,
        these are under `layers`, and its own under `connection`.

    States:
        Likewise.

    Shape:
        A tuple is split, an element to each layer; anything else goes whole to every layer.

    Raises:
        InputError: If a tuple has not one element for each layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Parallel(torch.add, lt.Dense(3, 2), lt.Dense(4, 2))
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model((torch.ones(5, 3), torch.ones(5, 4)), ps, st)
        >>> y.shape
        torch.Size([5, 2])

    Source: Lux's `Parallel`.
    """

    connection: Connection | None
    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def __init__(
        self, connection: Connection | None, *layers: LayerLike | list[Any] | tuple[Any, ...], **named: LayerLike
    ) -> None:
        found = some_layers(type(self).__name__, layers, named)
        if connection is not None:
            check_combines("connection", connection)
        if isinstance(connection, Layer):
            found = {"layers": Parallel(None, **found), "connection": connection}
        self._set(connection=connection, names=tuple(found), layers=tuple(found.values()))

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the combined outputs, and the states under their names."""
        if isinstance(self.connection, Layer):
            ys, new_layers = self.layers[0](x, ps["layers"], st["layers"])
            y, new_connection = self.connection(ys, ps["connection"], st["connection"])
            return y, {"layers": new_layers, "connection": new_connection}
        xs = x if isinstance(x, tuple) else (x,) * len(self.layers)
        if len(xs) != len(self.layers):
            raise InputError(
                "A tuple is split, an element to each layer.",
                expected=f"a tuple of {len(self.layers)}",
                got=f"a tuple of {len(xs)}",
            )
        ys, new = [], {}
        for name, layer, element in zip(self.names, self.layers, xs, strict=True):
            y, new[name] = layer(element, ps[name], st[name])
            ys.append(y)
        return (tuple(ys) if self.connection is None else self.connection(*ys)), new

    def extra_repr(self) -> str:
        """Return for instance `add`."""
        return show_combines("", self.connection)


class SkipConnection(ContainerLayer):
    """Combine a layer's output with its input.

    Args:
        layer: A layer or a plain function.
        connection: Combines both: a function, called as `connection(layer(x), x)`; or a layer, called on the tuple
            `(layer(x), x)`.

    Parameters:
        Those of the layer, not nested. If the connection is a layer, the former are under `layers`, and the
        connection's own under `connection`.

    States:
        Likewise.

    Shape:
        What the layer takes to what the connection returns.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.SkipConnection(lt.Dense(3, 3), torch.add)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(5, 3), ps, st)
        >>> y.shape
        torch.Size([5, 3])

    Source: Lux's `SkipConnection`.
    """

    layer: Layer
    connection: Connection

    def __init__(self, layer: LayerLike, connection: Connection) -> None:
        check_combines("connection", connection)
        self._set(layer=as_layer(layer), connection=connection)

    def children(self) -> Mapping[str, Layer]:
        """Return the layer, not nested; with a layer as connection, both of them under names."""
        if isinstance(self.connection, Layer):
            return {"layers": self.layer, "connection": self.connection}
        return {"": self.layer}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the connected output and input, and the new states."""
        if not isinstance(self.connection, Layer):
            y, st = self.layer(x, ps, st)
            return self.connection(y, x), st
        y, new = self.layer(x, ps["layers"], st["layers"])
        y, new_connection = self.connection((y, x), ps["connection"], st["connection"])
        return y, {"layers": new, "connection": new_connection}

    def extra_repr(self) -> str:
        """Return for instance `add`."""
        return show_combines("", self.connection)
