"""`LeafwiseRule`: rules that treat each parameter by itself, by a formula; and pieces of formulas."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from luxtorch.core import InputError
from luxtorch.core._sharded import any_sharded, own_parts, sharded_as
from luxtorch.core._traced_once import traced_once

from ._hyperparameters import unpack
from ._kernels import InPlace, Kernel, numbers, on_clones, unobserved
from ._leaves import Leaves
from ._rule import ListRule, Updates, negative
from ._rule_state import COUNTS, RuleState, Slots, beside, check_names, groups


class LeafwiseRule(ListRule):
    """A rule that treats each parameter by itself.

    A rule is its hyperparameters, what it remembers of a parameter (`slots`), and its formula (`delta`).

    Args:
        maximize: Whether to step up instead of down: the formula gets the gradients with the other sign.

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

    maximize: bool = dataclasses.field(default=False, kw_only=True)

    kernel: ClassVar[Kernel | None] = None
    """The formula over whole lists of leaves, for eager steps that nothing observes."""

    in_place: ClassVar[InPlace | None] = None
    """The same where the parameters and slots are, for steps whose caller gives the old ones away; also on copies,
    where there is no `kernel`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        formula = ("delta", "shared", "by_count", "kernel")
        if not cls.__dict__.keys().isdisjoint(formula):  # what is inherited computes another one
            cls.kernel = cls.__dict__.get("kernel")
            cls.in_place = cls.__dict__.get("in_place")

    @abstractmethod
    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return what to add to a parameter, or its new gradient where the rule does not descend, and the new slots.

        Args:
            g: The gradient.
            p: The parameter.
            slots: What the rule remembers of it.
            h: The hyperparameters, by name: 0-d tensors, or 1-d where the field is several numbers; and what `shared`
                and `by_count` make of them.
        """

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the formula needs of the hyperparameters alone; it is computed once for all parameters.

        Args:
            h: The hyperparameters, by name. What is returned is added to them, by names of its own.
        """
        return {"-lr": -h["lr"]} if "lr" in h else {}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the formula needs of counts, such as the number of the step, and the hyperparameters alone.

        It is computed at once for all parameters, whose counts may differ, and `delta` gets each parameter's own.

        Args:
            counts: The slots of one number, in the dtype of the hyperparameters: as they are of one parameter, or of
                several in a dimension. What is returned has that dtype, and one number for each parameter, too.
            h: The hyperparameters, and what `shared` returns.
        """
        return {}

    def eval_parameter(self, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> Tensor:
        """Return what to evaluate with in the place of a parameter; for most rules the parameter."""
        return p

    def eval_parameters(self, leaves: Leaves, state: RuleState) -> list[Tensor]:
        if type(self).eval_parameter is LeafwiseRule.eval_parameter:
            return leaves.params
        new = list(leaves.params)
        for vector, places in groups(self.hyper_now(state), leaves.names, leaves.params, range(len(new))):
            h = self._terms(beside(new[places[0]], vector))
            for i in places:
                p = leaves.params[i]
                new[i] = self.eval_parameter(p, state.leaves[leaves.names[i]], h).to(p.dtype)
        return new

    def step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        """Return the new parameters and the new state, by the kernel where it can be used."""
        check_names(leaves.names, state.leaves)
        if any_sharded(leaves.params) and self.elementwise():
            return self._step_of_parts(leaves, state)
        try:
            return self._fused_step(leaves, state) or super().step(leaves, state)
        except RuntimeError:
            _check_shapes(self, leaves, state)
            raise

    def elementwise(self) -> bool:
        """Say whether the formula knows nothing but the elements, so that it may be that of this rank's part."""
        return not self.splits_vectors() and type(self).updates is LeafwiseRule.updates

    def _step_of_parts(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        """Return the step of sharded parameters: that of this rank's parts, without torch's dispatch of each operator.

        The gradients are in the places of the parameters, and so is what the state remembers of them.
        """
        own = leaves._replace(params=own_parts(leaves.params), grads=own_parts(leaves.grads))
        params, new = self.step(own, state._replace(leaves=own_parts(state.leaves)))
        slots = {}
        for name, old in state.leaves.items():
            slots[name] = {slot: sharded_as(old[slot], value) for slot, value in new.leaves[name].items()}
        return list(map(sharded_as, leaves.params, params)), new._replace(leaves=slots)

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        """Return what becomes of the gradients by the formula, and the new state."""
        check_names(leaves.names, state.leaves)
        updates: Updates = [None] * len(leaves.names)
        slots = dict(state.leaves)
        formula = traced_once(self._formula)
        for vector, places in groups(self.hyper_now(state), leaves.names, leaves.params, _given(leaves)):
            vector = beside(leaves.params[places[0]], vector)
            terms = self._terms_by_leaf(vector, [slots[leaves.names[i]] for i in places])
            for i, h in zip(places, terms, strict=True):
                name = leaves.names[i]
                updates[i], slots[name] = formula(leaves.grads[i], leaves.params[i], slots[name], h)
                if updates[i].shape != leaves.params[i].shape:  # type: ignore[union-attr]
                    _check_shapes(self, leaves, state)
        return updates, state.after(slots)

    def _formula(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return what `delta` does, in the dtypes of the parameter and of the old slots."""
        # The square of a small float16 number is zero.
        g = g.float() if g.dtype == torch.float16 else g
        delta, new = self.delta(-g if self.maximize else g, p, slots, h)
        # A 0-d parameter would be promoted by the float64 hyperparameters.
        return delta.to(p.dtype), {slot: value.to(slots[slot].dtype) for slot, value in new.items()}

    def _terms(self, vector: Tensor) -> dict[str, Tensor]:
        h = unpack(vector, self.hyperparameters)
        return {**h, **self.shared(h)}

    def _terms_by_leaf(self, vector: Tensor, slots: Sequence[Slots]) -> Sequence[Mapping[str, Tensor]]:
        """Return what the formula gets besides the tensors of each parameter."""
        h = self._terms(vector)
        counts = [name for name in COUNTS if name in slots[0]]
        if not counts or type(self).by_count is LeafwiseRule.by_count:
            return [h] * len(slots)
        if len(slots) == 1:
            return [{**h, **self.by_count({name: slots[0][name].to(vector.dtype) for name in counts}, h)}]
        stacked = {name: torch.stack([leaf[name] for leaf in slots]).to(vector.dtype) for name in counts}
        found = self.by_count(stacked, h)
        # In one tensor: inductor computes that once, and not for each parameter again.
        rows = torch.stack([value.to(vector.dtype) for value in found.values()]).unbind()
        columns = zip(*(row.unbind() for row in rows), strict=True)
        return [{**h, **dict(zip(found, column, strict=True))} for column in columns]

    def _fused_step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState] | None:
        kernel = self.kernel or (self.in_place and partial(on_clones, self.in_place))
        if kernel is None or not unobserved():
            return None
        names, params, grads = leaves.names, list(leaves.params), leaves.grads
        if self.maximize:
            grads = negative(grads)
        slots = dict(state.leaves)
        for hyper, places in groups(self.hyper_now(state), leaves.names, leaves.params, _given(leaves)):
            values = numbers(hyper)
            if values is None:
                return None
            step = kernel(
                [params[i] for i in places],
                [grads[i] for i in places],
                [slots[names[i]] for i in places],
                *values,
            )
            if step is None:
                return None
            for i, param, new in zip(places, *step, strict=True):
                params[i], slots[names[i]] = param, new
        return params, state.after(slots)


def _given(leaves: Leaves) -> list[int]:
    """Return the places of the leaves that have a gradient."""
    return [i for i, g in enumerate(leaves.grads) if g is not None]


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


def zeros(p: Tensor, *names: str) -> dict[str, Tensor]:
    """Return slots that hold a zero for each element of a parameter."""
    return {name: torch.zeros_like(p) for name in names}


def counted(p: Tensor, *names: str) -> dict[str, Tensor]:
    """Return slots that hold zeros, and the count of the steps."""
    # The step count is what the fused kernels take: float32, beside the parameter. It is exact up to 2**24 steps.
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, **zeros(p, *names)}


def decayed(g: Tensor, p: Tensor, h: Mapping[str, Tensor]) -> Tensor:
    """Return the gradient with that of the penalty `weight_decay / 2 * (p * p).sum()`."""
    return g + h["weight_decay"] * p


def shares(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how much of two running averages is kept, and how much comes in."""
    beta1, beta2 = h["betas"]
    return {"beta1": beta1, "beta2": beta2, "1-beta1": 1 - beta1, "1-beta2": 1 - beta2}


def sqrt(x: Tensor) -> Tensor:
    """Return the square root, with derivative zero where x is zero.

    An infinite derivative there would make every gradient through a step NaN as soon as one entry of the
    gradient is zero, as it is for each dead unit.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def sign(x: Tensor) -> Tensor:
    """Return the sign, NaN where x is not finite: `torch.sign` would hide there that training has failed."""
    return x.sign() + 0.0 * x


def rms(x: Tensor) -> Tensor:
    """Return the root of the mean square."""
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(max(x.numel(), 1))
