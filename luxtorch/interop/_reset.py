"""Initial parameters and states of a converted module: `reset_parameters` of its submodules, with a key."""

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
    from ._skeleton import Skeleton, WorkingCopy
    from ._submodule import Submodule

Place: TypeAlias = tuple[tuple[str, ...], str]
"""The path of the submodule that holds a tensor, and the tensor's name."""

_METHODS = ("reset_parameters", "_reset_parameters")


def reset(skeleton: Skeleton, key: Tensor, *, warn: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and states as the modules' own `reset_parameters` make them.

    Tensors that none of these initializes keep the values of the module that was converted.

    Args:
        skeleton: The module.
        key: The key to draw from.
        warn: Whether to warn about random values that no key decides.
    """
    root = skeleton.root
    if key.is_meta:  # only names and shapes are wanted
        return root.tree("parameters"), root.tree("states")
    _check_kept(skeleton, warn)

    def start(part: Submodule, name: str) -> Tensor:
        like = part.like(name)
        # Made from the key, it is batched where the key is, so that batched draws can be written into it.
        value = key.new_zeros(like.shape, dtype=like.dtype)
        kept = skeleton.kept.get((part.path, name))
        return value if kept is None else value.copy_(kept)

    copy = skeleton.acquire()
    try:
        copy.swap_in(root.tree("parameters", start), root.tree("states", start))
        _run(copy.root, key)
        ps, st = (
            copy.root.tree(kind, lambda part, name: part.value(name).detach()) for kind in ("parameters", "states")
        )
        return ps, st
    finally:
        skeleton.release(copy)


def _check_kept(skeleton: Skeleton, warn: bool) -> None:
    """Raise or warn about tensors that no `reset_parameters` initializes."""
    lost = [path_of(place) for place, value in skeleton.kept.items() if value.is_meta]
    if lost:
        headline = f"Tensors on the meta device must be initialized by a `reset_parameters`: {_listed(lost)}."
        raise InputError(headline, fix="Load them: lt.load_weights(source, ps, st) with the trees of from_torch.")
    drawn = [path_of(place) for place in skeleton.kept if place in skeleton.drawn]
    if drawn and watched():
        headline = f"Inside of lt.jit, all tensors must be initialized by a `reset_parameters`: {_listed(drawn)}."
        raise InputError(headline, fix="Call lt.setup outside of lt.jit.")
    if drawn and warn:
        warnings.warn(
            f"No `reset_parameters` initializes {_listed(drawn)}: every setup returns the values of the module.",
            stacklevel=4,
        )


def path_of(place: Place) -> str:
    """Return the dotted name of a place."""
    return ".".join((*place[0], place[1]))


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def not_reset(module: Submodule, trial: WorkingCopy) -> tuple[dict[Place, Tensor], bool]:
    """Return copies of a module's tensors that its `reset_parameters` does not initialize, and whether that is certain.

    Args:
        module: The module.
        trial: A copy of it, in which `reset_parameters` runs on the meta device.
    """
    given: dict[Place, tuple[Tensor, int]] = {}

    def start(part: Submodule, name: str) -> Tensor:
        value = torch.empty_like(part.like(name))
        given[part.path, name] = value, version_of(value)
        return value

    trial.swap_in(trial.root.tree("parameters", start), trial.root.tree("states", start))
    for part in trial.root:  # states are swapped in as copies
        for name in part.states:
            given[part.path, name] = (value := part.value(name)), version_of(value)
    certain = True
    try:
        _run(trial.root, key(0, device="meta"))
    except (
        Exception
    ):  # code that reads values fails on the meta device: its tensors are kept, and initialized all the same
        certain = False
    kept = {
        (source.path, name): source.like(name).detach().clone()
        for source, part in zip(module, trial.root, strict=True)
        for name in part.names
        if part.value(name) is given[part.path, name][0] and version_of(part.value(name)) == given[part.path, name][1]
    }
    trial.swap_out()
    return kept, certain


def _run(root: Submodule, key: Tensor) -> None:
    """Call the `reset_parameters` of each submodule, children first, as constructors do."""
    with torch.no_grad():
        for part in reversed(list(root)):
            for name in _METHODS:
                method = getattr(part.module, name, None)
                if callable(method):
                    with PureMode(Keys(fold_in(key, ".".join((*part.path, name))))):
                        method()
