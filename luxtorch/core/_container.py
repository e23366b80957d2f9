"""Layers made of layers: containers, which nest their children's trees under names, and wrappers, which do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from luxtorch._errors import InputError
from luxtorch.random import fold_in

from ._layer import Layer


class ContainerLayer(Layer):
    """Hold layers in fields; parameters and states are nested under the fields' names.

    Each child's key is folded from its name, so that adding a child leaves the others' initial values as they are.
    A subclass writes `__call__`, and passes each child its own part of `ps` and `st`.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Residual(lt.ContainerLayer):
        ...     inner: lt.Dense
        ...
        ...     def __call__(self, x, ps, st):
        ...         y, st_inner = self.inner(x, ps["inner"], st["inner"])
        ...         return x + y, {"inner": st_inner}
        >>> ps, st = lt.setup(0, Residual(lt.Dense(3, 3)))
        >>> list(ps), list(ps["inner"])
        (['inner'], ['weight', 'bias'])
    """

    def children(self) -> Mapping[str, Layer]:
        """Return the layers held in fields, by the fields' names."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: value for name, value in values if isinstance(value, Layer)}

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the children's initial parameters under their names."""
        children = self.children()
        if "" in children:
            return children[""].initial_parameters(key)
        return {name: child.initial_parameters(fold_in(key, name)) for name, child in children.items()}

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the children's initial states under their names."""
        children = self.children()
        if "" in children:
            return children[""].initial_states(key)
        return {name: child.initial_states(fold_in(key, name)) for name, child in children.items()}

    def extra_repr(self) -> str:
        """Return nothing: the children are shown by themselves."""
        return ""


class WrapperLayer(ContainerLayer):
    """Hold one layer in a field; parameters and states are those of that layer, not nested.

    Calling a wrapper calls the layer inside; a subclass changes what it likes about that.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Doubled(lt.WrapperLayer):
        ...     layer: lt.Layer
        ...
        ...     def __call__(self, x, ps, st):
        ...         y, st = self.layer(x, ps, st)
        ...         return 2 * y, st
        >>> ps, st = lt.setup(0, Doubled(lt.Dense(3, 3)))
        >>> list(ps)
        ['weight', 'bias']
    """

    def children(self) -> Mapping[str, Layer]:
        """Return the layer inside, under the empty name: its trees are the wrapper's own.

        Raises:
            InputError: If the fields hold no layer, or more than one.
        """
        layers = list(super().children().values())
        if len(layers) != 1:
            raise InputError(
                f"{type(self).__name__} is a wrapper.",
                expected="one field that holds a layer",
                got=f"{len(layers)} of them",
                fix="Derive from lt.ContainerLayer to hold several layers.",
            )
        return {"": layers[0]}

    def __call__(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Call the layer inside."""
        return self.children()[""](x, ps, st)
