"""Arguments of torch's modules that come to layers of luxtorch, which take one input."""

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
    """Return the input that some arguments are, if a layer is what `from_torch` makes of a module with one input.

    For any other layer, return the arguments as they came.

    Raises:
        InputError: If torch's module would not take them.
    """
    if type(layer) is not Chain:
        name = _argument(layer)
        return given if name is None else bound(given, name)[0]
    # A chain passes arguments on, but torch's takes an `input` that it passes on without that name.
    if given.args or given.kwargs.keys() != {"input"} or _takes_input(_first(layer)):
        return given
    return given.kwargs["input"]


@compile_constant  # which cannot trace what reads modules and signatures
def _argument(layer: Layer) -> str | None:
    if isinstance(layer, WrappedFunction):  # one of a user's own may take arguments
        home = getattr(layer.function, "__module__", None) or "torch"
        return "input" if home.partition(".")[0] in ("luxtorch", "torch") else None
    return ARGUMENTS.get(type(layer))


def _first(layer: Layer) -> Layer:
    """Return the first layer inside that a chain's input goes to."""
    while (inside := layer.layers[0] if isinstance(layer, Chain) else layer.children().get("")) is not None:
        layer = inside
    return layer


@compile_constant
def _takes_input(layer: Layer) -> bool:
    """Tell whether a layer takes an argument that is called `input` itself."""
    if isinstance(layer, ModuleLayer):
        return "input" in inspect.signature(layer.skeleton.root.module.forward).parameters
    return _argument(layer) is None
