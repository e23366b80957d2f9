"""Leaving some parameters alone for a while."""

from __future__ import annotations

from luxtorch.core._paths import Path, select

from ._by_component import by_component
from ._opt_state import OptState


def freeze(opt_state: OptState, path: Path = None) -> OptState:
    """Return a state whose steps leave some parameters, and what the optimizer remembers of them, alone.

    What is frozen is part of the state's structure, like a gradient that is not there: a frozen parameter costs
    nothing, and a compiled step is compiled once more when it is frozen. It is left out of a gradient norm that
    the rule may clip by.

    Args:
        opt_state: The state.
        path: A dotted path such as `"layer_1"`, which stands for everything below it, a glob such as `"*.bias"`, a
            predicate on dotted names, a list of these, or None for all; see `luxtorch.freeze`. The components of a
            ComponentVector have names too: once some of them are told apart, the vector's step is taken component by
            component.

    Returns:
        The new state.

    Raises:
        KeyNameError: If the path stands for no parameter.
        InputError: If components of a ComponentVector should be told apart in a torchopt optimizer.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.ones(2), "bias": torch.ones(1)}
        >>> opt_state = optim.freeze(optim.setup(optim.Descent(0.5), ps), "bias")
        >>> opt_state
        OptState(Descent(lr=0.5), 2 parameters, frozen: bias)
        >>> opt_state, ps = optim.update(opt_state, ps, ps)
        >>> ps
        {'weight': tensor([0.5000, 0.5000]), 'bias': tensor([1.])}

    The name is that of Optimisers.jl.
    """
    chosen = select(path, opt_state.layout.names)
    return _with_frozen(by_component(opt_state), chosen | set(opt_state.layout.frozen))


def thaw(opt_state: OptState, path: Path = None) -> OptState:
    """Return a state whose steps change parameters again that were frozen.

    Args:
        opt_state: The state.
        path: A dotted path, a glob, a predicate on dotted names, a list of these, or None for all; see `freeze`.

    Returns:
        The new state.

    Raises:
        KeyNameError: If the path stands for no parameter.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> opt_state = optim.setup(optim.Descent(0.5), {"weight": torch.ones(2), "bias": torch.ones(1)})
        >>> optim.thaw(optim.freeze(opt_state), "weight")
        OptState(Descent(lr=0.5), 2 parameters, frozen: bias)

    The name is that of Optimisers.jl.
    """
    chosen = select(path, opt_state.layout.names)
    return _with_frozen(opt_state, set(opt_state.layout.frozen) - chosen)


def _with_frozen(opt_state: OptState, frozen: set[str]) -> OptState:
    layout = opt_state.layout
    return OptState(layout._replace(frozen=tuple(name for name in layout.names if name in frozen)), opt_state.state)
