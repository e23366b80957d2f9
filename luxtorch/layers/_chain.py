"""One layer after another: `Chain`, and the naming of layers that all containers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from luxtorch.core import ContainerLayer, InputError, Layer, Parameters, States, show_value, suggest
from luxtorch.core._container import refuse_modules

from ._basic import NoOpLayer, WrappedFunction

LayerLike: TypeAlias = Layer | Callable[[Any], Any]
"""A layer, or a function of the input that becomes one."""

Connection: TypeAlias = Layer | Callable[..., Any]
"""What combines values: a function of all of them, or a layer of their tuple."""


def as_layer(layer: Any) -> Layer:
    """Return a layer as it is, and a plain function as a `WrappedFunction`."""
    if isinstance(layer, Layer):
        return layer
    if isinstance(layer, type) or not callable(layer):
        raise InputError(
            "A model is made of layers.",
            expected="a layer, or a function of the input",
            got=f"{layer!r:.80}",
            fix="Call the class to make a layer: lt.Dense(10, 5)." if isinstance(layer, type) else "",
        )
    return WrappedFunction(layer)


def named_layers(layers: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Layer]:
    """Give layers their names: `layer_1`, `layer_2`, ... or those of keyword arguments.

    Lists and tuples among the layers are spliced in; containers are not.
    """
    if layers and named:
        raise InputError(
            "Layers are named either all or not at all.",
            got=f"{len(layers)} without and {len(named)} with a name",
            fix="Give every layer a keyword, or none.",
        )
    for name in named:
        if not name or "." in name:
            raise InputError("A layer's name has no dots, which separate the names in a path.", got=repr(name))
    pairs = named.items() if named else ((f"layer_{i}", layer) for i, layer in enumerate(_spliced(layers), 1))
    return {name: as_layer(layer) for name, layer in pairs}


def some_layers(container: str, layers: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Layer]:
    """Give layers their names, for a container that needs at least one."""
    found = named_layers(layers, named)
    if not found:
        raise InputError(f"{container} needs layers.", expected=f"{container}(..., layer, ...)", got="none")
    return found


def check_combines(name: str, combine: Any) -> None:
    """Raise unless something can combine values: a function, or a layer."""
    if not callable(combine) or isinstance(combine, type):
        raise InputError(f"The {name} combines values.", expected="a function or a layer", got=f"{combine!r:.80}")
    refuse_modules(combine, f"The {name}")


def show_combines(name: str, combine: Any) -> str:
    """Return how a function that combines values is shown; a layer is shown as a child, and nothing not at all."""
    return "" if combine is None or isinstance(combine, Layer) else f"{name}{show_value(combine)}"


def brought(layer: Layer, x: Any) -> str:
    """Name what an input brings for a layer, or for the first one inside that the input goes to; "" if nothing."""
    while not (asked := [what for what in _BROUGHT if hasattr(type(layer), what)]):
        inside = layer.layers[0] if isinstance(layer, Chain) else layer.children().get("")
        if inside is None:
            return ""
        layer = inside
    return asked[0] if getattr(layer, asked[0])(x) else ""


_BROUGHT = {
    "has_mask": (
        "A mask goes",
        "Stack the layers in a TransformerEncoder or a TransformerDecoder: each of them gets the mask.",
    ),
    "has_lengths": ("Lengths go", "Stack the cells in a StackedCell, or pass the lengths on in a layer of your own."),
}
"""By the methods that tell whether an input brings something: what the errors say."""


def no_further(what: str) -> str:
    """Say that what an input brings goes no further."""
    return f"{_BROUGHT[what][0]} no further"


def _takes(layer: Layer, what: str) -> bool:
    return hasattr(type(layer), what) or any(_takes(child, what) for child in layer.children().values())


def _spliced(layers: tuple[Any, ...] | list[Any]) -> Iterator[Any]:
    for layer in layers:
        if isinstance(layer, list | tuple):
            yield from _spliced(layer)
        else:
            yield layer


class Chain(ContainerLayer):
    """Call layers one after another, each on the output of the one before.

    Args:
        *layers: Layers and plain functions; lists and tuples of them are spliced in, other chains are not.
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

    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def __init__(self, *layers: LayerLike | list[Any] | tuple[Any, ...], **named: LayerLike) -> None:
        found = named_layers(layers, named) or {"layer_1": NoOpLayer()}
        self._set(names=tuple(found), layers=tuple(found.values()))

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the last layer's output, and each layer's state under its name."""
        new = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            if isinstance(x, tuple) and (what := brought(layer, x)):
                self._check_brought(name, what)
            x, new[name] = layer(x, ps[name], st[name])
        return x, new

    def _check_brought(self, name: str, what: str) -> None:
        """Raise if one layer takes a mask or lengths, and another after it would have to do without."""
        layers = self.children()
        after = self.names[self.names.index(name) + 1 :]
        without = [other for other in after if _takes(layers[other], what)]
        if without:
            raise InputError(
                f"{no_further(what)} in a chain than to the first layer that takes it.",
                expected="one layer that takes such a thing",
                got=f"an input for '{name}' that brings it, and '{without[0]}' after it, which has to do without",
                fix=_BROUGHT[what][1],
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
