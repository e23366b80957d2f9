"""One step of an optimizer."""

from __future__ import annotations

from typing import Any

import torchopt
from torch import Tensor
from torchopt.base import ChainedGradientTransformation

from ._leaves import Leaves, from_components, pair, rebuild, to_components, to_parts
from ._list_rule import ListRule
from ._opt_state import OptState


def update(opt_state: OptState, ps: Any, grads: Any) -> tuple[OptState, Any]:
    """Take one step, out of place.

    Args:
        opt_state: The state, from `setup` or from the step before.
        ps: The parameters.
        grads: The gradients, a tree like `ps`. Where a leaf or a whole subtree is None or not there, the
            parameters and what the optimizer remembers of them are left alone: no decay, no step counted.
            NaN in a gradient goes through to its parameter.

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
    if layout.frozen:
        frozen = set(layout.frozen)
        grads = [None if name in frozen else g for name, g in zip(leaves.names, leaves.grads, strict=True)]
        leaves = leaves._replace(grads=grads)
    if all(g is None for g in leaves.grads):
        return opt_state, ps
    if isinstance(layout.rule, ListRule):
        params, state = layout.rule.step(leaves, opt_state.state)
    else:
        params, state = _step_of_torchopt(opt_state, to_parts(tree) if leaves.in_parts else tree, leaves)
    new = rebuild(tree, iter(params))
    return OptState(layout, state), from_components(ps, new) if layout.by_component else new


def _step_of_torchopt(opt_state: OptState, ps: Any, leaves: Leaves) -> tuple[list[Tensor], Any]:
    rule, state = opt_state.layout.rule, opt_state.state
    grads = rebuild(ps, iter(leaves.grads))
    if isinstance(rule, ChainedGradientTransformation):
        *firsts, last = rule.transformations
        if isinstance(last, ListRule) and last.descends:
            # As `rule.update` would do, but the last step is ours, with its kernel.
            *states, last_state = state
            for i, first in enumerate(firsts):
                grads, states[i] = first.update(grads, states[i], params=ps, inplace=False)
            params, last_state = last.step(pair(ps, grads), last_state)
            return params, (*states, last_state)
    updates, state = rule.update(grads, state, params=ps, inplace=False)
    return pair(torchopt.apply_updates(ps, updates, inplace=False), None).params, state
