"""New initial values for a module, drawn from a key."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import version_of
from luxtorch._transforms import watched
from luxtorch.core import InputError
from luxtorch.random import fold_in, key

from .pure._keys import Keys
from .pure._mode import PureMode

if TYPE_CHECKING:
    from ._part import Part
    from ._skeleton import Body, Skeleton

Place: TypeAlias = tuple[tuple[str, ...], str]
"""Where a tensor stands: the names that lead to the module, and its own."""

_METHODS = ("reset_parameters", "_reset_parameters")


def reset(skeleton: Skeleton, key: Tensor, *, warn: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and states as the modules' own `reset_parameters` make them.

    What none of these makes is what it was in the module that the layer was made from.

    Args:
        skeleton: The module.
        key: The key to draw from.
        warn: Whether to say what no key decides.
    """
    root = skeleton.root
    if key.is_meta:  # names and shapes are asked for
        return root.tree("parameters"), root.tree("states")
    _check_kept(skeleton, warn)

    def start(part: Part, name: str) -> Tensor:
        like = part.like(name)
        # Made from the key, it is a batch where the key is one: what is drawn can be written into it.
        value = key.new_zeros(like.shape, dtype=like.dtype)
        kept = skeleton.kept.get((part.path, name))
        return value if kept is None else value.copy_(kept)

    body = skeleton.borrow()
    try:
        body.lend(root.tree("parameters", start), root.tree("states", start))
        _run(body.root, key)
        ps, st = (
            body.root.tree(kind, lambda part, name: part.value(name).detach()) for kind in ("parameters", "states")
        )
        return ps, st
    finally:
        skeleton.give_back(body)


def _check_kept(skeleton: Skeleton, warn: bool) -> None:
    """Say what no key decides."""
    lost = [path_of(place) for place, value in skeleton.kept.items() if value.is_meta]
    if lost:
        raise InputError(
            f"The module was made on the meta device, and no `reset_parameters` makes its {_listed(lost)}.",
            expected="a module whose tensors have values, or make them",
            fix="Load them: lt.load_weights(source, ps, st) with the trees of from_torch.",
        )
    drawn = [path_of(place) for place in skeleton.kept if place in skeleton.drawn]
    if drawn and watched():
        raise InputError(
            f"No `reset_parameters` makes {_listed(drawn)}, whose values a program would keep for all equal modules.",
            fix="Call lt.setup outside of lt.jit.",
        )
    if drawn and warn:
        warnings.warn(
            f"No `reset_parameters` makes {_listed(drawn)}: every setup gives them the values that the module had.",
            stacklevel=4,
        )


def path_of(place: Place) -> str:
    """Return the dotted name of a place."""
    return ".".join((*place[0], place[1]))


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def untouched(module: Part, trial: Body) -> tuple[dict[Place, Tensor], bool]:
    """Return copies of a module's tensors that its `reset_parameters` leave alone, and whether all of these do.

    Args:
        module: The module.
        trial: A copy of it, in which they are run on the meta device.
    """
    lent: dict[Place, tuple[Tensor, int]] = {}

    def start(part: Part, name: str) -> Tensor:
        value = torch.empty_like(part.like(name))
        lent[part.path, name] = value, version_of(value)
        return value

    trial.lend(trial.root.tree("parameters", start), trial.root.tree("states", start))
    for part in trial.root:  # states are lent as copies
        for name in part.states:
            lent[part.path, name] = (value := part.value(name)), version_of(value)
    certain = True
    try:
        _run(trial.root, key(0, device="meta"))
    except Exception:  # code that looks at values cannot do so here: what it makes is kept, then made anew
        certain = False
    kept = {
        (source.path, name): source.like(name).detach().clone()
        for source, part in zip(module, trial.root, strict=True)
        for name in part.names
        if part.value(name) is lent[part.path, name][0] and version_of(part.value(name)) == lent[part.path, name][1]
    }
    trial.clear()
    return kept, certain


def _run(root: Part, key: Tensor) -> None:
    """Let each module draw its tensors, a module after those inside it, as it is when modules are made."""
    with torch.no_grad():
        for part in reversed(list(root)):
            for name in _METHODS:
                method = getattr(part.module, name, None)
                if callable(method):
                    with PureMode(Keys(fold_in(key, ".".join((*part.path, name))))):
                        method()
