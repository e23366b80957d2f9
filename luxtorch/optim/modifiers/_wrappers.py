"""Rules around a rule: mixed precision, members of an ensemble, and ReduceLROnPlateau."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from luxtorch.core import InputError, out_of_range, tree_leaves
from luxtorch.core._sharded import beside

from .._hyperparameters import Number, Range, Share, pack, unpack
from .._leaves import Leaves
from .._rule import ChangeState, GradientTransformation, ListRule, Updates, needed
from .._rule_state import ALL, RuleState, check_names
from ._chain import as_rule


class MixedPrecision(ListRule):
    """Keep a copy of the parameters in high precision, let a rule step on it, and round the result.

    Small steps then add up that would be lost in the rounding of parameters in bfloat16. The state holds the
    copies; what happens to the parameters outside the steps is overwritten by them. A parameter that has the
    dtype of the copies already has none. Where all is cast, as by `lt.bf16(ts)`, copies and averages stay as they are.

    Args:
        rule: The rule, or a chain of all rules.
        dtype: The dtype of the copies and of what the rule remembers.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p, g = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
        >>> for rule in (optim.Descent(1e-3), optim.MixedPrecision(optim.Descent(1e-3))):
        ...     opt_state, new = optim.setup(rule, p), p
        ...     for _ in range(100):
        ...         opt_state, new = optim.update(opt_state, new, g)
        ...     print(new)
        tensor([1.], dtype=torch.bfloat16)
        tensor([0.8984], dtype=torch.bfloat16)

    The name is that of Optimisers.jl. Micikevicius et al., "Mixed precision training", 2018.
    """

    rule: ListRule
    dtype: torch.dtype = torch.float32

    needs_params = True

    def __init__(self, rule: GradientTransformation, dtype: torch.dtype = torch.float32) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise out_of_range("dtype", dtype, "a floating point dtype")
        object.__setattr__(self, "rule", as_rule(rule))
        object.__setattr__(self, "dtype", dtype)

    def splits_vectors(self) -> bool:
        return self.rule.splits_vectors()

    def check(self, leaves: Leaves) -> None:
        self.rule.check(leaves)

    def keeps_copies(self) -> bool:
        return True

    def map_states(self, change: ChangeState, state: Any) -> Any:
        masters, inner = state
        return change(self, masters), self.rule.map_states(change, inner)

    def in_force(self, state: Any) -> MixedPrecision:
        return MixedPrecision(self.rule.in_force(state[1]), self.dtype)

    def own_numbers(self, state: Any, dtype: torch.dtype) -> list[Tensor]:
        return tree_leaves(state)  # its precision is that of the copies

    def describe(self, state: Any) -> str:
        return f"MixedPrecision({self.rule.describe(state[1])}, {self.dtype})"

    def init(self, params: Any) -> Any:
        leaves = self.leaves_of(params)
        names, tensors = leaves.names, leaves.params
        masters = [p.to(self.dtype) for p in tensors]
        inner = self.rule.init(dict(zip(names, masters, strict=True)))
        slots = {
            name: {} if p.dtype == self.dtype else {"master": master}
            for name, p, master in zip(names, tensors, masters, strict=True)
        }
        return RuleState(pack({}, beside=torch.device("cpu")), slots), inner

    def eval_parameters(self, leaves: Leaves, state: Any) -> list[Tensor]:
        copies, inner = state
        new = self.rule.eval_parameters(leaves._replace(params=self._masters(leaves, copies)), inner)
        return [x.to(p.dtype) for x, p in zip(new, leaves.params, strict=True)]

    def _masters(self, leaves: Leaves, copies: RuleState) -> list[Tensor]:
        check_names(leaves.names, copies.leaves)
        # There is none yet where a parameter had the dtype of the copies before a cast.
        pairs = zip(leaves.names, leaves.params, strict=True)
        return [copies.leaves[name].get("master", p).to(self.dtype) for name, p in pairs]

    def updates(self, leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        new, state = self.step(leaves, state)
        return [None if g is None else x - p for x, p, g in zip(new, leaves.params, leaves.grads, strict=True)], state

    def step(self, leaves: Leaves, state: Any) -> tuple[Any, Any]:
        copies, inner = state
        masters = self._masters(leaves, copies)
        grads = [None if g is None else g.to(self.dtype) for g in leaves.grads]
        new, inner = self.rule.step(leaves._replace(params=masters, grads=grads), inner)
        slots = {
            name: {} if p.dtype == self.dtype else {"master": master}
            for name, p, master in zip(leaves.names, leaves.params, new, strict=True)
        }
        params = [
            p if g is None else master.to(p.dtype)
            for p, g, master in zip(leaves.params, leaves.grads, new, strict=True)
        ]
        return params, (copies._replace(leaves=slots), inner)


class PerMember(ListRule):
    """Let a rule step each of n models whose parameters are stacked; made by `per_member`."""

    rule: ListRule
    n: int

    needs_params = True

    def __init__(self, rule: GradientTransformation, n: int) -> None:
        if isinstance(n, bool) or not (isinstance(n, int) and n >= 1):
            raise out_of_range("n", n, "a positive integer, the number of members")
        object.__setattr__(self, "rule", as_rule(rule))
        object.__setattr__(self, "n", n)

    def splits_vectors(self) -> bool:
        return True

    def check(self, leaves: Leaves) -> None:
        self.rule.check(leaves)

    def keeps_copies(self) -> bool:
        return self.rule.keeps_copies()

    def by_parameter(self) -> bool:
        return self.rule.by_parameter()

    def map_states(self, change: ChangeState, state: Any) -> Any:
        return self.rule.map_states(change, state)

    def in_force(self, state: Any) -> PerMember:
        return PerMember(self.rule.in_force(state), self.n)

    def own_numbers(self, state: Any, dtype: torch.dtype) -> list[Tensor]:
        return self.rule.own_numbers(state, dtype)

    def describe(self, state: Any) -> str:
        return f"per_member({self.rule.describe(state)}, {self.n})"

    def init(self, params: Any) -> Any:
        leaves = self.leaves_of(params)
        names, tensors = leaves.names, leaves.params
        for name, p in zip(names, tensors, strict=True):
            if p.shape[:1] != (self.n,):
                raise InputError(
                    f"The parameter is not that of {self.n} members.",
                    expected=f"shape ({self.n}, ...)",
                    got=f"shape {tuple(p.shape)}",
                    fix="Stack the parameters of the members, as lt.Ensemble and lt.stack do.",
                    where=name,
                )
        # The number is told by a tensor of its own, as there may be no parameters.
        members = torch.arange(self.n, device=tensors[0].device if tensors else None)
        return torch.vmap(lambda _, ps: self.rule.init(ps))(members, dict(zip(names, tensors, strict=True)))

    def updates(self, leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        new, state = self._each(self.rule.updates, leaves, state)
        if not self.rule.descends:
            new = [None if u is None else -u for u in new]
        return new, state

    def step(self, leaves: Leaves, state: Any) -> tuple[Any, Any]:
        return self._each(self.rule.step, leaves, state)

    def eval_parameters(self, leaves: Leaves, state: Any) -> list[Tensor]:
        def member(params: list[Tensor], own: Any) -> list[Tensor]:
            return self.rule.eval_parameters(leaves._replace(params=params), own)

        new: list[Tensor] = torch.vmap(member)(list(leaves.params), state)
        return new

    def _is_stacked(self, value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(self._is_stacked, value.values()))
        return isinstance(value, Tensor) and value.shape[:1] == (self.n,)

    def _each(self, take: Callable[[Leaves, Any], Any], leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        """Return what one member makes of its leaves, for all; gradients that are missing are so for all."""
        given = [g is not None for g in leaves.grads]

        # Of what a step was given besides, a tensor with as many entries has one for each member, as `value` has.
        stacked = {name: value for name, value in leaves.extra.items() if self._is_stacked(value)}

        def member(params: list[Tensor], grads: list[Tensor], state: Any, own: dict[str, Any]) -> Any:
            found = iter(grads)
            some = [next(found) if here else None for here in given]
            mine = leaves._replace(params=params, grads=some, extra={**leaves.extra, **own})
            values, state = take(mine, state)
            return [value for value in values if value is not None], state

        present = [g for g in leaves.grads if g is not None]
        values, state = torch.vmap(member)(list(leaves.params), present, state, stacked)
        if len(values) == len(leaves.params):
            return list(values), state
        remaining = iter(values)
        return [next(remaining) if here else None for here in given], state


def per_member(rule: GradientTransformation, n: int) -> PerMember:
    """Let a rule step each of n models whose parameters are stacked, as if it were alone.

    A rule that looks at more than one element of a parameter, such as `ClipNorm`, `LAMB`, `Adafactor`, `Muon` or
    `LBFGS`, takes the stacked parameters of an `lt.Ensemble` for one large model: the members' steps then depend on
    one another. With this each has its own norm, and its own hyperparameters: `adjust(opt_state, lr=...)` takes one
    number for all, or n of them.

    Args:
        rule: The rule, or a chain of rules.
        n: The number of members, the first dimension of every parameter.

    Returns:
        A rule for the stacked parameters. (In eager mode each step is by formula, under `torch.vmap`; rules that treat
        every element by itself, such as `Adam` alone, need no `per_member`, and are faster without.)

    Raises:
        InputError: If n is not a positive integer; when a state is set up, if a parameter is not a stack of n.
        DTypeError: If the rule is not a rule of this package.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2, 1)}  # of two members
        >>> rule = optim.OptimiserChain(optim.ClipNorm(1.0), optim.Descent(1.0))
        >>> for each in (rule, optim.per_member(rule, 2)):
        ...     print(optim.update(optim.setup(each, ps), ps, {"weight": torch.tensor([[-0.5], [-100.0]])})[1])
        {'weight': tensor([[0.0050],
                [1.0000]])}
        {'weight': tensor([[0.5000],
                [1.0000]])}
    """
    return PerMember(rule, n)


class ReduceLROnPlateau(ListRule):
    """Multiply all steps by a factor that shrinks whenever the loss has not improved for a while.

    It stands after a rule in an `OptimiserChain`. Each step needs `value=`, the loss or what else is watched; a
    training step passes its loss. A loss counts from the next step on, as in `torch.optim`.

    Args:
        factor: By how much the steps shrink.
        threshold: The least improvement that counts.
        min_scale: The least that the steps may shrink to, relative to what they were.
        patience: After how many steps without improvement they shrink.
        cooldown: How many steps to wait then before counting again.
        mode: Whether "min" or "max" is better.
        threshold_mode: Whether the improvement is relative, "rel", or not, "abs".

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> p = torch.zeros(1)
        >>> rule = optim.OptimiserChain(optim.Descent(1.0), optim.ReduceLROnPlateau(0.5, patience=1))
        >>> opt_state = optim.setup(rule, p)
        >>> for loss in (1.0, 1.0, 1.0, 1.0):
        ...     opt_state, p = optim.update(opt_state, p, torch.ones(1), value=loss)
        ...     print(p.item())
        -1.0
        -2.0
        -3.0
        -3.5

    The name, numbers and defaults are those of `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """

    factor: Annotated[Number, Range("(0, 1)")] = 0.1
    threshold: Number = 1e-4
    min_scale: Share = 0.0
    patience: int = 10
    cooldown: int = 0
    mode: str = "min"
    threshold_mode: str = "rel"

    descends = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("mode", ("min", "max")), ("threshold_mode", ("rel", "abs"))):
            if getattr(self, name) not in known:
                raise out_of_range(name, getattr(self, name), " or ".join(map(repr, known)))
        for name in ("patience", "cooldown"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise out_of_range(name, getattr(self, name), "an integer of at least 0")

    def by_parameter(self) -> bool:
        return False

    def takes_complex(self) -> bool:
        return True

    def init(self, params: Any) -> RuleState:
        state: RuleState = super().init(params)
        like = next(iter(self.leaves_of(params).params), torch.zeros(()))
        # Of one element, not 0-d: torch.compile would trace everything twice, see `pack`.
        one = beside(torch.ones(1, dtype=torch.float64, device=like.device), like)
        worst = one * (float("inf") if self.mode == "min" else float("-inf"))
        watched = {"scale": one, "best": worst, "bad": torch.zeros_like(one), "rest": torch.zeros_like(one)}
        return state._replace(leaves={**state.leaves, ALL: watched})

    def own_numbers(self, state: RuleState, dtype: torch.dtype) -> list[Tensor]:
        return [*super().own_numbers(state, dtype), *state.leaves[ALL].values()]

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        check_names(leaves.names, [name for name in state.leaves if name != ALL])
        hyper, old = self.hyper_now(state), state.leaves[ALL]
        assert isinstance(hyper, Tensor)
        scale, best = old["scale"], old["best"]
        h = unpack(hyper.to(scale.device), self.hyperparameters)
        value = torch.as_tensor(needed(self, leaves, "value"), dtype=scale.dtype, device=scale.device).detach()
        sign = 1.0 if self.mode == "min" else -1.0
        margin = h["threshold"] * (best.abs() if self.threshold_mode == "rel" else 1.0)
        better = (value * sign < best * sign - margin) | (best.isinf() & value.isfinite())
        resting = old["rest"] > 0
        bad = torch.where(better | resting, 0.0, old["bad"] + 1)
        due = bad > self.patience
        new = {
            "scale": torch.where(due, torch.maximum(scale * h["factor"], h["min_scale"]), scale),
            "best": torch.where(better, value, best),
            "bad": torch.where(due, 0.0, bad),
            "rest": torch.where(due, float(self.cooldown), (old["rest"] - 1).clamp(min=0.0)),
        }
        new = {name: entry.to(scale.dtype) for name, entry in new.items()}
        grads: Updates = [None if g is None else (g * scale.to(g.dtype)).reshape(g.shape) for g in leaves.grads]
        return grads, state.after({**state.leaves, ALL: new})
