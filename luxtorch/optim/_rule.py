"""What every optimization rule of luxtorch is: a value, and one of torchopt's gradient transformations."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torchopt.base import ChainedGradientTransformation, GradientTransformation
from typing_extensions import Self, dataclass_transform

from ._hyperparameters import check
from ._schedule import scale_of, schedule_of


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Rule(GradientTransformation):
    """Be a rule: an immutable description of how gradients become updates.

    A subclass becomes a frozen dataclass: two rules with equal fields are equal. A field whose default is a float
    or a tuple of floats is a hyperparameter: when a state is set up its value moves there as a tensor, where it can
    be adjusted, differentiated and batched. In place of a float it may be a schedule: one of this package, or any
    function of the number of steps taken, such as torchopt's. A field of any other kind, such as a flag or a count,
    is part of the structure: a compiled step is compiled anew for each value.

    Subclasses define `init` and `update`, as torchopt asks. Most rules treat one parameter at a time: write those
    as a `LeafwiseRule`.
    """

    hyperparameters: ClassVar[dict[str, tuple[int, ...]]] = {}
    """The names of the hyperparameters, and the shapes of their tensors."""

    # Without fields a rule is no namedtuple to the tree libraries, which would take it apart into two functions.
    _fields = None  # type: ignore[assignment]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True)(cls)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        cls.hyperparameters = {
            name: (len(default),) if isinstance(default, tuple) else ()
            for name, default in defaults.items()
            if isinstance(default, (float, tuple))
        }
        torch.serialization.add_safe_globals([cls])  # torch.load(weights_only=True) may make one

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return tuple.__new__(cls, ())

    def __post_init__(self) -> None:
        for name, shape in self.hyperparameters.items():
            value = getattr(self, name)
            if value is not None:  # it is in a state, see structure_of
                check(name, value if shape else scale_of(value), shape)
            if isinstance(value, list):  # a rule is hashable
                object.__setattr__(self, name, tuple(value))

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple would compare its items

    # torchopt unpacks a transformation as the pair (init, update).
    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    def __len__(self) -> int:
        return 2

    def bare(self) -> Self:
        """Return the rule without what its state holds, see `structure_of`."""
        bare = copy.copy(self)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in self.hyperparameters:
                value = schedule_of(value)
            elif type(value) is tuple:  # a rule is one, too
                value = tuple(map(structure_of, value))
            else:
                value = structure_of(value)
            object.__setattr__(bare, field.name, value)
        return bare

    def __reduce__(self) -> tuple[Any, ...]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return _make, (type(self), {field.name: getattr(self, field.name) for field in fields})


def _make(cls: type[Rule], fields: dict[str, Any]) -> Rule:
    return cls(**fields)


torch.serialization.add_safe_globals([_make])


def structure_of(rule: GradientTransformation) -> GradientTransformation:
    """Return a rule without the values of its hyperparameters.

    This is the part of a rule that is static in a state: the values live there as tensors, so that rules
    which differ only in them share one structure, hence one compiled graph. A schedule stays.
    """
    if isinstance(rule, ChainedGradientTransformation):
        return ChainedGradientTransformation(*map(structure_of, rule.transformations))
    if not isinstance(rule, Rule):
        return rule
    return rule.bare()
