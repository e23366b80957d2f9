"""Rules that treat one parameter at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import DTypeError, InputError, KeyNameError

from . import _fused
from ._fused import Slots as Slots
from ._hyperparameters import pack, unpack
from ._leaves import Leaves, pair, rebuild
from ._rule import Rule

Hyper: TypeAlias = "Tensor | dict[str, Tensor]"
"""The hyperparameters in a state: one vector for all parameters, or one for each by its name."""


class RuleState(NamedTuple):
    """Hold the state of a leafwise rule.

    Attributes:
        hyper: The hyperparameters, in the order of the rule's fields: a vector, or one by parameter.
        leaves: What the rule remembers of each parameter, by the parameter's dotted name.
    """

    hyper: Hyper
    leaves: dict[str, Slots]


torch.serialization.add_safe_globals([RuleState])


class LeafwiseRule(Rule):
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

    needs_params: ClassVar[bool] = False
    """Whether the formula reads the parameter, and not the gradient alone."""

    def slots(self, p: Tensor) -> Slots:
        """Return what the rule remembers of a parameter before the first step."""
        return {}

    @abstractmethod
    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return what to add to a parameter, and the new slots.

        Args:
            g: The gradient.
            p: The parameter.
            slots: What the rule remembers of it.
            h: The hyperparameters, by name: 0-d tensors, or 1-d where the field is several numbers.
        """

    def init(self, params: Any) -> RuleState:
        """Return the state before the first step."""
        names, tensors, _ = pair(params, None)
        if len(set(names)) < len(names):
            raise KeyNameError(
                "Two parameters have the same dotted name.",
                got=next(name for name in names if names.count(name) > 1),
                fix="Name them by strings without dots.",
            )
        for name, p in zip(names, tensors, strict=True):
            if p.is_complex():
                raise DTypeError(
                    "A complex parameter cannot be optimized as it is.",
                    expected="real parameters",
                    got=str(p.dtype),
                    fix="Keep torch.view_as_real(p) as the parameter, and view it as complex in the model.",
                    where=name,
                )
        device = tensors[0].device if tensors else torch.device("cpu")
        return RuleState(
            pack({name: getattr(self, name) for name in self.hyperparameters}, beside=device),
            {name: self.slots(p) for name, p in zip(names, tensors, strict=True)},
        )

    def update(
        self, updates: Any, state: RuleState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, RuleState]:
        """Return what to add to the parameters, and the new state: the step as torchopt asks for it.

        Args:
            updates: The gradients, or what the rules before this one in a chain made of them.
            state: The state.
            params: The parameters.
            inplace: torchopt's word, not followed: a rule never writes into its arguments.
        """
        del inplace
        if params is None:
            if self.needs_params:
                raise InputError(
                    f"{type(self).__name__} needs the parameters as well as the gradients.",
                    fix="Call rule.update(grads, state, params=ps).",
                )
            params = updates
        leaves = pair(params, updates)
        _check_names(leaves.names, state)
        deltas, state = self._deltas(leaves, state)
        return rebuild(params, iter(deltas)), state

    def step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        """Return the new parameters and the new state, by the kernel where it can be used."""
        _check_names(leaves.names, state)
        try:
            return self._fused_step(leaves, state) or self._formula_step(leaves, state)
        except RuntimeError:
            _check_shapes(leaves, state)
            raise

    def _formula_step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        deltas, state = self._deltas(leaves, state)
        return [p if d is None else p + d for p, d in zip(leaves.params, deltas, strict=True)], state

    def _deltas(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor | None], RuleState]:
        deltas: list[Tensor | None] = []
        new_slots = dict(state.leaves)
        by_name = state.hyper if isinstance(state.hyper, dict) else {}
        shared = unpack(state.hyper, self.hyperparameters) if isinstance(state.hyper, Tensor) else {}
        for name, p, g in zip(*leaves, strict=True):
            if g is None:
                deltas.append(None)
                continue
            old = state.leaves[name]
            h = unpack(by_name[name], self.hyperparameters) if by_name else shared
            delta, new = self.delta(g, p, old, h)
            if delta.shape != p.shape:
                _check_shapes(leaves, state)
            # A 0-d parameter would be promoted by the float64 hyperparameters.
            deltas.append(delta.to(p.dtype))
            new_slots[name] = {slot: value.to(old[slot].dtype) for slot, value in new.items()}
        return deltas, RuleState(state.hyper, new_slots)

    def _fused_step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState] | None:
        if self.kernel is None or not _fused.unobserved():
            return None
        params, slots = dict(zip(leaves.names, leaves.params, strict=True)), dict(state.leaves)
        for hyper, members in _groups(leaves, state.hyper):
            numbers = _fused.numbers(hyper)
            if numbers is None:
                return None
            names, old_params, grads = zip(*members, strict=True)
            step = self.kernel(old_params, grads, [slots[name] for name in names], *numbers)
            if step is None:
                return None
            new_params, new_slots = step
            params.update(zip(names, new_params, strict=True))
            slots.update(zip(names, new_slots, strict=True))
        return list(params.values()), RuleState(state.hyper, slots)


def _groups(leaves: Leaves, hyper: Hyper) -> list[tuple[Tensor, list[tuple[str, Tensor, Tensor]]]]:
    """Part the leaves that have a gradient by the vector of hyperparameters that they share."""
    groups: dict[int, tuple[Tensor, list[tuple[str, Tensor, Tensor]]]] = {}
    for name, p, g in zip(*leaves, strict=True):
        if g is not None:
            vector = hyper[name] if isinstance(hyper, dict) else hyper
            groups.setdefault(id(vector), (vector, []))[1].append((name, p, g))
    return list(groups.values())


def _check_names(names: list[str], state: RuleState) -> None:
    if state.leaves.keys() != set(names):
        missing = [name for name in state.leaves if name not in names]
        extra = [name for name in names if name not in state.leaves]
        raise KeyNameError(
            "The optimizer state belongs to other parameters.",
            expected=f"also {', '.join(missing)}" if missing else "no others than those of the state",
            got=", ".join(extra) or "none of these",
            fix="Set up the state with these parameters.",
        )


def _check_shapes(leaves: Leaves, state: RuleState) -> None:
    """Raise if what the state remembers has another shape than the parameter; called where a step has failed."""
    for name, p in zip(leaves.names, leaves.params, strict=True):
        for slot, value in state.leaves[name].items():
            if value.ndim > 0 and value.shape != p.shape:
                raise InputError(
                    f"The optimizer state has '{slot}' of another shape than the parameter.",
                    expected=str(tuple(p.shape)),
                    got=str(tuple(value.shape)),
                    fix="Set up the state with these parameters.",
                    where=name,
                )
