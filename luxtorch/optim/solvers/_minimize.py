"""`minimize`: L-BFGS with a line search, on a function of the parameters; its derivatives are those of the minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import functional, recorders, traced, vectorized
from luxtorch.autodiff import gradient
from luxtorch.core import DTypeError, InputError, map_tensors, tensors
from luxtorch.loops import custom_root

from .._leaves import from_components, pair, rebuild, to_components
from .._opt_state import OptState
from .._rule_state import ALL, RuleState, check_names
from ._lbfgs import LBFGS, check_size, flatten, unflatten
from ._objective import FlatObjective, check_differentiable
from ._search import Limits, MinimizeResult, by_numbers, by_tensors


def minimize(
    f: Callable[..., Tensor],
    opt_state: OptState,
    ps: Any,
    *operands: Any,
    max_iter: int = 100,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
) -> tuple[OptState, Any, MinimizeResult]:
    """Minimize a function by L-BFGS, with a line search along each direction that ends at the strong Wolfe conditions.

    The state remembers the curvature: a call goes on where another one, or `update`, has ended, be it with other data.
    Two calls of 50 iterations are one of 100, but for one more evaluation.

    It runs inside of `vmap`, where each model ends by itself, and of `lt.jit`, as one loop; `f` may use any transform.
    A loss that is not finite is a step too far: a shorter one is tried.

    What is found is a zero of the gradient, and has the derivatives that this equation gives it, as in
    `lt.custom_root`: by the operands, by what `f` closes over, and by frozen parameters, in any order, without those of
    the steps. They are as exact as the minimum is, and there are none where the Hessian is singular. The loss that is
    returned has them, too; the state, and where the search began, count as constants. With more than 512 parameters
    all that is differentiated must be an operand. On an autograd tape, without transforms, only operands that require
    grad have derivatives: whatever else a search closes over is a constant to it, as it is to `torch.optim`.

    Args:
        f: A pure function of the parameters, and of the operands, that returns a scalar.
        opt_state: The state, from `setup` with `LBFGS`.
        ps: The parameters: a ComponentVector, nested dicts of tensors, or a tensor. What is frozen stays.
        *operands: What `f` takes besides, any trees.
        max_iter: How many iterations to do at most.
        max_eval: After how many evaluations to begin no other iteration; by default five for four iterations. A line
            search ends with them, too.
        tolerance_grad: How large the largest absolute element of the gradient may be at a minimum.
        tolerance_change: The least change of the parameters, or of the loss, that is worth another iteration.

    Returns:
        `(opt_state, ps, result)`: the new state, the new parameters, and how it ended, see `MinimizeResult`, whose
        fields are tensors inside of transforms and of `lt.jit`.

    Raises:
        InputError: If the function does not return a scalar, if it is not finite from the start (inside of vmap and
            `lt.jit`, where nothing is known of numbers, the result says so instead), if the state is that of other
            shapes or of many models, or inside of torch.compile or inference mode.
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

        Many fits at once, and how each depends on its penalty: the minimum of (x - 1)^2 + a x^2 is at 1 / (1 + a).

        >>> def fit(a):
        ...     x = torch.tensor(0.0)
        ...     f = lambda x, a: (x - 1) ** 2 + a * x**2
        ...     _, x, result = optim.minimize(f, optim.setup(optim.LBFGS(), x), x, a)
        ...     return x, result
        >>> a = torch.tensor([0.0, 1.0, 3.0])
        >>> x, result = torch.vmap(fit)(a)
        >>> x, result.why()
        (tensor([1.0000, 0.5000, 0.2500]), ['gradient', 'gradient', 'gradient'])
        >>> torch.vmap(torch.func.grad(lambda a: fit(a)[0]))(a)
        tensor([-1.0000, -0.2500, -0.0625])

    The iterates are those of `torch.optim.LBFGS` with `line_search_fn="strong_wolfe"`, whose `step` this is, and so are
    all defaults but `max_iter`, which is 20 there.
    """
    limits = Limits(max_iter, max_iter * 5 // 4 if max_eval is None else max_eval, tolerance_grad, tolerance_change)
    limits.check()
    rule, state = _checked(opt_state, ps)
    inside = traced() or functional()
    if inside or (torch.is_grad_enabled() and any(one.requires_grad for one in tensors(operands))):
        ps, state, result = _differentiable(f, opt_state.layout.frozen, ps, operands, rule, state, limits)
        return OptState(opt_state.layout, state), ps, result
    with torch.no_grad():
        evaluate = FlatObjective(lambda ps: f(ps, *operands), ps, opt_state.layout.frozen)
        check_size(evaluate.start, state.leaves[ALL])
        x, state, result = by_numbers(evaluate, rule, state, limits)
        return OptState(opt_state.layout, state), evaluate.tree(x) if result.iterations else ps, result


def _differentiable(
    f: Callable[..., Tensor],
    frozen: tuple[str, ...],
    ps: Any,
    operands: tuple[Any, ...],
    rule: LBFGS,
    state: RuleState,
    limits: Limits,
) -> tuple[Any, RuleState, MinimizeResult]:
    """Return what was found with the derivatives of a root of the gradient, by all but the parameters that move."""
    names, leaves, _, in_parts, _ = pair(to_components(ps), None)
    check_differentiable(names, leaves)
    moves = [name not in frozen for name in names]
    moving = [p for p, free in zip(leaves, moves, strict=True) if free]
    still = [p for p, free in zip(leaves, moves, strict=True) if not free]

    def whole(z: Tensor, still: list[Tensor]) -> Any:
        """Return the parameters, of which a vector holds those that move."""
        found, kept = iter(unflatten(z, moving, bool(in_parts))), iter(still)
        tree = rebuild(to_components(ps), iter([next(found if free else kept) for free in moves]))
        return from_components(ps, tree)

    def slope(z: Tensor, still: list[Tensor], *operands: Any) -> Tensor:
        return gradient(lambda z: f(whole(z, still), *operands), z)  # type: ignore[no-any-return]

    ended: list[tuple[RuleState, MinimizeResult]] = []

    def solve(_: Any, z: Tensor) -> Tensor:
        start, fixed, before = map_tensors(Tensor.detach, (ps, operands, state))
        evaluate = FlatObjective(lambda ps: f(ps, *fixed), start, frozen)
        check_size(evaluate.start, before.leaves[ALL])
        search = by_tensors if traced() or vectorized() else by_numbers
        x, after, result = search(evaluate, rule, before, limits)
        ended.append((after, result))
        parts = pair(to_components(evaluate.tree(x)), None).params
        return flatten([part for part, free in zip(parts, moves, strict=True) if free])

    z = flatten(moving)
    if z.numel():
        z = custom_root(slope, z, solve, still, *operands)
    else:
        with torch.no_grad():
            solve(None, z)
    ps = whole(z, still)
    ((state, result),) = ended
    if traced() or functional():
        result = result.in_tensors(z)
    loss = f(ps, *operands) if torch.is_grad_enabled() or functional() else None
    if loss is not None and any(recorders(loss)):
        result = result._replace(loss=loss)
    return ps, state, result


def _checked(opt_state: OptState, ps: Any) -> tuple[LBFGS, RuleState]:
    """Return the rule and its state, or raise where they cannot be used on these parameters, or here."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        raise InputError(
            "minimize does not run inside of torch.compile or inference mode.",
            fix="Compile by lt.jit, take steps by optim.update, or call it outside.",
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
            fix="Call minimize inside of torch.vmap.",
        )
    return rule, state
