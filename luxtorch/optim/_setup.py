"""The state of an optimizer before the first step."""

from __future__ import annotations

from typing import Any

from torchopt.base import ChainedGradientTransformation, GradientTransformation

from luxtorch.core import DTypeError

from ._leaves import Leaves, components, pair, to_components, to_parts, vectors
from ._list_rule import ListRule
from ._opt_state import Layout, OptState, splits_vectors
from ._optimiserchain import as_one
from ._rule import structure_of


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
            and the rule is one for matrices, `Muon` or `Adafactor`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> optim.setup(optim.Descent(0.01), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        OptState(Descent(lr=0.01), 2 parameters)

    The name is that of Optimisers.jl.
    """
    if not isinstance(rule, GradientTransformation):
        raise DTypeError(
            "The rule is not a gradient transformation.",
            expected="a rule such as optim.Adam(1e-3), or a torchopt optimizer",
            got=repr(rule) if isinstance(rule, type) else type(rule).__name__,
            fix="torch.optim optimizers change parameters in place; use the rule of the same name here.",
        )
    rule = as_one(rule)
    axes, leaves = vectors(ps), pair(ps, None)
    names = [part for name in leaves.names for part in (components(name, axes[name]) if name in axes else [name])]
    apart = bool(axes) and splits_vectors(rule)
    layout = Layout(
        structure_of(rule),
        tuple(names),
        vectors=tuple(axes.items()),
        by_component=apart,
        in_parts=tuple(name for name in axes if name in leaves.in_parts),
    )
    tree = to_components(ps) if apart else ps
    if leaves.in_parts and not isinstance(rule, ListRule):
        _check_each(rule, pair(tree, None))
        tree = to_parts(tree)
    return OptState(layout, rule.init(tree))


def _check_each(rule: GradientTransformation, leaves: Leaves) -> None:
    """Raise unless the rules of this package in a torchopt chain can step on these parameters."""
    if isinstance(rule, ListRule):
        rule.check(leaves)
    elif isinstance(rule, ChainedGradientTransformation):
        for part in rule.transformations:
            _check_each(part, leaves)
