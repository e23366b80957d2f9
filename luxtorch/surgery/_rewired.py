"""A layer whose parameters are put together anew for each call, and going through the layers of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

import torch

from luxtorch.core import InputError, Layer, Parameters, States, WrapperLayer
from luxtorch.core._replace import replace_children
from luxtorch.layers._perturbed import Tap

from ._trees import join, misfit

Triple: TypeAlias = tuple[Layer, Any, Any]
"""A layer, its parameters and its states."""


class Rewired(WrapperLayer):
    """Hold a layer, and make its trees from others at each call.

    A subclass says how in `plain`, and keeps what it has in the states in `kept`.

    Attributes:
        undone: How to undo what was done to the layer inside.
    """

    layer: Layer

    undone: ClassVar[str]

    @abstractmethod
    def plain(self, ps: Parameters, st: States) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the trees of the layer inside.

        Raises:
            KeyError: If a name is missing, or there are too many.
        """

    def kept(self, new: States, st: States) -> States:
        """Return the new states, from those of the layer inside and those before the call."""
        return new

    def around(self, layer: Layer, ps: dict[str, Any], st: dict[str, Any]) -> Triple:
        """Return the same around another layer, whose trees are given.

        Raises:
            InputError: If that cannot be.
        """
        raise InputError(
            f"A layer inside {type(self).__name__} cannot be changed.",
            expected=f"a model that becomes a {type(self).__name__} after the change",
            got=f"the change of a layer inside a {type(self).__name__}",
            fix=self.undone,
        )

    # What a container, or a reader, asks the layer inside for: its width, or the layers of a chain.
    __getattr__ = Tap.__getattr__

    def bind(self, ps: Parameters, st: States) -> Any:
        """Return the module inside with its values, where the layer inside is one; see `lt.from_torch`."""
        bound = self.layer.bind(*self.plain(ps, st))  # type: ignore[attr-defined]
        bound._kept = lambda new: self.kept(new, st)
        return bound

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output of the layer inside, and the new states."""
        if torch.compiler.is_compiling():
            y, new = self.layer(x, *self.plain(ps, st))
            return y, self.kept(new, st)
        try:
            y, new = self.layer(x, *self.plain(ps, st))
        except KeyError as error:
            # The layer inside saw trees that are nobody's: the names are to be right in those that came.
            wrong = misfit(self, ps, st)
            if wrong is None:
                raise
            raise wrong from error
        return y, self.kept(new, st)


def everywhere(
    change: Callable[[Layer, Any, Any, str], Triple | None], layer: Layer, ps: Any, st: Any, path: str = ""
) -> Triple:
    """Change layers of a model, the outermost first.

    Args:
        change: A function of a layer, its parameters, its states and its path. It returns what is to stand there, or
            None to go on with the layers inside.
        layer: The model.
        ps: Its parameters, nested dicts.
        st: Its states.
        path: The names that lead to the model.

    Returns:
        The changed triple: the very same objects where nothing was changed.
    """
    found = change(layer, ps, st, path)
    if found is not None:
        return found

    def go_on(name: str, layer: Layer, ps: Any, st: Any) -> Triple:
        return everywhere(change, layer, ps, st, join(path, name))

    return _with_children(go_on, layer, ps, st)


def _with_children(change: Callable[[str, Layer, Any, Any], Triple], layer: Layer, ps: Any, st: Any) -> Triple:
    """Change the layers directly inside another one."""
    children = layers_inside(layer)
    if isinstance(layer, Rewired):
        own = layer.plain(ps, st)
        new = change("", layer.layer, *own)
        return (layer, ps, st) if _same(new, (layer.layer, *own)) else layer.around(*new)
    if "" in children:
        child = children[""]
        inner_st = {name: entry for name, entry in st.items() if name in child._names[1]}
        new = change("", child, ps, inner_st)
        if _same(new, (child, ps, inner_st)):
            return layer, ps, st
        # What the wrapper itself has in the states stays.
        own_st = {name: entry for name, entry in st.items() if name not in inner_st}
        return replace_children(layer, {"": new[0]}), new[1], {**new[2], **own_st}
    before = {name: (child, ps[name], st[name]) for name, child in children.items()}
    after = {name: change(name, *triple) for name, triple in before.items()}
    if all(_same(after[name], before[name]) for name in before):
        return layer, ps, st
    layer = replace_children(layer, {name: triple[0] for name, triple in after.items()})
    new_ps, new_st = ({name: triple[i] for name, triple in after.items()} for i in (1, 2))
    return layer, {**ps, **new_ps}, {**st, **new_st}


def layers_inside(layer: Layer) -> Mapping[str, Layer]:
    """Return the layers directly inside another one; none where their parameters have other names than its own."""
    children = layer.children()
    child = children.get("")
    renamed = child is not None and not isinstance(layer, Rewired) and child._names[0] != layer._names[0]
    return {} if renamed else children


def _same(new: Triple, old: Triple) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def layers_of(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield a model and all layers inside with their paths, the outer ones first."""
    yield path, layer
    for name, child in layers_inside(layer).items():
        yield from layers_of(child, join(path, name))
