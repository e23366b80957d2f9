"""Trees of parameters taken apart by name and put together again, and what is wrong with the names of one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.core import InputError, Layer, LuxtorchError, flatten_names, nested_dicts
from luxtorch.core._locate import wrong_names
from luxtorch.core._nowhere import NOWHERE
from luxtorch.core._paths import Path, select_any


def opened(call: str, layer: Any, ps: Any, st: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trees of a layer as dicts of their own, after a look at their names.

    Args:
        call: How the function that they came to is called, for the errors.
        layer: The layer.
        ps: Its parameters.
        st: Its states.

    Raises:
        InputError: If the layer is none, or a tree is none.
        KeyNameError: If the names of a tree are not those of the layer.
    """
    if not isinstance(layer, Layer):
        raise InputError(
            f"{call.partition('(')[0]} takes a layer with its parameters and states.",
            expected=call,
            got=f"{layer!r:.80} of type {type(layer).__name__}",
        )
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


def closed(tree: Mapping[str, Any], like: Any) -> Any:
    """Return a tree as a ComponentVector, if `like` is one."""
    return ComponentVector(tree, batch_dims=like.flat.dim() - 1) if isinstance(like, ComponentVector) else tree


def names_of(layer: Layer) -> list[str]:
    """Return the dotted names of a layer's parameters."""
    return list(flatten_names(layer.initial_parameters(NOWHERE)))


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
    values, like = flatten_names(ps), flatten_names(layer.initial_parameters(NOWHERE))
    for name in names:
        if values[name].shape != like[name].shape:
            raise InputError(
                f"The parameter '{name}' does not have the layer's shape.",
                expected=str(tuple(like[name].shape)),
                got=str(tuple(values[name].shape)),
                fix="Of an Ensemble, change the member; for a batch of models, call torch.vmap.",
            )


def join(path: str, name: str) -> str:
    """Return the path of what has a name below a path."""
    return f"{path}.{name}" if path and name else path or name


def taken(tree: Mapping[str, Any], names: Collection[str], path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what has none of some dotted names, and what has one; each with every group."""
    rest: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for name, entry in tree.items():
        place = join(path, name)
        if isinstance(entry, Mapping):
            rest[name], chosen[name] = taken(entry, names, place)
        else:
            (chosen if place in names else rest)[name] = entry
    return rest, chosen


def pruned(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree without empty groups."""
    entries = {name: pruned(entry) if isinstance(entry, Mapping) else entry for name, entry in tree.items()}
    return {name: entry for name, entry in entries.items() if not isinstance(entry, Mapping) or entry}


def merged(tree: Mapping[str, Any], more: Mapping[str, Any], *, new_groups: bool = False) -> dict[str, Any]:
    """Return all that stands in two trees.

    Args:
        tree: The first.
        more: The other.
        new_groups: Whether there may be groups in the other that the first does not have.

    Raises:
        KeyError: If something stands in both, or a group is missing; with its dotted name.
    """
    whole = dict(tree)
    for name, entry in more.items():
        if isinstance(entry, Mapping) and isinstance(whole.get(name), Mapping):
            try:
                whole[name] = merged(whole[name], entry, new_groups=new_groups)
            except KeyError as error:
                raise KeyError(join(name, error.args[0])) from None
        elif name in whole or (isinstance(entry, Mapping) and not new_groups):
            raise KeyError(name)
        else:
            whole[name] = entry
    return whole


def ordered(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in the order of another, as far as that goes."""
    names = [name for name in like if name in tree] + [name for name in tree if name not in like]
    return {name: _ordered_entry(tree[name], like.get(name)) for name in names}


def _ordered_entry(entry: Any, like: Any) -> Any:
    return ordered(entry, like) if isinstance(entry, Mapping) and isinstance(like, Mapping) else entry


def misfit(layer: Layer, ps: Any, st: Any) -> LuxtorchError | None:
    """Explain trees whose names, or groups, are not those of a layer, if that is so."""
    error = misnamed(ps, layer.initial_parameters(NOWHERE), "parameter")
    return error or misnamed(st, layer.initial_states(NOWHERE), "state")


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
            f"A {what} and a group of {what}s are mixed up." if inside else f"These are no {what}s.",
            expected=f"a group of {what}s by name" if isinstance(wanted, Mapping) else f"a {what}",
            got=f"a {type(tree).__name__}",
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
