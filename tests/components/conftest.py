"""What most tests of named vectors share: a nested tree with an empty group and a scalar, and a model on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luxtorch.components import ComponentVector


@pytest.fixture
def tree(rng: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    return {
        "layer_1": {"weight": normal(3, 2), "bias": normal(3)},
        "relu": {},
        "layer_2": {"inner": {"weight": normal(3)}},
        "scale": normal(),
    }


@pytest.fixture
def cv(tree: dict[str, Any]) -> ComponentVector:
    return ComponentVector(tree)


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.randn(2, generator=rng)


@pytest.fixture
def loss() -> Any:
    """A function of a tree, or of a ComponentVector, in which every leaf has a part."""

    def loss(ps: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(ps["layer_1"]["weight"] @ x + ps["layer_1"]["bias"])
        return (ps["scale"] * (ps["layer_2"]["inner"]["weight"] * hidden).sum()) ** 2

    return loss
