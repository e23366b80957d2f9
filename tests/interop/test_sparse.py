"""Lookups of converted modules have dense gradients, also where torch's would be sparse, with the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import luxtorch as lt
from luxtorch import ComponentVector, optim, training

BAGS = [
    {"mode": mode, **options}
    for mode in ("sum", "mean")
    for options in ({}, {"padding_idx": 1}, {"max_norm": 0.7}, {"scale_grad_by_freq": True})
]
ROWS: list[dict[str, Any]] = [
    {},
    {"padding_idx": -2},
    {"max_norm": 0.7},
    {"max_norm": 0.7, "norm_type": 1.0, "padding_idx": 1},
    {"scale_grad_by_freq": True},
]


class Own(nn.Module):
    """Look up in a forward of its own."""

    def __init__(self, sparse: bool, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(10, 3))
        self.options = {"sparse": sparse, **options}

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight, **self.options)


class OwnBag(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding_bag(x, self.weight, **self.options)


class Raw(Own):
    """Look up by the functions below torch.nn."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.embedding(self.weight, x, sparse=self.options["sparse"])
        start = torch.zeros(1, dtype=torch.int64)
        return rows.sum() + torch.embedding_bag(self.weight, x.flatten(), start, sparse=self.options["sparse"])[0]


class Gathered(Own):
    """Read elements by torch.gather."""

    def forward(self, x: Tensor) -> Tensor:
        sparse = self.options["sparse"]
        return torch.gather(self.weight, 0, x, sparse_grad=sparse) * self.weight.gather(0, x + 1, sparse_grad=sparse)


