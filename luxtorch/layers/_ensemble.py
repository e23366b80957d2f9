"""Many models of one kind as one layer: `Ensemble`."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import (
    InputError,
    KeyNameError,
    Layer,
    LuxtorchError,
    Parameters,
    States,
    WrapperLayer,
    named_leaves,
    nested_dicts,
    tree_map,
)
from luxtorch.core._nowhere import NOWHERE
from luxtorch.random import split

from ._chain import as_layer


class Ensemble(WrapperLayer):
    """Call n models of one kind, each with parameters, states and random numbers of its own, all at once.

    The members are what `lt.setup` makes of n keys, and their trees are those of the layer, stacked: `lt.unstack(ps)`
    lists them, and `lt.stack` makes an ensemble's parameters out of those of models trained apart.

    In a training, take the *sum* of the members' losses, so that the gradient of each is its own, and an optimizer that
    looks at more than one number at a time, such as `ClipNorm`, `LAMB`, `Adafactor`, `Muon` or `LBFGS`, as
    `optim.per_member(rule, n)`: by itself it would take the stack for one large model, and couple the members.

    Args:
        layer: A layer or a plain function.
        n: The number of members.
        same_input: Whether all members see the same input. If False, the input is a stack of n, one for each.

    Parameters:
        Those of the layer, not nested, each with a first dimension of n.

    States:
        Likewise.

    Shape:
        What the layer takes to a stack (n, ...) of what it returns; with `same_input=False`, a stack to a stack.

    Raises:
        InputError: If there is not at least one member.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Ensemble(lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dropout(0.1), lt.Dense(8, 1)), 16)
        >>> ps, st = lt.setup(0, model)
        >>> ps["layer_1"]["weight"].shape
        torch.Size([16, 8, 2])
        >>> y, st = model(torch.ones(4, 2), ps, st)
        >>> y.shape
        torch.Size([16, 4, 1])
        >>> mean, uncertainty = y.mean(0), y.std(0)

    Source: Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles", 2017.
    """

    layer: Layer
    n: int
    _: KW_ONLY
    same_input: bool = True

    def __post_init__(self) -> None:
        self._set(layer=as_layer(self.layer))
        if isinstance(self.n, bool) or not (isinstance(self.n, int) and self.n >= 1):
            raise InputError(
                "An ensemble takes a number of members.",
                expected="a whole number of at least 1",
                got=f"{self.n!r:.80}",
                fix="The order is lt.Ensemble(layer, 8).",
            )

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the members' parameters, drawn from keys of their own."""
        return _members(self.layer.initial_parameters, key, self.n)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the members' states, drawn from keys of their own."""
        return _members(self.layer.initial_states, key, self.n)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the members' outputs and states, stacked."""

        def member(_: Tensor, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
            return self.layer(x, ps, st)

        # The number is told by a tensor of its own, as the trees may have none; and the one leaf of a ComponentVector
        # has no dimension for the members.
        dims = (0, None if self.same_input else 0, 0, 0)
        many = torch.vmap(member, dims)
        try:
            result: tuple[Any, States] = many(torch.arange(self.n), x, nested_dicts(ps), st)
        except ValueError as error:
            # vmap itself has found a tensor that is no stack of n, unless a member's own error came through.
            unstacked = None if isinstance(error, LuxtorchError) else self._unstacked(ps, st)
            if unstacked is None:
                raise
            raise unstacked from error
        return result

    def _unstacked(self, ps: Parameters, st: States) -> LuxtorchError | None:
        """Explain trees with a tensor that is no stack of n, if that is what is wrong."""
        for kind, tree, initial in (
            ("parameter", nested_dicts(ps), self.initial_parameters),
            ("state", st, self.initial_states),
        ):
            wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(initial(NOWHERE))}
            for path, leaf in named_leaves(tree):
                shape = tuple(getattr(leaf, "shape", ()))
                if shape[:1] == (self.n,):
                    continue
                if path in wanted:
                    return InputError(
                        f"The {kind} '{path}' is not that of {self.n} members.",
                        expected=f"a tensor of shape {wanted[path]}",
                        got=f"a tensor of shape {shape}",
                        fix=f"Set the ensemble up with lt.setup, or stack the trees of {self.n} models with lt.stack.",
                    )
                *inside, name = path.split(".")
                error = KeyNameError(f"The layer has no {kind} '{name}'.", fix="Use the trees that lt.setup makes.")
                error.inside = tuple(inside)
                return error
        return None

    def expected_input(self) -> str:
        """Say that the input is a stack, if it is one."""
        return "" if self.same_input else f"a stack of {self.n} inputs, one for each member: tensors ({self.n}, ...)"

    def extra_repr(self) -> str:
        """Return for instance `n=16`."""
        return f"n={self.n}" + ("" if self.same_input else ", same_input=False")


def _members(initial: Any, key: Tensor, number: int) -> dict[str, Any]:
    """Return what `initial` makes of each of a number of keys, stacked."""
    made = torch.vmap(initial)(split(key, number))
    # vmap returns what is equal in all members once, as a view; a member's tensors are its own.
    return tree_map(lambda leaf: leaf.contiguous(), made)  # type: ignore[no-any-return]
