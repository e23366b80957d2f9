"""Layers called many times, or in another precision: `Maxout`, `RepeatedLayer`, `AlternatePrecision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import (
    ContainerLayer,
    InputError,
    Layer,
    Parameters,
    States,
    WrapperLayer,
    show_value,
    tree_leaves,
    tree_map,
)

from ._chain import LayerLike, as_layer, brought, no_further, some_layers


class Maxout(ContainerLayer):
    """Call layers on the same input, and return the elementwise maximum of their outputs.

    `Maxout(make, n)` calls the function `make`, without arguments, for a layer, and uses it n times with initial
    values of its own for each.

    Args:
        *layers: Layers and plain functions; lists and tuples of them are spliced in. Or a function that makes a
            layer, and a number.
        **named: Layers with names of your own.

    Parameters:
        Those of each layer, under `layer_1`, `layer_2`, ... or under the given names.

    States:
        Likewise.

    Shape:
        Whatever all layers take to their common output shape.

    Raises:
        InputError: If there are no layers.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Maxout(lambda: lt.Dense(3, 2), 4)
        >>> ps, st = lt.setup(0, model)
        >>> list(ps)
        ['layer_1', 'layer_2', 'layer_3', 'layer_4']
        >>> y, st = model(torch.ones(5, 3), ps, st)
        >>> y.shape
        torch.Size([5, 2])

    Source: Lux's `Maxout`; Goodfellow et al., "Maxout networks", 2013.
    """

    names: tuple[str, ...]
    layers: tuple[Layer, ...]

    def __init__(self, *layers: LayerLike | list[Any] | tuple[Any, ...] | int, **named: LayerLike) -> None:
        if len(layers) == 2 and isinstance(layers[1], int):
            layers = _copies(layers[0], layers[1])
        found = some_layers(type(self).__name__, layers, named)
        self._set(names=tuple(found), layers=tuple(found.values()))

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name."""
        return dict(zip(self.names, self.layers, strict=True))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the largest outputs, and the states under their names."""
        ys, new = [], {}
        for name, layer in zip(self.names, self.layers, strict=True):
            y, new[name] = layer(x, ps[name], st[name])
            ys.append(y)
        return reduce(torch.maximum, ys), new


class RepeatedLayer(WrapperLayer):
    """Call one layer again and again on its own output: deep, with the parameters of one.

    Args:
        layer: A layer or a plain function.
        repeats: How often it is called.
        input_injection: Whether each call is on the tuple `(y, x)` of the output so far, at first x itself, and the
            input x.

    Parameters:
        Those of the layer, not nested; the same in every call.

    States:
        Likewise; each call takes those that the one before returned.

    Shape:
        What the layer takes to the same.

    Raises:
        InputError: If the number of repeats is not at least 1.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.RepeatedLayer(lambda x: 2 * x, 3)(torch.ones(2), {}, {})
        >>> y
        tensor([8., 8.])

    Source: Lux's `RepeatedLayer`, as it is documented; Bansal et al., "End-to-end algorithm synthesis with recurrent
    networks", 2022, for input injection.
    """

    layer: Layer
    repeats: int = 10
    _: KW_ONLY
    input_injection: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.repeats, int) and self.repeats >= 1):
            raise InputError(
                "RepeatedLayer takes a number of repeats.",
                expected="a whole number of at least 1",
                got=f"{self.repeats!r}",
            )
        self._set(layer=as_layer(self.layer))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the last output and the last states."""
        several = isinstance(x, tuple) and self.repeats > 1 and not self.input_injection
        if several and (what := brought(self.layer, x)):
            raise InputError(
                f"{no_further(what)} than to the first call of a repeated layer.",
                expected="an input without it",
                got=f"one with it, and {self.repeats} calls",
                fix="Write a layer that passes it to the one inside each time.",
            )
        y = x
        for _ in range(self.repeats):
            y, st = self.layer((y, x) if self.input_injection else y, ps, st)
        return y, st

    def extra_repr(self) -> str:
        """Return for instance `repeats=3`."""
        return f"repeats={self.repeats}" + (", input_injection=True" if self.input_injection else "")


class AlternatePrecision(WrapperLayer):
    """Call a layer in another precision, and return its output in that of the input.

    Parameters and states stay in their own precision, in which gradients and new states arrive too; they are cast for
    the call. Running statistics lose digits in a low precision: keep a `BatchNorm` out of it where that matters.

    Args:
        dtype: The floating point dtype of the call.
        layer: A layer or a plain function.

    Parameters:
        Those of the layer, not nested.

    States:
        Likewise.

    Shape:
        What the layer takes to what it returns. Only floating point tensors are cast.

    Raises:
        InputError: If the dtype is not a floating point one.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.AlternatePrecision(torch.bfloat16, lambda x: x + 0.001)
        >>> y, st = model(torch.ones(2), {}, {})
        >>> y
        tensor([1., 1.])

    Source: Lux's `AlternatePrecision`, which leaves it to Julia's promotion what becomes of the parameters.
    """

    dtype: torch.dtype
    layer: Layer

    def __post_init__(self) -> None:
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise InputError(
                "AlternatePrecision takes a precision first.",
                expected="a floating point dtype, such as torch.bfloat16",
                got=f"{self.dtype!r:.80}",
            )
        self._set(layer=as_layer(self.layer))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output in the input's precision, and the states in theirs."""
        own = next((leaf.dtype for leaf in tree_leaves(x) if _is_real(leaf)), None)
        low_x, low_ps, low_st = (_all_cast(tree, self.dtype) for tree in (x, ps, st))
        y, new = self.layer(low_x, low_ps, low_st)
        # What the layer has left alone, such as frozen parameters, keeps its digits.
        new = tree_map(lambda leaf, low, old: old if leaf is low else _cast(leaf, old.dtype), new, low_st, st)
        return (y if own is None else _all_cast(y, own)), new

    def extra_repr(self) -> str:
        """Return for instance `torch.bfloat16`."""
        return show_value(self.dtype)


def _copies(make: Any, number: int) -> tuple[Layer, ...]:
    if isinstance(make, Layer) or not callable(make):
        raise InputError(
            "Before a number comes a function that makes a layer.",
            expected="Maxout(lambda: Dense(10, 5), 4)",
            got=f"Maxout({make!r:.80}, {number})",
        )
    return (as_layer(make()),) * number


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if _is_real(leaf) else leaf


def _all_cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: _cast(leaf, dtype), tree)
