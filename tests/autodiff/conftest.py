"""One small network over every kind of parameter tree, and a flat form of it for torch.autograd.functional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch.components import ComponentVector

Tree = Any


class Problem(NamedTuple):
    """A network of a parameter tree, its loss, and a direction in the space of the parameters."""

    ps: Tree
    net: Callable[[Tree], Tensor]
    loss: Callable[[Tree], Tensor]
    direction: Tree

    def flat(self, f: Callable[[Tree], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function as one of a flat vector."""
        return lambda vector: f(self.unravel(vector))

    def ravel(self, tree: Tree) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])

    def unravel(self, vector: Tensor) -> Tree:
        leaves, spec = pytree.tree_flatten(self.ps)
        parts = vector.split([leaf.numel() for leaf in leaves])
        return pytree.tree_unflatten([part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)], spec)


def _read(ps: Tree) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(ps, Tensor):
        return ps[:6].view(2, 3), ps[6:8], ps[8]
    return ps["dense"]["weight"], ps["dense"]["bias"], ps["scale"]


@pytest.fixture(params=["tensor", "dict", "ComponentVector"])
def problem(request: pytest.FixtureRequest, rng: torch.Generator) -> Problem:
    """A problem of nine parameters in float64."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def make() -> Tree:
        if request.param == "tensor":
            return draw(9)
        tree = {"dense": {"weight": draw(2, 3), "bias": draw(2)}, "scale": draw(), "no_parameters": {}}
        return ComponentVector(tree) if request.param == "ComponentVector" else tree

    x = draw(4, 3)

    def net(ps: Tree) -> Tensor:
        weight, bias, scale = _read(ps)
        return torch.tanh(x @ weight.T + bias) * scale

    return Problem(make(), net, lambda ps: (net(ps) ** 3).sum(), make())
