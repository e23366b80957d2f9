"""Containers of layers: `Chain`, `Parallel`, `SkipConnection`, `BranchLayer` and `PairwiseFusion`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, TypeAlias

from luxtorch.core import (
    ContainerLayer,
    InputError,
    Layer,
    Parameters,
    States,
    described,
    out_of_range,
    show_value,
    suggest,
)
from luxtorch.core._container import refuse_modules

from ._basic import NoOpLayer, WrappedFunction

LayerLike: TypeAlias = Layer | Callable[[Any], Any]
"""A layer, or a function of the input that becomes one."""

Connection: TypeAlias = Layer | Callable[..., Any]
"""What combines values: a function of all of them, or a layer of their tuple."""


def as_layer(layer: Any) -> Layer:
    """Return a layer unchanged, and a plain function as a `WrappedFunction`."""
    if isinstance(layer, Layer):
        return layer
    if isinstance(layer, type) or not callable(layer):
        fix = "Call the class to make a layer: lt.Dense(10, 5)." if isinstance(layer, type) else ""
        raise out_of_range("Each part of a model", layer, "a layer, or a function of the input", fix=fix)
    return WrappedFunction(layer)


def named_layers(layers: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Layer]:
    """Return layers by name: `layer_1`, `layer_2`, ... or the names of keyword arguments.

    Lists and tuples among the layers are flattened; containers are not.
    """
    if layers and named:
        raise InputError(
            "Either all layers must be named, or none.",
            got=f"{len(layers)} without and {len(named)} with a name",
            fix="Give every layer a keyword, or none.",
        )
    for name in named:
        if not name or "." in name:
            raise InputError("A layer's name must not be empty, or contain dots.", got=repr(name))
    pairs = named.items() if named else ((f"layer_{i}", layer) for i, layer in enumerate(_flattened(layers), 1))
    return {name: as_layer(layer) for name, layer in pairs}


def some_layers(container: str, layers: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Layer]:
    """Return layers by name, for a container that needs at least one."""
    found = named_layers(layers, named)
    if not found:
        raise InputError(f"{container} must have at least one layer.", got="none")
    return found


def check_combines(name: str, combine: Any) -> None:
    """Raise unless a value is a function, or a layer, that can combine outputs."""
    if not callable(combine) or isinstance(combine, type):
        raise out_of_range(name, combine, "a function or a layer")
    refuse_modules(combine, f"The {name}")


def combine_text(name: str, combine: Any) -> str:
    """Return the text of a function that combines values; empty for None and for a layer, shown as a child."""
    return "" if combine is None or isinstance(combine, Layer) else f"{name}{show_value(combine)}"


def extra_input(layer: Layer, x: Any) -> str:
    """Return which extra input (a mask, lengths) a tuple has for a layer, or for the first one inside; "" if none."""
    while not (asked := [what for what in EXTRA_INPUTS if hasattr(type(layer), what)]):
        inside = layer.layers[0] if isinstance(layer, Chain) else layer.children().get("")
        if inside is None:
            return ""
        layer = inside
    return asked[0] if getattr(layer, asked[0])(x) else ""


EXTRA_INPUTS = {
    "has_mask": (
        "a mask",
        "Stack the layers in a TransformerEncoder or a TransformerDecoder: each of them gets the mask.",
    ),
    "has_lengths": ("lengths", "Stack the cells in a StackedCell, or pass the lengths on in a layer of your own."),
}
"""Extra inputs, by the method that recognizes them: their name, and what else to do with them."""


def _takes(layer: Layer, what: str) -> bool:
    return hasattr(type(layer), what) or any(_takes(child, what) for child in layer.children().values())


def _flattened(layers: tuple[Any, ...] | list[Any]) -> Iterator[Any]:
    for layer in layers:
        if isinstance(layer, list | tuple):
            yield from _flattened(layer)
        else:
            yield layer


class NamedLayers(ContainerLayer):
    """Hold layers under names, under which their parameters and states are nested."""

    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def call_each(self, xs: Iterable[Any], ps: Parameters, st: States) -> tuple[list[Any], dict[str, Any]]:
        """Return the outputs of all layers, each called on an input of its own, and the states under their names."""
        ys, new = [], {}
        for name, layer, x in zip(self.names, self.layers, xs, strict=True):
            y, new[name] = layer(x, ps[name], st[name])
            ys.append(y)
        return ys, new


class Chain(NamedLayers):
    """Call layers one after another, each on the output of the one before.

    Args:
        *layers: Layers and plain functions; lists and tuples of them are flattened, other chains are not.
        **named: The same with names of your own.

    Parameters:
        Those of each layer, under `layer_1`, `layer_2`, ... or under the given names.

    States:
        Likewise.

    Shape:
        What the first layer takes to what the last one returns.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> list(ps)
        ['layer_1', 'layer_2']
        >>> y, st = model(torch.ones(4, 2), ps, st)
        >>> y.shape
        torch.Size([4, 1])
        >>> model[1:]  # slices keep the names
        Chain(
            layer_2 = Dense(8 -> 1),    # 9 parameters: weight (1, 8), bias (1,)
        )                               # total: 9 parameters

    Source: Lux's `Chain`, `torch.nn.Sequential`.
    """

    def __init__(self, *layers: LayerLike | list[Any] | tuple[Any, ...], **named: LayerLike) -> None:
        found = named_layers(layers, named) or {"layer_1": NoOpLayer()}
        self._set(names=tuple(found), layers=tuple(found.values()))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the last layer's output, and each layer's state under its name."""
        new = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            if isinstance(x, tuple) and (what := extra_input(layer, x)):
                self._check_extra_input(name, what)
            x, new[name] = layer(x, ps[name], st[name])
        return x, new

    def _check_extra_input(self, name: str, what: str) -> None:
        """Raise if one layer takes a mask or lengths, and another after it would have to do without."""
        layers = self.children()
        after = self.names[self.names.index(name) + 1 :]
        without = [other for other in after if _takes(layers[other], what)]
        if without:
            raise InputError(
                f"A chain passes {EXTRA_INPUTS[what][0]} only to the first layer that takes it.",
                expected="one layer that takes it",
                got=f"an input for '{name}' that has it, and '{without[0]}' after it, which would not get it",
                fix=EXTRA_INPUTS[what][1],
            )

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, index: int | str | slice) -> Layer:
        """Return a layer by position or name, or a chain of a slice of the layers, which keep their names."""
        if isinstance(index, slice):
            return Chain(**dict(zip(self.names[index], self.layers[index], strict=True)))
        if isinstance(index, str):
            if index not in self.names:
                raise InputError(
                    f"The chain has no layer '{index}'.", expected=", ".join(self.names), fix=suggest(index, self.names)
                )
            index = self.names.index(index)
        return self.layers[index]

    def __getattr__(self, name: str) -> Layer:
        # Python asks here only for what it has not found; before the fields are set, that may be the fields themselves.
        names = self.__dict__.get("names", ())
        if name in names:
            return self.layers[names.index(name)]  # type: ignore[no-any-return]
        raise AttributeError(f"{type(self).__name__} has no attribute or layer '{name}'. {suggest(name, names)}")


