"""Rules that treat one parameter at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from luxtorch.core import InputError

from . import _fused
from ._fused import Slots as Slots
from ._in_place import InPlace
from ._leaves import Leaves
from ._list_rule import ListRule, Updates
from ._rule_state import Hyper, by_leaf, check_names
from ._rule_state import RuleState as RuleState


class LeafwiseRule(ListRule):
    """Be a rule that treats each parameter by itself.

    A rule is its hyperparameters, what it remembers of a parameter (`slots`), and its formula (`delta`).

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> class SignDescent(optim.LeafwiseRule):
        ...     lr: float | torch.Tensor = 0.1
        ...
        ...     def delta(self, g, p, slots, h):
        ...         return -h["lr"] * g.sign(), slots
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(SignDescent(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([3.0, -4.0]))
        >>> p
        tensor([-0.5000,  0.5000])
    """

    kernel: ClassVar[_fused.Kernel | None] = None
    """The formula over whole lists of leaves, for eager steps that nothing observes."""

    in_place: ClassVar[InPlace | None] = None
    """The same where the parameters and slots are, for steps whose caller gives the old ones away."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "delta" in cls.__dict__:  # a kernel that is inherited computes another formula
            cls.kernel = cls.__dict__.get("kernel")
            cls.in_place = cls.__dict__.get("in_place")

    @abstractmethod
    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return what to add to a parameter, or its new gradient where the rule does not descend, and the new slots.

        Args:
            g: The gradient.
            p: The parameter.
            slots: What the rule remembers of it.
            h: The hyperparameters, by name: 0-d tensors, or 1-d where the field is several numbers.
        """

    def step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        """Return the new parameters and the new state, by the kernel where it can be used."""
        check_names(leaves.names, state.leaves)
        try:
            return self._fused_step(leaves, state) or super().step(leaves, state)
        except RuntimeError:
            _check_shapes(self, leaves, state)
            raise

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        """Return what becomes of the gradients by the formula, and the new state."""
        check_names(leaves.names, state.leaves)
        updates: Updates = []
        new_slots = dict(state.leaves)
        params = dict(zip(leaves.names, leaves.params, strict=True))
        hyper = by_leaf(self.hyper_now(state), self.hyperparameters, params)
        for name, p, g in zip(leaves.names, leaves.params, leaves.grads, strict=True):
            if g is None:
                updates.append(None)
                continue
            old = state.leaves[name]
            # The square of a small float16 number is zero.
            delta, new = self.delta(g.float() if g.dtype == torch.float16 else g, p, old, hyper[name])
            if delta.shape != p.shape:
                _check_shapes(self, leaves, state)
            # A 0-d parameter would be promoted by the float64 hyperparameters.
            updates.append(delta.to(p.dtype))
            new_slots[name] = {slot: value.to(old[slot].dtype) for slot, value in new.items()}
        return updates, state.after(new_slots)

    def _fused_step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState] | None:
        if self.kernel is None or not _fused.unobserved():
            return None
        names, params, grads = leaves.names, list(leaves.params), leaves.grads
        slots = dict(state.leaves)
        for hyper, places in _groups(leaves, self.hyper_now(state)):
            numbers = _fused.numbers(hyper)
            if numbers is None:
                return None
            step = self.kernel(
                [params[i] for i in places],
                [grads[i] for i in places],
                [slots[names[i]] for i in places],
                *numbers,
            )
            if step is None:
                return None
            for i, param, new in zip(places, *step, strict=True):
                params[i], slots[names[i]] = param, new
        return params, state.after(slots)


def _groups(leaves: Leaves, hyper: Hyper) -> Iterable[tuple[Tensor, list[int]]]:
    """Part the places of the leaves that have a gradient by the vector of hyperparameters that they share."""
    places = [i for i, g in enumerate(leaves.grads) if g is not None]
    if isinstance(hyper, Tensor):
        return [(hyper, places)]
    groups: dict[int, tuple[Tensor, list[int]]] = {}
    for i in places:
        vector = hyper[leaves.names[i]]
        groups.setdefault(id(vector), (vector, []))[1].append(i)
    return groups.values()


def _check_shapes(rule: LeafwiseRule, leaves: Leaves, state: RuleState) -> None:
    """Raise if what the state remembers has not the shape that the parameter asks for; called where a step failed."""
    for name, p in zip(leaves.names, leaves.params, strict=True):
        fresh = rule.slots(p)
        for slot, value in state.leaves[name].items():
            if value.shape != fresh[slot].shape:
                raise InputError(
                    f"The optimizer state has '{slot}' of another shape than the parameter asks for.",
                    expected=str(tuple(fresh[slot].shape)),
                    got=str(tuple(value.shape)),
                    fix="Set up the state with these parameters.",
                    where=name,
                )
