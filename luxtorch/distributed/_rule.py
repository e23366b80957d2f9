"""A rule that averages the gradients of all ranks before another rule sees them."""

from __future__ import annotations

from typing import Any

from torchopt.base import ChainedGradientTransformation, GradientTransformation
from typing_extensions import Self

from luxtorch.core import DTypeError

from ._average import average_gradients


class DistributedRule(ChainedGradientTransformation):
    """Average the gradients of all ranks, then do what another rule does.

    It is a chain of two gradient transformations, of which the first is `average_gradients`. A rule that collects
    gradients of several calls, such as `AccumGrad`, belongs into an `OptimiserChain` inside of it. Frozen and missing
    gradients do not travel. It is not for sharded parameters: `gather_parameters` averages their gradients.

    Args:
        rule: A rule of `luxtorch.optim`, or a torchopt optimizer.

    Attributes:
        rule: The rule.

    Raises:
        DTypeError: If it is no gradient transformation.

    Example:
        >>> import torch
        >>> from luxtorch import distributed, optim
        >>> ps = {"weight": torch.ones(2)}
        >>> opt_state = optim.setup(distributed.DistributedRule(optim.Descent(0.5)), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2)})
        >>> ps
        {'weight': tensor([0.5000, 0.5000])}

    Source: `DistributedOptimizer` of Lux's DistributedUtils.
    """

    rule: GradientTransformation

    def __new__(cls, rule: GradientTransformation) -> Self:
        if not isinstance(rule, GradientTransformation):
            raise DTypeError(
                "The rule is not a gradient transformation.",
                expected="a rule such as optim.Adam(1e-3), or a torchopt optimizer",
                got=repr(rule) if isinstance(rule, type) else type(rule).__name__,
                fix="torch.optim optimizers change parameters in place; use the rule of the same name here.",
            )
        self = super().__new__(cls, _AVERAGE, rule)
        self.rule = rule
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return DistributedRule, (self.rule,)

    def __repr__(self) -> str:
        return f"DistributedRule({self.rule!r})"


def _init(params: Any) -> tuple[()]:
    return ()


def _update(updates: Any, state: Any, *, params: Any = None, inplace: bool = False) -> tuple[Any, Any]:
    return average_gradients(updates), state


_AVERAGE = GradientTransformation(_init, _update)
