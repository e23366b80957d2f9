"""`Inputs` passed to layers that take one input, such as `Dense`: the single argument is unwrapped."""

from __future__ import annotations

import inspect
from typing import Any

from luxtorch._torch import compile_constant
from luxtorch.core import Layer
from luxtorch.layers import Chain, WrappedFunction

from ._inputs import Inputs, bound
from ._module_layer import ModuleLayer
from ._native import ARGUMENTS


def single(layer: Layer, given: Inputs) -> Any:
    """Return the only argument, if `from_torch` makes the layer of a module with one input.

    For any other layer, return the arguments unchanged.

    Raises:
        InputError: If torch's module would not take them.
    """
    if type(layer) is not Chain:
        name = _argument(layer)
        return given if name is None else bound(given, name)[0]
    # A chain passes arguments on, but nn.Sequential takes an `input` and passes it on by position.
    if given.args or given.kwargs.keys() != {"input"} or _takes_input(_first(layer)):
        return given
    return given.kwargs["input"]


@compile_constant  # torch.compile cannot trace code that reads signatures
def _argument(layer: Layer) -> str | None:
    if isinstance(layer, WrappedFunction):  # a user's own function may take several
        home = getattr(layer.function, "__module__", None) or "torch"
        return "input" if home.partition(".")[0] in ("luxtorch", "torch") else None
    return ARGUMENTS.get(type(layer))


def _first(layer: Layer) -> Layer:
    """Return the innermost layer that gets a chain's input."""
    while (inside := layer.layers[0] if isinstance(layer, Chain) else layer.children().get("")) is not None:
        layer = inside
    return layer


@compile_constant
def _takes_input(layer: Layer) -> bool:
    """Return whether a layer itself takes an argument called `input`."""
    if isinstance(layer, ModuleLayer):
        return "input" in inspect.signature(layer.skeleton.root.module.forward).parameters
    return _argument(layer) is None
