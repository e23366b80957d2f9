"""Which modules of torch.nn become which layers of luxtorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from luxtorch.core import InputError, Layer

from . import (
    _native_activation,
    _native_conv,
    _native_dense,
    _native_dropout,
    _native_norm,
    _native_pooling,
    _native_shape,
)
from ._part import hooked, tensors_of

CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    **_native_activation.CONVERTERS,
    **_native_conv.CONVERTERS,
    **_native_dense.CONVERTERS,
    **_native_dropout.CONVERTERS,
    **_native_norm.CONVERTERS,
    **_native_pooling.CONVERTERS,
    **_native_shape.CONVERTERS,
}
"""What takes a module of each kind to a layer, or to None where an option has no counterpart."""


def native(module: nn.Module) -> Layer | None:
    """Return the layer that computes what a module does, with tensors of the same names; None if there is none.

    A module of a subclass may compute something else, and so may one with hooks or parametrizations.
    """
    convert = CONVERTERS.get(type(module))
    if convert is None or hooked(module) or module._modules or "forward" in vars(module):
        return None
    try:
        layer = convert(module)
    except InputError:  # options that luxtorch refuses; torch says at the call what is wrong with them
        return None
    return layer if layer is not None and _same_names(module, layer) else None


def _same_names(module: nn.Module, layer: Layer) -> bool:
    """Say whether a module holds the tensors that the layer wants, and no others."""
    ps, st = layer._names
    states = {name for name, store, _ in tensors_of(module) if store is not module._parameters}
    return ps == {name for name, value in module._parameters.items() if value is not None} and states <= st
