"""Selection of parameters and layers by dotted paths, globs and predicates; and copies with other layers there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

from luxtorch._errors import KeyNameError, suggest, unknown_name, wrong_type
from luxtorch._torch import compile_constant

from ._layer import Layer

Name: TypeAlias = "str | Callable[[str], bool]"
"""A selection of dotted names:

- a dotted path such as `"layer_1"`, which selects everything below it;
- a glob such as `"*.bias"` or `"encoder.block_?.norm"`, which selects all dotted paths that it matches, and everything
  below them. It is matched as by `fnmatch.fnmatchcase`: `*` is any number of characters and `?` is one, also dots;
  `[ab]` is one of these and `[!ab]` any other. A path that exists literally selects that alone;
- a predicate on the dotted names.
"""

Path: TypeAlias = "Name | Sequence[Name] | Set[Name] | None"
"""A selection; or a list, tuple or set of these, for their union; or None, for all."""


def select(path: Path, names: Sequence[str], kind: str = "parameter") -> set[str]:
    """Return the names that a path selects.

    Args:
        path: The path.
        names: The dotted names to choose from.
        kind: The kind of things that have these names, for the error.

    Raises:
        KeyNameError: If the path, or one of several, selects none.
        DTypeError: If it is not a path.
    """
    return {name for below in places(path, names, kind).values() for name in below}


def select_any(paths: Sequence[Path], names: Sequence[str], kind: str = "parameter") -> list[str]:
    """Return the names that any of some paths selects, in their order; without paths, all.

    Raises:
        KeyNameError: If a path selects none.
        DTypeError: If one is not a path.
    """
    if not paths:
        return list(names)
    chosen = set[str]().union(*(select(path, names, kind) for path in paths))
    return [name for name in names if name in chosen]


def places(path: Path, names: Sequence[str], kind: str = "parameter", *, below: bool = True) -> Mapping[str, list[str]]:
    """Return the dotted paths that a path matches, each with the names that it selects; see `select`."""
    if path is None:
        return {name: [name] for name in names}
    if isinstance(path, str):
        found = _exact(path, names, below) or _matching(path, names, below)
        problem = f"No {kind} is named '{path}'."
    elif callable(path):
        found = {name: [name] for name in names if path(name)}
        problem = f"The predicate is true of no {kind}."
    elif isinstance(path, Sequence | Set) and not any(one is None for one in path):
        found = {place: each for one in path for place, each in places(one, names, kind, below=below).items()}
        problem = f"An empty list of paths selects no {kind}."
    else:
        expected = "a dotted path, a glob such as '*.bias', a predicate on names, or a list of these"
        raise wrong_type(f"The path of a {kind}", path, expected)
    if found:
        return found
    raise KeyNameError(
        problem,
        expected=", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or f"no {kind}, as there is none",
        fix=_nearest(path, names)
        if isinstance(path, str)
        else "The predicate is called with each dotted name." * callable(path),
    )


def is_glob(path: str) -> bool:
    """Return whether a path has characters with a meaning in globs."""
    return any(character in path for character in "*?[")


def _exact(path: str, names: Sequence[str], below: bool) -> dict[str, list[str]]:
    found = [name for name in names if name == path or (below and name.startswith(f"{path}."))]
    return {path: found} if found else {}


def _matching(glob: str, names: Sequence[str], below: bool) -> dict[str, list[str]]:
    """Return the paths that a glob matches, without those below another match."""
    found: dict[str, list[str]] = {}
    for name in names if is_glob(glob) else ():
        paths = _prefixes(name) if below else [name]
        place = next((path for path in paths if _fits(path, glob)), None)
        if place is not None:
            found.setdefault(place, []).append(name)
    return found


@compile_constant  # torch.compile cannot trace regular expressions
def _fits(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob)


def _prefixes(name: str) -> list[str]:
    """Return the prefixes of a dotted name, the shortest first, with the name itself."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _nearest(path: str, names: Sequence[str]) -> str:
    """Suggest a path that selects something."""
    if is_glob(path):  # correct each word between the dots
        words = {word for name in names for word in name.split(".")}
        near = (word if is_glob(word) else "".join(get_close_matches(word, words, 1)) for word in path.split("."))
        mended = ".".join(near)
        if _matching(mended, names, True):
            return f"Did you mean '{mended}'?"
    return suggest(path, dict.fromkeys(prefix for name in names for prefix in _prefixes(name)))


L = TypeVar("L", bound=Layer)


def replace_children(layer: L, children: Mapping[str, Layer]) -> L:
    """Return a copy of a container with some of its layers replaced.

    The constructor is not called again, so its checks are not repeated.

    Args:
        layer: A container or wrapper.
        children: The new layers, by their names in `layer.children()`.

    Raises:
        KeyNameError: If the container has no layer of a name.

    Example:
        >>> import torch, luxtorch as lt
        >>> replace_children(lt.Chain(lt.Dense(2, 2), lt.Dense(2, 2)), {"layer_2": lt.Dropout(0.1)})
        Chain(
            layer_1 = Dense(2 -> 2),    # 6 parameters: weight (2, 2), bias (2,)
            layer_2 = Dropout(0.1),     # 2 states
        )                               # total: 6 parameters, 2 states
    """
    old = layer.children()
    for name in children:
        if name not in old:
            raise unknown_name(name, old, "layer", where=type(layer).__name__)
    # Equal layers are often one object. In a copy of the container without such sharing, each has one name.
    origins: dict[int, Layer] = {}

    def unshared(child: Layer) -> Layer:
        copied = _with_layers(child, lambda inner: inner)
        origins[id(copied)] = child
        return copied

    copy = _with_layers(layer, unshared)
    named = {id(child): name for name, child in copy.children().items() if id(child) in origins}
    # A field that is not in children() may hold the same layer as one that is.
    followed = {id(origins[child]): name for child, name in named.items()}
    wanted = {**old, **children}

    def placed(child: Layer) -> Layer:
        origin = origins[id(child)]
        name = named.get(id(child), followed.get(id(origin)))
        return origin if name is None else wanted[name]

    return _with_layers(copy, placed)


def _with_layers(layer: L, change: Callable[[Layer], Layer]) -> L:
    """Return a copy of a layer with a function applied to the layers in its fields."""
    cls = type(layer)
    values = {
        name: _mapped(change, value)
        for name, value in vars(layer).items()
        if not isinstance(getattr(cls, name, None), cached_property)  # these are computed from the layers
    }
    new = cls.__new__(cls)
    new._set(**values)
    return new


def _mapped(change: Callable[[Layer], Layer], value: Any) -> Any:
    if isinstance(value, Layer):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([_mapped(change, item) for item in value])
    if type(value) is dict:
        return {name: _mapped(change, item) for name, item in value.items()}
    return value
