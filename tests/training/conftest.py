"""What the tests of training share: a model with every kind of state, its data, and a way to compare trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training

MODEL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.25), lt.Dense(4, 2))

TREES = {"dict": lambda ps: ps, "vector": lt.ComponentVector}


@pytest.fixture(scope="session")
def equal() -> Callable[..., None]:
    """Return a function that asserts that two trees are the same, bit for bit unless a tolerance is given."""

    def check(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
        leaves, spec = pytree.tree_flatten(a)
        others, other_spec = pytree.tree_flatten(b)
        assert spec == other_spec
        torch.testing.assert_close(leaves, others, rtol=rtol, atol=atol, equal_nan=True)

    return check


@pytest.fixture(scope="session")
def objective() -> Callable[..., Any]:
    """Return an objective with statistics of several dtypes."""

    def function(model: Any, ps: Any, st: Any, data: Any) -> Any:
        x, y = data
        y_hat, st = model(x, ps, st)
        return (y_hat - y).square().mean(), st, {"largest": y_hat.max(), "count": torch.tensor(len(x))}

    return function


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return TREES[request.param]


@pytest.fixture
def data(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return normal(8, 3), normal(8, 2)


@pytest.fixture
def new(make_key: Callable[[], Tensor]) -> Callable[..., training.TrainState]:
    """Return a function that makes training states, all with the same initial values."""
    key = make_key()

    def make(tree: Any = dict, rule: Any = None, model: Any = MODEL, dtype: Any = torch.float64) -> training.TrainState:
        ps, st = lt.cpu_device(dtype=dtype)(lt.setup(key, model))
        return training.TrainState(model, tree(ps), st, optim.Adam(0.05) if rule is None else rule)

    return make
