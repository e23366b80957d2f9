"""The rules, with the references they are compared to, and the kinds of trees they are run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from torch import Tensor

from luxtorch import optim
from luxtorch.components import ComponentVector


class Case(NamedTuple):
    """A rule and torch.optim's optimizer with the same numbers."""

    rule: optim.LeafwiseRule
    reference: Callable[[list[Tensor]], torch.optim.Optimizer]


CASES = {
    "descent": Case(optim.Descent(), lambda ps: torch.optim.SGD(ps, lr=0.1)),
    "momentum": Case(optim.Momentum(), lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9)),
    "momentum-0.5": Case(optim.Momentum(0.05, 0.5), lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.5)),
    "nesterov": Case(optim.Nesterov(), lambda ps: torch.optim.SGD(ps, lr=0.001, momentum=0.9, nesterov=True)),
    "adam": Case(optim.Adam(), lambda ps: torch.optim.Adam(ps)),
    "adam-eps": Case(
        optim.Adam(0.02, (0.8, 0.95), 1e-2), lambda ps: torch.optim.Adam(ps, lr=0.02, betas=(0.8, 0.95), eps=1e-2)
    ),
    "adam-no-average": Case(optim.Adam(betas=(0.0, 0.0)), lambda ps: torch.optim.Adam(ps, betas=(0.0, 0.0))),
    "adamw": Case(optim.AdamW(), lambda ps: torch.optim.AdamW(ps)),
    "adamw-decay": Case(
        optim.AdamW(0.05, weight_decay=0.3), lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3)
    ),
}

TORCHOPT = {
    "sgd": lambda: torchopt.sgd(0.1),
    "sgd-momentum": lambda: torchopt.sgd(0.1, momentum=0.9),
    "adam": lambda: torchopt.adam(0.01),
    "adamw": lambda: torchopt.adamw(0.01, weight_decay=0.1),
    "rmsprop": lambda: torchopt.rmsprop(0.01),
    "clip-adam": lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.adam(0.01)),
    "clip-ours": lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), optim.Adam(0.01)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=sorted({type(case.rule).__name__ for case in CASES.values()}))
def rule(request: pytest.FixtureRequest) -> optim.LeafwiseRule:
    """Each rule once, with a learning rate that shows."""
    return getattr(optim, request.param)(lr=0.05)


@pytest.fixture(params=TORCHOPT)
def foreign(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return TORCHOPT[request.param]


class Kind(NamedTuple):
    """A kind of tree: made from nested dicts, and read back as a list of leaves."""

    make: Callable[[dict[str, Any]], Any]
    leaves: Callable[[Any], list[Tensor]]


def _leaves(tree: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


KINDS = {
    "dict": Kind(lambda tree: tree, _leaves),
    "vector": Kind(ComponentVector, lambda cv: _leaves(cv.to_dict())),
    "tensor": Kind(lambda tree: torch.cat([leaf.flatten() for leaf in _leaves(tree)]), lambda flat: [flat]),
    "mixed": Kind(
        lambda tree: {"vector": ComponentVector({"layer_1": tree["layer_1"]}), "rest": (tree["layer_2"],)},
        lambda tree: _leaves([tree["vector"].to_dict(), tree["rest"]]),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def draw(rng: torch.Generator) -> Callable[..., dict[str, Any]]:
    """Return a function that draws trees of random tensors, all of the same structure."""

    def tree(*batch: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*batch, *shape, generator=rng, dtype=torch.float64).to(dtype)

        return {
            "layer_1": {"weight": normal(3, 2), "bias": normal(3)},
            "layer_2": {"weight": normal(1, 3), "bias": normal(1)},
        }

    return tree
