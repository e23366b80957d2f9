"""Reducing the learning rate when the loss has stopped improving: ReduceLROnPlateau."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from luxtorch.core import out_of_range
from luxtorch.core._sharded import beside

from .._hyperparameters import Number, Range, Share, unpack
from .._leaves import Leaves
from .._rule import ListRule, Updates, needed
from .._rule_state import ALL, RuleState, check_names


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
