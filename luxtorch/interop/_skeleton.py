"""A module without its tensors, which are lent to it for the time of a call."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import InputError

from ._identity import Identity, identity_of
from ._part import Part, tensors_of
from ._pure_modules import make_pure, make_traceable
from ._reset import Place, untouched

RNG = "rng"
"""The name under which the state of a module with random or unknown code keeps its key."""


class Skeleton:
    """Copy a module without its tensors, for calls with tensors from outside.

    Copies are lent out one call at a time, so that calls from several threads do not meet in one.

    Args:
        module: The module, which stays as it is.
        kept: What to take for `kept`; by default, what the module holds.
        identity: What to take for `identity`; by default, made from the module.

    Attributes:
        root: The parts of a copy that nobody calls, for a look.
        random: Whether the module may ask for random numbers.
        writes: Whether it may write into its input: in torch's own modules an option says so, of others nobody knows.
        kept: The tensors that no `reset_parameters` makes anew, by place.
        identity: What tells it from others, besides `kept`.
    """

    def __init__(
        self, module: nn.Module, kept: dict[Place, Tensor] | None = None, identity: Identity | None = None
    ) -> None:
        self.root = _without_tensors(module)
        self.random = any(part.modal for part in self.root)
        self.writes = any(part.written for part in self.root)
        self.kept = untouched(Part(module, (), {}), self._copy()) if kept is None else kept
        self.identity = (
            identity_of(self.root.module, [(part.path, part.names) for part in self.root])
            if identity is None
            else identity
        )
        self._idle: list[Part] = []
        self._traced = self._copy()
        for part in self._traced:
            make_traceable(part.module)

    def borrow(self) -> Part:
        """Return a copy that no other call uses."""
        if torch.compiler.is_compiling():  # which traces a call once, alone
            return self._traced
        try:
            return self._idle.pop()
        except IndexError:
            return self._copy()

    def give_back(self, part: Part) -> None:
        """Take the tensors from a copy, and keep it for the next call."""
        part.clear()
        if not torch.compiler.is_compiling():
            self._idle.append(part)

    def _copy(self) -> Part:
        # Its copies share the placeholders: a first call may be inside a transform or a trace, where none can be made.
        shared = {id(value): value for each in self.root.module.modules() for _, _, value in tensors_of(each)}
        return Part(copy.deepcopy(self.root.module, shared), (), {})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Skeleton) or self.identity != other.identity:
            return False
        return self.kept.keys() == other.kept.keys() and all(
            value is other.kept[place] or torch.equal(value, other.kept[place]) for place, value in self.kept.items()
        )

    def __hash__(self) -> int:
        return hash(self.identity)

    def __deepcopy__(self, memo: Any) -> Skeleton:
        return self  # it does not change

    def __reduce__(self) -> tuple[Any, ...]:
        return Skeleton, (self.root.module, self.kept, self.identity)

    def __repr__(self) -> str:
        return type(self.root.module).__name__


def _without_tensors(module: nn.Module) -> Part:
    placeholders: dict[int, Any] = {}
    for each in module.modules():
        for _, _, value in tensors_of(each):
            like = torch.empty_like(value, device="meta", requires_grad=False)
            parameter = isinstance(value, nn.Parameter)
            placeholders[id(value)] = nn.Parameter(like, requires_grad=False) if parameter else like
    try:
        duplicate = copy.deepcopy(module, placeholders)
    except Exception as error:
        raise InputError(
            f"The module cannot be copied: {error}",
            expected="a module that copy.deepcopy takes",
            got=type(module).__name__,
            fix="Keep open files, generators, locks and tensors with a history out of its attributes.",
        ) from error
    for each in list(duplicate.modules()):
        make_pure(each)
    return Part(duplicate, (), {})
