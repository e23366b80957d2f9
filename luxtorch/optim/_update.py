"""`setup` and `update`: an optimizer's state before the first step, and one step."""

from __future__ import annotations

from typing import Any

from ._leaves import components, from_components, pair, rebuild, to_components, vectors, with_extra
from ._opt_state import Layout, OptState
from ._rule import GradientTransformation
from .modifiers._chain import as_rule


def setup(rule: GradientTransformation, ps: Any) -> OptState:
    """Return the state of an optimizer before the first step.

    Args:
        rule: A rule of this package, or any torchopt optimizer or chain. torchopt's are used as they are, but
            never in place; a torchopt chain of rules of this package becomes an `OptimiserChain`.
        ps: The parameters: nested dicts of tensors, a ComponentVector, a tensor, or any pytree of these; on the
            device where they will be trained. The hyperparameters stay on the CPU: there the kernels read them.

    A complex parameter steps as torch.optim has it: a rule, and its state, has real and imaginary parts as numbers of
    their own, in a last dimension of two.

    Returns:
        The state: a pytree of tensors, for `update`.

    Raises:
        InputError: If a torchopt chain has a rule that works in an `OptimiserChain` only.
        DTypeError: If the rule is not a gradient transformation, if a parameter is not a tensor, or if it is complex
            and the rule is one for matrices, such as `Muon`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> optim.setup(optim.Descent(0.01), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        OptState(Descent(lr=0.01), 2 parameters)

    The name is that of Optimisers.jl.
    """
    own = as_rule(rule)
    axes, leaves = vectors(ps), pair(ps, None)
    names = [part for name in leaves.names for part in (components(name, axes[name]) if name in axes else [name])]
    apart = bool(axes) and own.splits_vectors()
    layout = Layout(
        own.bare(),
        tuple(names),
        vectors=tuple(axes.items()),
        by_component=apart,
        in_parts=tuple(name for name in axes if name in leaves.in_parts),
    )
    return OptState(layout, own.init(to_components(ps) if apart else ps))


def update(opt_state: OptState, ps: Any, grads: Any, **extra: Any) -> tuple[OptState, Any]:
    """Take one step, out of place.

    Args:
        opt_state: The state, from `setup` or from the step before.
        ps: The parameters.
        grads: The gradients, a tree like `ps`. Where a leaf or a whole subtree is None or not there, the
            parameters and what the optimizer remembers of them are left alone: no decay, no step counted.
            NaN in a gradient goes through to its parameter.
        **extra: What some rules ask for besides: `value`, the loss; `value_fn`, a function of the parameters that
            returns it; `hessian`, the diagonal of its Hessian, a tree like `ps`. Other rules ignore them.

    Returns:
        The new state and the new parameters. Nothing that was passed is changed; what is left alone is shared.

    Raises:
        KeyNameError: If the gradients have a name that the parameters lack, or the state is that of other
            parameters.
        InputError: If the structure or a shape differs.
        DTypeError: If a dtype differs.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.ones(2), "bias": torch.ones(1)}
        >>> opt_state = optim.setup(optim.Descent(0.5), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2), "bias": None})
        >>> ps
        {'weight': tensor([0.5000, 0.5000]), 'bias': tensor([1.])}

    The name is that of Optimisers.jl.
    """
    layout = opt_state.layout
    tree = ps
    if layout.by_component:
        tree, grads = to_components(ps), to_components(grads)
    leaves = pair(tree, grads)
    if extra:
        whole = (lambda new: from_components(ps, new)) if layout.by_component else None
        leaves = with_extra(leaves, tree, extra, whole)
    if layout.frozen:
        frozen = set(layout.frozen)
        grads = [None if name in frozen else g for name, g in zip(leaves.names, leaves.grads, strict=True)]
        leaves = leaves._replace(grads=grads)
    if all(g is None for g in leaves.grads):
        return opt_state, ps
    params, state = layout.rule.step(leaves, opt_state.state)
    new = rebuild(tree, iter(params))
    return OptState(layout, state), from_components(ps, new) if layout.by_component else new


def eval_parameters(opt_state: OptState, ps: Any) -> Any:
    """Return the parameters to evaluate a model with.

    For most rules these are `ps` itself; for those that average, such as `ScheduleFreeAdamW` and `ASGD`, the average.

    Args:
        opt_state: The state.
        ps: The parameters that are trained.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2)}
        >>> opt_state = optim.setup(optim.ASGD(0.5, t0=0.0), ps)
        >>> for _ in range(3):
        ...     opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2)})
        >>> optim.eval_parameters(opt_state, ps)
        {'weight': tensor([-1.2499, -1.2499])}

    `schedule_free_eval_params` of optax.
    """
    layout = opt_state.layout
    tree = to_components(ps) if layout.by_component else ps
    leaves = pair(tree, None)
    params = layout.rule.eval_parameters(leaves, opt_state.state)
    if params is leaves.params:
        return ps
    new = rebuild(tree, iter(params))
    return from_components(ps, new) if layout.by_component else new
