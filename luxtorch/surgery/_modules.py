"""Modules of torch.nn inside a layer that `lt.from_torch` has made, watched while the layer is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from luxtorch.core import Layer

Look: TypeAlias = Callable[[str, nn.Module, Any], Any]
"""A function of a module's name, the module, and the arguments that go in or what comes out; returns what to replace it
by."""


def holds_modules(layer: Layer) -> bool:
    """Tell whether a layer is made of modules of torch.nn: this folder does not know those who make it."""
    return hasattr(type(layer), "tapped")


@contextmanager
def watched_modules(before: Look, after: Look) -> Iterator[None]:
    """Call functions before and after each module inside the first one that this thread calls.

    Args:
        before: Gets the positional arguments, as a tuple.
        after: Gets what the module returns.
    """
    names: dict[int, str] = {}
    thread = get_ident()

    def enter(module: nn.Module, args: Any) -> Any:
        if get_ident() != thread:
            return None
        if not names:
            names.update({id(part): name for name, part in module.named_modules()})
        name = names.get(id(module))
        return before(name, module, args) if name else None

    def leave(module: nn.Module, args: Any, y: Any) -> Any:
        name = names.get(id(module)) if get_ident() == thread else None
        return after(name, module, y) if name else None

    # Of the modules, copies are called that belong to nobody: hooks of their own would have to be put on each.
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
