"""L-BFGS, a quasi-Newton rule, and its memory: the last steps, and how the gradient changed over each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.core import InputError, out_of_range, tree_leaves
from luxtorch.core._sharded import is_sharded

from .._hyperparameters import Number
from .._kernels import unobserved
from .._leaves import Leaves, pair
from .._rule import ListRule, Updates
from .._rule_state import ALL, RuleState, Slots, check_names
from ..modifiers._chain import choose

# Where the gradient changes by less than this along a step, nothing is learnt of it: torch's number.
_LEAST_CURVATURE = 1e-10


class LBFGS(ListRule):
    """Take quasi-Newton steps, by a model of the curvature along the last few of them.

    All parameters are one vector to it. By `update` each step has the length that `lr` says, whatever the loss does
    there: take gradients of one and the same loss, and a small `lr`. `minimize` takes the function itself and searches
    along each direction; that is what L-BFGS is best at. Both go on from the same state.

    A parameter without a gradient, or a frozen one, stays; what is known about the others still serves.

    Args:
        lr: The length of the step, in units of the quasi-Newton step; where `minimize` begins to search. The first step
            has no curvature to go by: it is shortened to a sum of absolute values of at most this.
        history_size: How many steps are remembered. Each costs two vectors of memory.

    Raises:
        InputError: If `history_size` is not positive; when a state is set up, if the parameters are on several devices,
            or are a ComponentVector of many models.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"x": torch.tensor([2.0, -1.0])}
        >>> opt_state = optim.setup(optim.LBFGS(), ps)
        >>> for _ in range(10):
        ...     grads = {"x": torch.tensor([1.0, 10.0]) * ps["x"]}
        ...     opt_state, ps = optim.update(opt_state, ps, grads)
        >>> ps["x"].abs().max() < 1e-4
        tensor(True)

    The numbers are those of `torch.optim.LBFGS`, whose `history_size` is 100 by default, with one step a call. There as
    here, a step is not remembered if its product with the change of the gradient is less than 1e-10: a loss that is
    smaller should be scaled. Nocedal and Wright, "Numerical optimization", 2006, algorithm 7.4.
    """

    lr: Number = 1.0
    history_size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.history_size) is not int or self.history_size < 1:
            raise out_of_range("history_size", self.history_size, "a positive integer")

    def by_parameter(self) -> bool:
        return False

    def counts(self) -> bool:
        return True

    def init(self, params: Any) -> RuleState:
        for node in tree_leaves(params, is_leaf=lambda node: isinstance(node, ComponentVector)):
            if isinstance(node, ComponentVector) and node.flat.ndim > 1:
                raise InputError(
                    "LBFGS would treat many models as one: their curvatures have nothing to do with each other.",
                    expected="a ComponentVector of shape (size,)",
                    got=f"shape {tuple(node.flat.shape)}",
                    fix="Set up and update inside of torch.vmap.",
                )
        state: RuleState = super().init(params)
        flat = flatten(pair(params, None).params)
        memory = {name: torch.zeros_like(flat) for name in ("grad", "step")}
        # Of one element, not 0-d: torch.compile would trace everything twice, see `pack`.
        memory |= {"rho": flat.new_zeros(self.history_size), "scale": flat.new_ones(1)}
        memory |= {name: torch.zeros_like(flat) for names in _names(memory["rho"]) for name in names}
        return state._replace(leaves={**state.leaves, ALL: memory})

    def own_numbers(self, state: RuleState, dtype: torch.dtype) -> list[Tensor]:
        return state._replace(leaves={}).own_numbers(dtype)  # all of the memory meets the gradient in products

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, [name for name in state.leaves if name != ALL])
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.params, leaves.grads, strict=True)]
        g, memory = flatten(grads), state.leaves[ALL]
        check_size(g, memory)
        as_numbers = can_read(g, memory)
        absent = [given is None for given in leaves.grads]
        missing = mark(leaves.params, absent) if any(absent) else None
        known = g if missing is None else g.masked_fill(missing, torch.nan)
        memory = remember(memory, known, as_numbers)
        step = direction(memory, g, as_numbers) * self.length(g, state, as_numbers)
        step = step if missing is None else step.masked_fill(missing, 0.0)
        parts = unflatten(step, leaves.params, apart=bool(leaves.in_parts))
        updates = [None if given is None else part for part, given in zip(parts, leaves.grads, strict=True)]
        return updates, state.after({**state.leaves, ALL: {**memory, "grad": known, "step": step}})

    def length(self, g: Tensor, state: RuleState, as_numbers: bool) -> Tensor:
        """Return the factor on the direction: the learning rate, or less of it in the first step."""
        hyper = self.hyper_now(state) if self.scheduled() else state.hyper
        assert isinstance(hyper, Tensor) and isinstance(state.steps, Tensor)
        lr, first = hyper.squeeze(-1), state.steps == 0
        if as_numbers and not first:
            return lr
        lr = lr.to(g.device, non_blocking=True)
        # The smaller of 1 and 1 / sum, but with a derivative where the sum is zero.
        return lr * torch.where(first.to(g.device), g.abs().sum().clamp(min=1.0).reciprocal(), 1.0)


def remember(memory: Slots, g: Tensor, as_numbers: bool) -> Slots:
    """Return the memory with the last step and the change of the gradient over it, if they tell of a curvature.

    Args:
        memory: What the rule remembers: the last gradient and the last step; the pairs of steps s and changes y, oldest
            first, zero where there are none yet; `rho`, which is 1 / (y s) of each; and `scale`, the inverse curvature
            to begin with.
        g: The gradient after that step. Where it is missing, now or before, it is NaN, and the pair is zero.
        as_numbers: Whether tensors may be read, see `can_read`.
    """
    y = g - memory["grad"]
    unknown = y.isnan()
    s, y = memory["step"].masked_fill(unknown, 0.0), y.masked_fill(unknown, 0.0)
    ys, yy = y.dot(s), y.dot(y)
    curved = ys > _LEAST_CURVATURE
    if as_numbers and not curved:
        return memory
    if not as_numbers:  # nothing may be divided by zero, not even in vain: that has no derivative
        ys, yy = torch.where(curved, ys, 1.0), torch.where(curved, yy, 1.0)
    new = {**memory, "rho": torch.cat([memory["rho"][1:], ys.reciprocal()[None]]), "scale": (ys / yy)[None]}
    names = _names(memory["rho"])
    for (old_s, old_y), (next_s, next_y) in zip(names, names[1:], strict=False):
        new[old_s], new[old_y] = memory[next_s], memory[next_y]
    new |= dict(zip(names[-1], (s, y), strict=True))
    kept: Slots = new if as_numbers else choose(curved, new, memory)
    return kept


def direction(memory: Slots, g: Tensor, as_numbers: bool) -> Tensor:
    """Return the quasi-Newton direction: minus the gradient, times the inverse Hessian that the pairs tell of."""
    rhos: Sequence[Any] = memory["rho"].tolist() if as_numbers else memory["rho"].unbind()
    pairs = [(memory[s], memory[y], rho) for (s, y), rho in zip(_names(memory["rho"]), rhos, strict=True)]
    if as_numbers:
        pairs = [pair for pair in pairs if pair[2] != 0.0]
    d, factors = -g, []
    for s, y, rho in reversed(pairs):
        factors.append(rho * _dot(s, d, as_numbers))
        d = _add(d, -factors[-1], y)
    d = d * memory["scale"]
    for s, y, rho in pairs:
        d = _add(d, factors.pop() - rho * _dot(y, d, as_numbers), s)
    return d


def can_read(g: Tensor, memory: Slots) -> bool:
    """Say whether tensors may be read as numbers: nothing traces or records them, and they are whole and on the CPU.

    There, a pair that is no pair is left out, and a product with a number and a sum are one pass.
    """
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (g, *memory.values()))
    return unobserved() and g.is_cpu and not (recorded or is_sharded(g))


def check_size(g: Tensor, memory: Slots) -> None:
    """Raise unless there are as many parameters as the state was set up with."""
    if g.shape != memory["grad"].shape:
        raise InputError(
            "The optimizer state belongs to parameters of other shapes.",
            expected=f"{memory['grad'].numel()} numbers in all",
            got=str(g.numel()),
            fix="Set up the state with these parameters.",
        )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return a new vector of the elements of all tensors."""
    if len({tensor.device for tensor in tensors}) > 1:
        raise InputError(
            "All parameters have to be on one device.",
            got=", ".join(dict.fromkeys(str(tensor.device) for tensor in tensors)),
        )
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)


def unflatten(flat: Tensor, like: Sequence[Tensor], apart: bool) -> list[Tensor]:
    """Return the parts of a vector that belong to some tensors, with their shapes and dtypes.

    They share memory with the vector, unless they are to be apart: complex numbers may not begin at any place.
    """
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    if apart:  # by a product, as its derivatives are in memory of their own, too
        parts = tuple(part * 1.0 for part in parts)
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def mark(tensors: Sequence[Tensor], marks: Sequence[bool]) -> Tensor:
    """Return whether each element belongs to a tensor that is marked."""
    return torch.cat([torch.full((t.numel(),), m, device=t.device) for t, m in zip(tensors, marks, strict=True)])


def _names(rho: Tensor) -> list[tuple[str, str]]:
    return [(f"s_{i}", f"y_{i}") for i in range(1, len(rho) + 1)]


def _dot(x: Tensor, y: Tensor, as_numbers: bool) -> Any:
    return x.dot(y).item() if as_numbers else x.dot(y)


def _add(x: Tensor, factor: Any, y: Tensor) -> Tensor:
    # A vector in place: it was made here.
    return x.add_(y, alpha=factor) if isinstance(factor, float) else x + factor * y
