"""Trees and steps that the tests of `jit` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.jit import _toolchain

compiled = pytest.mark.skipif(not _toolchain.has_compiler(), reason="no C++ compiler")
BACKENDS = ["replay", pytest.param("inductor", marks=[pytest.mark.slow, compiled])]


def stub(graph: torch.fx.GraphModule, fakes: list[Any]) -> Callable[..., Any]:
    """A backend of a user's own: the graph as torch.fx runs it."""
    return graph


@pytest.fixture
def same() -> Callable[..., None]:
    """Return the check that two trees have one structure, and the same numbers up to rounding."""

    def check(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
        assert optree.tree_structure(got) == optree.tree_structure(expected)
        for one, other in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
            if isinstance(other, Tensor):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_stride=False)
            else:
                assert type(one) is type(other) and one == other

    return check


@pytest.fixture
def batch(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, generator=rng), torch.randn(8, 2, generator=rng)


@pytest.fixture
def make_state(make_key: Callable[[], Tensor]) -> Callable[..., training.TrainState]:
    """Return a function that makes a training state, for parameters as a dict or a vector."""

    def make(model: Any = None, rule: Any = None, tree: str = "dict") -> training.TrainState:
        model = lt.Chain(lt.Dense(3, 5, torch.tanh), lt.Dense(5, 2)) if model is None else model
        ps, st = lt.setup(make_key(), model)
        ps = lt.ComponentVector(ps) if tree == "vector" else ps
        return training.TrainState(model, ps, st, optim.Adam(0.01) if rule is None else rule)

    return make


def train(ts: training.TrainState, batch: Any) -> tuple[Tensor, training.TrainState]:
    """Take a training step."""
    _, loss, _, ts = training.single_train_step(lt.MSELoss(), batch, ts)
    return loss, ts