class Parallel(NamedLayers):
    """Call layers side by side and combine their outputs.

    Args:
        connection: Combines the outputs: a function, called as `connection(y_1, ..., y_n)`; a layer, called on the
            tuple of outputs; or None, to return the tuple.
        *layers: Layers and plain functions; lists and tuples of them are flattened.
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

    def __init__(
        self, connection: Connection | None, *layers: LayerLike | list[Any] | tuple[Any, ...], **named: LayerLike
    ) -> None:
        found = some_layers(type(self).__name__, layers, named)
        if connection is not None:
            check_combines("connection", connection)
        if isinstance(connection, Layer):
            found = {"layers": Parallel(None, **found), "connection": connection}
        self._set(connection=connection, names=tuple(found), layers=tuple(found.values()))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the combined outputs, and the states under their names."""
        if isinstance(self.connection, Layer):
            ys, new_layers = self.layers[0](x, ps["layers"], st["layers"])
            y, new_connection = self.connection(ys, ps["connection"], st["connection"])
            return y, {"layers": new_layers, "connection": new_connection}
        xs = x if isinstance(x, tuple) else (x,) * len(self.layers)
        if len(xs) != len(self.layers):
            raise InputError(
                "A tuple must have one element for each layer.",
                expected=f"a tuple of length {len(self.layers)}",
                got=described(xs),
            )
        ys, new = self.call_each(xs, ps, st)
        return (tuple(ys) if self.connection is None else self.connection(*ys)), new

    def extra_repr(self) -> str:
        """Return for instance `add`."""
        return combine_text("", self.connection)


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
        return combine_text("", self.connection)


class BranchLayer(NamedLayers):
    """Call layers on the same input, and combine their outputs.

    Args:
        *layers: Layers and plain functions; lists and tuples of them are flattened.
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

    def __init__(
        self, *layers: LayerLike | list[Any] | tuple[Any, ...], fusion: Connection | None = None, **named: LayerLike
    ) -> None:
        found = some_layers(type(self).__name__, layers, named)
        if fusion is not None:
            check_combines("fusion", fusion)
        if isinstance(fusion, Layer):
            found = {"layers": BranchLayer(**found), "fusion": fusion}
        self._set(fusion=fusion, names=tuple(found), layers=tuple(found.values()))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the combined outputs, and the states under their names."""
        if isinstance(self.fusion, Layer):
            ys, new_layers = self.layers[0](x, ps["layers"], st["layers"])
            y, new_fusion = self.fusion(ys, ps["fusion"], st["fusion"])
            return y, {"layers": new_layers, "fusion": new_fusion}
        ys, new = self.call_each(repeat(x, len(self.layers)), ps, st)
        return (tuple(ys) if self.fusion is None else self.fusion(*ys)), new

    def extra_repr(self) -> str:
        """Return for instance `fusion=add`."""
        return combine_text("fusion=", self.fusion)


class PairwiseFusion(NamedLayers):
    """Call layers one after another, and combine each output with the next input.

    Args:
        connection: Combines both: a function, called as `connection(layer(y), x)`; or a layer, called on the tuple
            `(layer(y), x)`, each time with the same parameters and with the states that the time before left.
        *layers: Layers and plain functions; lists and tuples of them are flattened.
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

    def __init__(
        self, connection: Connection, *layers: LayerLike | list[Any] | tuple[Any, ...], **named: LayerLike
    ) -> None:
        found = some_layers(type(self).__name__, layers, named)
        check_combines("connection", connection)
        if isinstance(connection, Layer):
            found = {"layers": Layers(tuple(found), tuple(found.values())), "connection": connection}
        self._set(connection=connection, names=tuple(found), layers=tuple(found.values()))

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
        return combine_text("", self.connection)


class Layers(NamedLayers):
    """Hold layers under their names, and call that one of them whose name comes with the input."""

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
            "A tuple must have one element for the first layer, and one to connect after each layer.",
            expected=f"a tuple of length {number + 1}",
            got=described(xs),
        )
    return xs
