"""What all of surgery shares: a wrapper that makes its layer's parameters at each call, and a walk over layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import (
    InputError,
    Layer,
    LuxtorchError,
    Parameters,
    States,
    WrapperLayer,
    described,
    flatten_names,
    nested_dicts,
    wrong_shape,
)
from luxtorch.core._call_errors import wrong_names
from luxtorch.core._paths import Path, replace_children, select_any
from luxtorch.core._tree import META_KEY
from luxtorch.layers._perturbed import Tap

from ._partition import join

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


def opened(call: str, layer: Any, ps: Any, st: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trees of a layer as dicts of their own, after a look at their names.

    Args:
        call: How the function that they came to is called, for the errors.
        layer: The layer.
        ps: Its parameters.
        st: Its states.

    Raises:
        InputError: If the layer is not one, or a tree is not one.
        KeyNameError: If the names of a tree are not those of the layer.
    """
    if not isinstance(layer, Layer):
        raise InputError("layer must be a layer.", got=described(layer), fix=f"The order is {call}.")
    error = misfit(layer, ps, st)
    if error is not None:
        error.fix = f"{error.fix} The order is {call}."
        with placed(""):
            raise error
    return nested_dicts(ps), nested_dicts(st)


@contextmanager
def placed(path: str) -> Iterator[None]:
    """Give errors that name no place this one."""
    try:
        yield
    except LuxtorchError as error:
        error.where = error.where or ".".join(filter(None, ("model", path, *error.inside)))
        raise


def names_of(layer: Layer) -> list[str]:
    """Return the dotted names of a layer's parameters."""
    return list(flatten_names(layer.initial_parameters(META_KEY)))


def matrices(paths: Sequence[Path], like: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those parameters with at least two dimensions that any of some paths stands for.

    Raises:
        KeyNameError: If a path stands for no parameter.
        InputError: If there is none.
    """
    chosen = select_any(paths, list(like))
    names = [name for name in chosen if like[name].ndim >= 2]
    if not names:
        raise InputError(
            "None of the parameters is a matrix.",
            expected="at least one parameter with two dimensions or more",
            got=", ".join(f"'{name}' of shape {tuple(like[name].shape)}" for name in chosen[:8]) or "no parameters",
        )
    return names


def require_shapes(layer: Layer, ps: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise an error if one of some parameters has not the shape that it has in its layer."""
    values, like = flatten_names(ps), flatten_names(layer.initial_parameters(META_KEY))
    for name in names:
        if values[name].shape != like[name].shape:
            fix = "Of an Ensemble, change the member; for a batch of models, call torch.vmap."
            raise wrong_shape(f"The parameter '{name}'", values[name], tuple(like[name].shape), fix=fix)


def misfit(layer: Layer, ps: Any, st: Any) -> LuxtorchError | None:
    """Explain trees whose names, or groups, are not those of a layer, if that is so."""
    error = misnamed(ps, layer.initial_parameters(META_KEY), "parameter")
    return error or misnamed(st, layer.initial_states(META_KEY), "state")


def misnamed(tree: Any, wanted: Any, what: str, inside: tuple[str, ...] = ()) -> LuxtorchError | None:
    """Explain a tree whose names, or groups, are not those of another, if that is so.

    Args:
        tree: The tree.
        wanted: The other one.
        what: What it is made of, "parameter" or "state".
        inside: The names that lead to the tree.
    """
    error: LuxtorchError | None = None
    if isinstance(tree, Mapping) != isinstance(wanted, Mapping):
        error = InputError(
            f"A {what} and a group of {what}s are mixed up." if inside else f"These are not {what}s.",
            expected=f"a group of {what}s by name" if isinstance(wanted, Mapping) else f"a {what}",
            got=described(tree),
            fix=_FIX,
        )
    elif isinstance(wanted, Mapping):
        error = wrong_names(tree, frozenset(wanted), what, _FIX)
        below = (misnamed(tree[name], wanted[name], what, (*inside, name)) for name in wanted if error is None)
        found = next(filter(None, below), None)
        if found is not None:
            return found
    if error is not None:
        error.inside = inside
    return error


_FIX = "Use the trees that lt.setup, or the function that made the layer, returned."