class Deep(nn.Module):
    """Hold a lookup inside of modules of both kinds, and use its weight twice."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"table": nn.Embedding(10, 3, sparse=sparse)})
        self.bag = nn.EmbeddingBag(10, 3, mode="sum", sparse=sparse)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        rows = self.head(self.inner["table"](x)).sum(-2) + self.bag(x)
        return rows @ self.inner["table"].weight.T


class Derived(nn.Embedding):
    """Keep the forward of torch."""


MAKERS: dict[str, Callable[[bool], nn.Module]] = {
    **{f"Embedding {o}": lambda s, o=o: nn.Embedding(10, 3, sparse=s, **o) for o in ROWS},
    **{f"EmbeddingBag {o}": lambda s, o=o: nn.EmbeddingBag(10, 3, sparse=s, **o) for o in BAGS},
    **{f"F.embedding {o}": lambda s, o=o: Own(s, **o) for o in ROWS},
    **{f"F.embedding_bag {o}": lambda s, o=o: OwnBag(s, **o) for o in BAGS},
    "torch.embedding": Raw,
    "torch.gather": Gathered,
    "in a module": Deep,
    "in a chain": lambda s: nn.Sequential(nn.Embedding(10, 3, sparse=s), nn.Linear(3, 2)),
    "derived": lambda s: Derived(10, 3, sparse=s),
    "in a derived chain": lambda s: type("Net", (nn.Sequential,), {})(nn.Embedding(10, 3, sparse=s), nn.Linear(3, 2)),
}
RULES: dict[str, Any] = {
    "Descent": optim.Descent(0.1),
    "Adam": optim.Adam(0.1),
    "AdaGrad": optim.AdaGrad(0.1),
    "clipped": optim.OptimiserChain(optim.ClipNorm(0.1), optim.AdamW(0.1)),
    "RMSProp": optim.RMSProp(0.1),
    "Momentum": optim.Momentum(0.1),
}
KINDS = {"dict": lambda ps: ps, "vector": ComponentVector}
X = torch.tensor([[1, 2, 2], [8, 5, 0]])


def loss(layer: Any, ps: Any, st: Any, x: Tensor = X) -> Tensor:
    y: Tensor = layer(x, ps, st)[0]
    return (y.square() + y.sin()).sum()


def pair(make: Callable[[bool], nn.Module], rng: torch.Generator) -> tuple[nn.Module, nn.Module]:
    """Return a module with sparse gradients, and the same with dense ones."""
    sparse, dense = make(True), make(False)
    with torch.no_grad():
        for p in dense.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    sparse.load_state_dict(copy.deepcopy(dense.state_dict()))
    return sparse, dense


def tree(vector_or_dict: Any) -> dict[str, Tensor]:
    nested = vector_or_dict.to_dict() if isinstance(vector_or_dict, ComponentVector) else vector_or_dict
    return lt.flatten_names(nested)


def of_torch(module: nn.Module) -> dict[str, Tensor]:
    y = module(X)
    (y.square() + y.sin()).sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(g.layout is torch.strided for g in got.values())
    torch.testing.assert_close(got, expected)


def by_tape(layer: Any, ps: Any, st: Any) -> Any:
    taped = pytree.tree_map(lambda p: p.detach().clone().requires_grad_(), ps)
    loss(layer, taped, st).backward()
    return pytree.tree_map(lambda p: p.grad, taped)


def by_step(layer: Any, ps: Any, st: Any) -> Any:
    def objective(model, ps, st, x):
        return loss(model, ps, st, x), st, {}

    return training.single_train_step(objective, X, training.TrainState(layer, ps, st, optim.Descent(0.1)))[0]


WAYS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "func.grad": lambda layer, ps, st: torch.func.grad(lambda ps: loss(layer, ps, st))(ps),
    "gradient": lambda layer, ps, st: lt.gradient(lambda ps: loss(layer, ps, st), ps),
    "step": by_step,
    "tape": by_tape,
    "jit": lambda layer, ps, st: lt.jit(lambda ps: lt.gradient(lambda ps: loss(layer, ps, st), ps), backend="replay")(
        ps
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_dense(rng, name, way, kind):
    sparse, dense = pair(MAKERS[name], rng)
    layer, ps, st = lt.from_torch(sparse)
    expected = of_torch(dense)
    same(tree(WAYS[way](layer, KINDS[kind](ps), st)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["Embedding {}", "EmbeddingBag {'mode': 'sum'}", "F.embedding {}", "in a module"])
def test_every_rule_steps(rng, name, rule, kind):
    results = []
    for module in pair(MAKERS[name], rng):
        layer, ps, st = lt.from_torch(module)
        ts = training.TrainState(layer, KINDS[kind](ps), st, RULES[rule])
        for _ in range(3):
            *_, ts = training.single_train_step(lambda m, ps, st, x: (loss(m, ps, st, x), st, {}), X, ts)
        results.append(tree(ts.parameters))
    same(*results)


def test_a_module_made_of_it_again_has_dense_gradients(rng):
    sparse, dense = pair(MAKERS["Embedding {}"], rng)
    back = lt.to_torch(*lt.from_torch(sparse))
    same(of_torch(back), of_torch(dense))


@pytest.mark.parametrize("way", ["gradient", "step"])
def test_so_they_are_of_a_layer_of_ones_own(way):
    """A layer that is not converted may look up sparsely; what luxtorch returns is dense all the same."""

    class Table(lt.Layer):
        sparse: bool

        def initial_parameters(self, key):
            return {"weight": lt.init.normal(key, (10, 3))}

        def __call__(self, x, ps, st):
            return F.embedding(x, ps["weight"], sparse=self.sparse), st

    ps, st = lt.setup(0, Table(True))
    same(*(tree(WAYS[way](Table(sparse), ps, st)) for sparse in (True, False)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["F.embedding {}", "torch.embedding", "torch.gather", "in a module"])
def test_so_they_are_compiled(rng, name):
    sparse, dense = pair(MAKERS[name], rng)
    layer, ps, st = lt.from_torch(sparse)
    torch._dynamo.reset()
    slope = torch.compile(WAYS["func.grad"], backend="aot_eager", fullgraph=True)
    same(tree(slope(layer, ps, st)), of_torch(dense))
