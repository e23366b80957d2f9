"""The state of a rule: its hyperparameters and its slots, such as Adam's running averages, of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import KeyNameError
from luxtorch.core._tree import register_names

from ._hyperparameters import Shapes, unpack

Slots: TypeAlias = dict[str, Tensor]
"""What a rule remembers of one parameter."""


ALL = "(all)"
"""The name in the state for what is remembered of all parameters together."""

COUNTS = ("step", "mu_product", "count", "weight_sum")
"""The slots that hold one number for the whole parameter."""


Hyper: TypeAlias = "Tensor | dict[str, Tensor]"
"""The hyperparameters in a state: one vector for all parameters, or one for each by its name."""


class RuleState(NamedTuple):
    """Hold the state of one rule.

    Attributes:
        hyper: The hyperparameters, in the order of the rule's fields: a vector, or one by parameter. Of one that
            follows a schedule, the factor of the schedule.
        leaves: What the rule remembers of each parameter, by the parameter's dotted name.
        steps: How many steps were taken, where something depends on it, such as a schedule; otherwise empty.
    """

    hyper: Hyper
    leaves: dict[str, Slots]
    steps: Tensor | tuple[()] = ()

    def after(self, leaves: dict[str, Slots]) -> RuleState:
        """Return the state after a step."""
        return RuleState(self.hyper, leaves, self.steps + 1 if isinstance(self.steps, Tensor) else ())

    def own_numbers(self, dtype: torch.dtype) -> list[Tensor]:
        """Return what stays as it is where a tree is cast: hyperparameters and counts, which would be spoilt.

        What there is of each element of a parameter, such as an average, gets the dtype of the parameters, as in
        torch.optim; but not float16, which has no room for squares of gradients.
        """
        hyper = self.hyper.values() if isinstance(self.hyper, dict) else [self.hyper]
        slots = [
            value
            for leaf in self.leaves.values()
            for name, value in leaf.items()
            if name in COUNTS or value.ndim == 0 or dtype == torch.float16
        ]
        return [*hyper, *slots, *([self.steps] if isinstance(self.steps, Tensor) else [])]


register_names(RuleState)
torch.serialization.add_safe_globals([RuleState])


def map_hyper(change: Callable[[Tensor], Tensor], hyper: Hyper, chosen: set[str] | None = None) -> Hyper:
    """Return hyperparameters with all vectors changed, or those of the chosen parameters.

    There is one new vector for each old one: parameters that share one, and so a call of a kernel, still do.
    """
    if isinstance(hyper, Tensor):
        return change(hyper)
    # No table by `id`: torch.compile would take the tensors' addresses for constants.
    pairs: list[tuple[Tensor, Tensor]] = []
    changed = dict(hyper)
    for leaf, old in hyper.items():
        if chosen is None or leaf in chosen:
            new = next((new for known, new in pairs if known is old), None)
            if new is None:
                new = change(old)
                pairs.append((old, new))
            changed[leaf] = new
    return changed


def groups(
    hyper: Hyper, names: Sequence[str], params: Sequence[Tensor], places: Iterable[int]
) -> list[tuple[Tensor, list[int]]]:
    """Part the places of parameters by the vector of hyperparameters that they share, and by their device."""
    found: list[tuple[Tensor, torch.device, list[int]]] = []
    for i in places:
        vector, device = hyper if isinstance(hyper, Tensor) else hyper[names[i]], params[i].device
        # No table by `id`: see `map_hyper`.
        group = next((group for known, there, group in found if known is vector and there == device), None)
        if group is None:
            found.append((vector, device, group := []))
        group.append(i)
    return [(vector, group) for vector, _, group in found]


def beside(p: Tensor, vector: Tensor) -> Tensor:
    """Return a vector of hyperparameters on the device of a parameter.

    Inductor would read a number on the CPU out of a vector there from within a kernel of a GPU, and fail.
    """
    return vector.to(p.device, non_blocking=True)


def by_leaf(
    hyper: Hyper, shapes: Shapes, leaves: Mapping[str, Tensor], more: Callable[[Slots], Mapping[str, Tensor]] = dict
) -> dict[str, dict[str, Tensor]]:
    """Return the hyperparameters of each leaf by their names, on the leaf's device, and what a function makes of them.

    What leaves share is made once.
    """
    names, params = list(leaves), list(leaves.values())
    found: dict[str, dict[str, Tensor]] = {}
    for vector, places in groups(hyper, names, params, range(len(names))):
        h = unpack(beside(params[places[0]], vector), shapes)
        found.update(dict.fromkeys([names[i] for i in places], {**h, **more(h)}))
    return found


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Raise unless the names of the parameters are those that a state knows."""
    if list(names) != list(known) and sorted(names) != sorted(known):
        missing = [name for name in known if name not in names]
        extra = [name for name in names if name not in known]
        raise KeyNameError(
            "The optimizer state belongs to other parameters.",
            expected=f"also {', '.join(missing)}" if missing else "no others than those of the state",
            got=", ".join(extra) or "none of these",
            fix="Set up the state with these parameters.",
        )
