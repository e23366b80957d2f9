"""Layers that share an input, `BranchLayer`, and layers that take one input each in turn, `PairwiseFusion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luxtorch.core import ContainerLayer, InputError, Layer, Parameters, States

from ._chain import Connection, LayerLike, check_combines, show_combines, some_layers


class BranchLayer(ContainerLayer):
    """Call layers on the same input, and combine their outputs.

    Args:
        *layers: Layers and plain functions; lists and tuples of them are spliced in.
        fusion: Combines the outputs: a function, called as `fusion(y_1, ..., y_n)`; a layer, called on the tuple of
            outputs; or None, to return the tuple.
        **named: The same as `layers` with names of your own.

    Parameters:
        Those of each layer, under `layer_1`, `layer_2`, ... or under the given names. If the fusion is a layer, these
        are under `layers`, and its own under `fusion`.

    States:
        Likewise.

    Shape:
        Whatever all layers take, a tuple included, to a tuple of their outputs, or to what the fusion returns.

    Raises:
        InputError: If there are no layers, or the fusion is neither a function nor a layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.BranchLayer(lt.Dense(3, 2), lt.Dense(3, 2), fusion=torch.mul)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(5, 3), ps, st)
        >>> y.shape
        torch.Size([5, 2])

    Source: Lux's `BranchLayer`.
    """

    fusion: Connection | None
    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def __init__(
        self, *layers: LayerLike | list[Any] | tuple[Any, ...], fusion: Connection | None = None, **named: LayerLike
    ) -> None:
        found = some_layers(type(self).__name__, layers, named)
        if fusion is not None:
            check_combines("fusion", fusion)
        if isinstance(fusion, Layer):
            found = {"layers": BranchLayer(**found), "fusion": fusion}
        self._set(fusion=fusion, names=tuple(found), layers=tuple(found.values()))

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the combined outputs, and the states under their names."""
        if isinstance(self.fusion, Layer):
            ys, new_layers = self.layers[0](x, ps["layers"], st["layers"])
            y, new_fusion = self.fusion(ys, ps["fusion"], st["fusion"])
            return y, {"layers": new_layers, "fusion": new_fusion}
        ys, new = [], {}
        for name, layer in zip(self.names, self.layers, strict=True):
            y, new[name] = layer(x, ps[name], st[name])
            ys.append(y)
        return (tuple(ys) if self.fusion is None else self.fusion(*ys)), new

    def extra_repr(self) -> str:
        """Return for instance `fusion=add`."""
        return show_combines("fusion=", self.fusion)


class PairwiseFusion(ContainerLayer):
    """Call layers one after another, and combine each output with the next input.

    Args:
        connection: Combines both: a function, called as `connection(layer(y), x)`; or a layer, called on the tuple
            `(layer(y), x)`, each time with the same parameters and with the states that the time before left.
        *layers: Layers and plain functions; lists and tuples of them are spliced in.
        **named: The same with names of your own.

    Parameters:
        Those of each layer, under `layer_1`, `layer_2`, ... or under the given names. If the connection is a layer,
        these are under `layers`, and its own under `connection`.

    States:
        Likewise.

    Shape:
        A tuple has one element more than there are layers: the first goes to the first layer, each of the others to
        the connection after a layer. Anything else goes whole to all of these places.

    Raises:
        InputError: If there are no layers, the connection is neither a function nor a layer, or a tuple has not one
            element more than there are layers.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.PairwiseFusion(torch.add, lt.Dense(2, 3), lt.Dense(3, 4))
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model((torch.ones(5, 2), torch.ones(5, 3), torch.ones(5, 4)), ps, st)
        >>> y.shape
        torch.Size([5, 4])

    Source: Lux's `PairwiseFusion`.
    """

    connection: Connection
    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def __init__(
        self, connection: Connection, *layers: LayerLike | list[Any] | tuple[Any, ...], **named: LayerLike
    ) -> None:
        found = some_layers(type(self).__name__, layers, named)
        check_combines("connection", connection)
        if isinstance(connection, Layer):
            found = {"layers": Layers(tuple(found), tuple(found.values())), "connection": connection}
        self._set(connection=connection, names=tuple(found), layers=tuple(found.values()))

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the last connected output, and the states under their names."""
        if isinstance(self.connection, Layer):
            return self._connected_by_layer(self.connection, x, ps, st)
        y, *elements = _for_each(x, len(self.layers))
        new = {}
        for name, layer, element in zip(self.names, self.layers, elements, strict=True):
            y, new[name] = layer(y, ps[name], st[name])
            y = self.connection(y, element)
        return y, new

    def _connected_by_layer(self, connection: Layer, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        steps, (new_layers, new_connection) = self.layers[0], (st["layers"], st["connection"])
        names = list(steps.children())
        y, *elements = _for_each(x, len(names))
        for name, element in zip(names, elements, strict=True):
            y, new_layers = steps((name, y), ps["layers"], new_layers)
            y, new_connection = connection((y, element), ps["connection"], new_connection)
        return y, {"layers": new_layers, "connection": new_connection}

    def extra_repr(self) -> str:
        """Return for instance `add`."""
        return show_combines("", self.connection)


class Layers(ContainerLayer):
    """Hold layers under their names, and call that one of them whose name comes with the input."""

    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def __call__(self, x: tuple[str, Any], ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the named layer's output, and the states under their names."""
        name, y = x
        y, new = self.children()[name](y, ps[name], st[name])
        return y, {**st, name: new}


def _for_each(x: Any, number: int) -> tuple[Any, ...]:
    """Return the input of the first of some layers, and what to connect after each of them."""
    xs = x if isinstance(x, tuple) else (x,) * (number + 1)
    if len(xs) != number + 1:
        raise InputError(
            "A tuple has an element for the first layer, and one to connect after each.",
            expected=f"a tuple of {number + 1}",
            got=f"a tuple of {len(xs)}",
        )
    return xs
