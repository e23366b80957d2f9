"""Hooks around layers: a model whose layers, and modules of torch.nn inside, are called through a watcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from luxtorch.core import Layer, Parameters, States, WrapperLayer
from luxtorch.core._paths import replace_children
from luxtorch.layers import Cell, Perturbed
from luxtorch.layers._perturbed import HOLDERS, Tap

Path: TypeAlias = tuple[str, ...]
"""Names that lead to a layer; an empty one stands for the layer inside a wrapper, whose trees are not nested."""

Call: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""A function of an input, parameters and states that returns an output and states."""


class Watcher(Protocol):
    """Call a layer on behalf of a `Watched` one, and look at what goes in and comes out."""

    def __call__(self, call: Call, layer: Layer, path: Path, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Return what `call(x, ps, st)` does, the layer's own call."""


class Watched(WrapperLayer):
    """Call a layer through a watcher."""

    layer: Layer
    path: Path
    watcher: Watcher

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the layer does."""
        return self.watcher(self.layer, self.layer, self.path, x, ps, st)

    # What a container asks its layer for besides its output, such as its width.
    __getattr__ = Tap.__getattr__


class WatchedCell(Watched, Cell):
    """Call a cell through a watcher; a whole sequence counts as one call, and so does a step."""

    layer: Cell

    def initial_carry(self, x: Tensor, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return that of the cell."""
        return self.layer.initial_carry(x, ps, st)

    def step(self, x: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return that of the cell."""

        def call(x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
            return self.layer.step(x[0], x[1], ps, st)

        return self.watcher(call, self.layer, self.path, (x, carry), ps, st)

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return that of the cell."""

        def call(x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
            return self.layer.scan(x[0], x[1], ps, st)

        return self.watcher(call, self.layer, self.path, (xs, carry), ps, st)

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return that of the cell."""

        def call(x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
            return self.layer.scan_lengths(x[0], x[2], x[1], ps, st)

        return self.watcher(call, self.layer, self.path, (xs, carry, lengths), ps, st)


def watched(model: Layer, watcher: Watcher, path: Path = ()) -> Layer:
    """Return a model whose layers, all the way down, are called through a watcher; its trees are the same."""
    # Inside a perturbed model, what layers return in their states is not what the layers around them see.
    children = {} if isinstance(model, Perturbed) else model.children()
    below = {name: watched(child, watcher, (*path, name)) for name, child in children.items()}
    inside = replace_children(model, below) if below else model
    inside.__dict__["_names"] = names = model._names  # which equal layers have worked out once
    if isinstance(model, HOLDERS):
        return inside
    found = WatchedCell(inside, path, watcher) if isinstance(inside, Cell) else Watched(inside, path, watcher)
    found.__dict__["_names"] = names
    return found


def describe(layer: Layer) -> str:
    """Return a layer on one line, without the layers inside: `Dense 10 -> 5`."""
    return f"{type(layer).__name__} {layer.extra_repr()}".strip()


def map_own(function: Callable[[str, Any], Any], layer: Layer, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tree with a function of name and leaf applied to what does not belong to the layers inside."""
    children = layer.children()
    if "" in children:
        return tree
    return _mapped(function, children, tree, "")


def _mapped(
    function: Callable[[str, Any], Any], children: Mapping[str, Layer], tree: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, entry in tree.items():
        child = children.get(name)
        if isinstance(child, HOLDERS) or (child is None and isinstance(entry, Mapping)):
            inside = child.children() if child is not None else {}
            new[name] = _mapped(function, inside, entry, f"{prefix}{name}.")
        else:
            new[name] = function(f"{prefix}{name}", entry) if child is None else entry
    return new


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
