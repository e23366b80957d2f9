"""`minimize`: L-BFGS with a line search, on a function of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.autodiff._gradient import differentiate
from luxtorch.core import DTypeError, InputError, out_of_range

from .._leaves import pair, rebuild, to_components
from .._opt_state import OptState
from .._rule_state import ALL, RuleState, check_names
from ._lbfgs import LBFGS, can_read, check_size, direction, flatten, mark, remember, unflatten
from ._line_search import Point, strong_wolfe


class MinimizeResult(NamedTuple):
    """Say how `minimize` has ended.

    Attributes:
        loss: The loss at the parameters that were found.
        grad_norm: The largest absolute element of the gradient there.
        iterations: How many directions were searched along.
        evaluations: How often the function was called.
        reason: Why it ended. "gradient": `grad_norm` is small enough. "step", "loss", "slope": the parameters, or the
            loss, hardly moved, or would hardly move. "line search": nothing lower was found along the direction.
            "iterations", "evaluations": there may be no more.
    """

    loss: float
    grad_norm: float
    iterations: int
    evaluations: int
    reason: str

    @property
    def converged(self) -> bool:
        """Whether a tolerance was reached."""
        return self.reason in ("gradient", "step", "loss", "slope")


def minimize(
    f: Callable[[Any], Tensor],
    opt_state: OptState,
    ps: Any,
    *,
    max_iter: int = 100,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
) -> tuple[OptState, Any, MinimizeResult]:
    """Minimize a function by L-BFGS, with a line search along each direction that ends at the strong Wolfe conditions.

    The state remembers the curvature: a call goes on where another one, or `update`, has ended, be it with other data.
    Two calls of 50 iterations are one of 100, but for one more evaluation.

    How often to evaluate depends on numbers, so this is a loop in Python. It does not run inside of transforms or a
    compiler, and no derivatives flow through it; `f` itself may be compiled, and may use any transform. A loss that
    is not finite is a step too far: a shorter one is tried.

    Args:
        f: A pure function of the parameters that returns a scalar.
        opt_state: The state, from `setup` with `LBFGS`.
        ps: The parameters: a ComponentVector, nested dicts of tensors, or a tensor. What is frozen stays.
        max_iter: How many iterations to do at most.
        max_eval: After how many evaluations to begin no other iteration; by default five for four iterations. A line
            search ends with them, too.
        tolerance_grad: How large the largest absolute element of the gradient may be at a minimum.
        tolerance_change: The least change of the parameters, or of the loss, that is worth another iteration.

    Returns:
        `(opt_state, ps, result)`: the new state, the new parameters, and how it ended, see `MinimizeResult`.

    Raises:
        InputError: If the function does not return a scalar, if it is not finite from the start, if the state is
            that of other shapes or of many models, or inside of a transform, a compiler or inference mode.
        DTypeError: If the rule is not `LBFGS`, or the function returns something else than a real number.
        KeyNameError: If the state is that of other parameters.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> def rosenbrock(ps):
        ...     return (1 - ps["x"]) ** 2 + 100 * (ps["y"] - ps["x"] ** 2) ** 2
        >>> ps = {"x": torch.tensor(-1.0), "y": torch.tensor(2.0)}
        >>> opt_state = optim.setup(optim.LBFGS(), ps)
        >>> opt_state, ps, result = optim.minimize(rosenbrock, opt_state, ps)
        >>> ps, result.converged
        ({'x': tensor(1.0000), 'y': tensor(1.0000)}, True)

    The iterates are those of `torch.optim.LBFGS` with `line_search_fn="strong_wolfe"`, whose `step` this is, and so are
    all defaults but `max_iter`, which is 20 there.
    """
    limits = _Limits(max_iter, max_iter * 5 // 4 if max_eval is None else max_eval, tolerance_grad, tolerance_change)
    limits.check()
    rule, state = _checked(opt_state, ps)
    with torch.no_grad():
        evaluate = FlatObjective(f, ps, opt_state.layout.frozen)
        check_size(evaluate.start, state.leaves[ALL])
        x, state, result = _search(evaluate, rule, state, limits)
        return OptState(opt_state.layout, state), evaluate.tree(x) if result.iterations else ps, result


class _Limits(NamedTuple):
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float

    def check(self) -> None:
        for name, value in self._asdict().items():
            least = 1 if name.startswith("max") else 0
            if not value >= least:
                raise out_of_range(name, value, f"at least {least}")

    def reason(self, g: Tensor, step: Tensor, change: float, iterations: int, evaluations: int) -> str:
        """Return why to end after an iteration, or nothing."""
        moved = _largest(step)
        if _largest(g) <= self.tolerance_grad:
            return "gradient"
        if moved == 0.0:
            return "line search" if evaluations < self.max_eval else "evaluations"
        if moved <= self.tolerance_change:
            return "step"
        if change < self.tolerance_change:
            return "loss"
        if iterations == self.max_iter:
            return "iterations"
        return "evaluations" if evaluations >= self.max_eval else ""


def _search(
    evaluate: FlatObjective, rule: LBFGS, state: RuleState, limits: _Limits
) -> tuple[Tensor, RuleState, MinimizeResult]:
    """Return the flat parameters that were found, the new state, and how it ended."""
    x, memory = evaluate.start, state.leaves[ALL]
    as_numbers = can_read(x, memory)
    loss, g = evaluate(x)
    if not (math.isfinite(loss) and math.isfinite(_largest(g))):
        raise InputError(
            "The loss or its gradient is not finite where the search begins.",
            expected="finite numbers",
            got=f"a loss of {loss}, and {_largest(g)} in the gradient",
            fix="Begin elsewhere.",
        )
    iterations, evaluations = 0, 1
    reason = "gradient" if _largest(g) <= limits.tolerance_grad else ""
    while not reason:
        known = evaluate.without_frozen(g, math.nan)
        memory = remember(memory, known, as_numbers)
        d = evaluate.without_frozen(direction(memory, g, as_numbers))
        start = Point(0.0, loss, g.dot(d).item(), g)
        if not start.slope <= -limits.tolerance_change:
            memory = {**memory, "grad": known, "step": torch.zeros_like(g)}
            reason = "slope"
            break

        def along(t: float, x: Tensor = x, d: Tensor = d) -> Point:
            loss, g = evaluate(torch.add(x, d, alpha=t))
            slope = g.dot(d).item()
            finite = math.isfinite(loss) and math.isfinite(slope)
            return Point(t, loss if finite else math.inf, slope, g)

        point, calls = strong_wolfe(
            along,
            start,
            rule.length(g, state, as_numbers).item(),
            speed=_largest(d),
            least=limits.tolerance_change,
            limit=limits.max_eval - evaluations,
        )
        iterations, evaluations = iterations + 1, evaluations + calls
        x = torch.add(x, d, alpha=point.t)
        memory = {**memory, "grad": known, "step": d * point.t}
        state = state.after(state.leaves)
        change, loss, g = abs(point.loss - loss), point.loss, point.grad
        reason = limits.reason(g, memory["step"], change, iterations, evaluations)
    state = state._replace(leaves={**state.leaves, ALL: memory})
    return x, state, MinimizeResult(loss, _largest(g), iterations, evaluations, reason)


def _checked(opt_state: OptState, ps: Any) -> tuple[LBFGS, RuleState]:
    """Return the rule and its state, or raise where they cannot be used on these parameters, or here."""
    if transformed() or torch.is_inference_mode_enabled():
        raise InputError(
            "minimize does not run inside of transforms, a compiler or inference mode.",
            fix="Take steps by optim.update there, or call it outside.",
        )
    rule = opt_state.layout.rule if isinstance(opt_state, OptState) else None
    if not isinstance(rule, LBFGS):
        raise DTypeError(
            "The line search is for LBFGS alone.",
            expected="(f, opt_state, ps), with opt_state = optim.setup(optim.LBFGS(), ps)",
            got=type(opt_state).__name__ if rule is None else repr(opt_state),
        )
    state: RuleState = opt_state.state
    check_names(pair(to_components(ps), None).names, opt_state.layout.names)
    memory = state.leaves[ALL]
    if memory["grad"].ndim > 1:
        raise InputError(
            "The state is that of many models.",
            expected="one model",
            got=f"{memory['grad'].shape[0]} models",
            fix="Minimize one model at a time.",
        )
    return rule, state


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


Objective: TypeAlias = "Callable[[Any], Tensor]"
"""Takes the parameters to a number."""


class FlatObjective:
    """Evaluate a function at parameters that are given as one vector, in plain eager code.

    Args:
        f: The function.
        ps: Parameters of the structure that it takes.
        frozen: The names of those that are frozen: their derivatives are zero.

    Attributes:
        start: The parameters as a vector.
        frozen: Which of its elements are frozen; None if none is.
    """

    def __init__(self, f: Objective, ps: Any, frozen: tuple[str, ...]) -> None:
        self.f, self.ps = f, ps
        names, self.leaves, _, in_parts, _ = pair(ps, None)
        self._apart = bool(in_parts)
        for name, p in zip(names, self.leaves, strict=True):
            if not p.is_floating_point():
                raise DTypeError("A parameter is not differentiable.", got=str(p.dtype), where=name or "the parameter")
        self.start = flatten(self.leaves)
        names, tensors, *_ = pair(to_components(ps), None)
        self.frozen = mark(tensors, [name in frozen for name in names]) if frozen else None

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the value and the gradient."""

        def loss_of(leaves: list[Tensor]) -> tuple[Tensor, None]:
            return _check(self.f(rebuild(self.ps, iter(leaves)))), None

        loss, _, grads = differentiate(loss_of, self.parts(x))
        return loss.item(), self.without_frozen(flatten(grads))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the leaves of the parameters that a vector holds, the parts of complex ones."""
        return unflatten(x, self.leaves, self._apart)

    def without_frozen(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Return a vector with another value for what is frozen."""
        return x if self.frozen is None else x.masked_fill(self.frozen, value)

    def tree(self, x: Tensor) -> Any:
        """Return a vector as a tree of the parameters, in memory of its own."""
        return rebuild(self.ps, (part.clone() for part in self.parts(x)))


def _check(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise InputError(
            "The function does not return a scalar.",
            expected="a tensor of shape ()",
            got=f"a {type(loss).__name__}{shape}",
            fix="Reduce it, for instance by .mean(); nothing can be returned besides.",
        )
    if not loss.is_floating_point():
        raise DTypeError("The loss is not a real floating point number.", got=str(loss.dtype))
    return loss
