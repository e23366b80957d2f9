"""What depends on hyperparameters and counts alone is computed once for all leaves, and each leaf steps as if alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import luxtorch as lt
from luxtorch import optim
from luxtorch.jit._trace import record
from luxtorch.optim._rule_state import COUNTS

EXPORTED = {name: rule for name, rule in vars(optim).items() if inspect.isclass(rule)}
OTHERS = {
    "AdaGrad": {"lr_decay": 0.1},
    "ASGD": {"t0": 1.0},
    "RMSProp": {"centered": True, "momentum": 0.9},
    "Muon": {"ns_dtype": torch.float64},
    "SGD": {"momentum": 0.9, "dampening": 0.3},
}
"""Arguments with which a rule does more than by its defaults."""

RULES = {
    name: rule(**OTHERS.get(name, {}))
    for name, rule in EXPORTED.items()
    if issubclass(rule, optim.LeafwiseRule) and rule is not optim.LeafwiseRule
}
every_rule = pytest.mark.parametrize("name", RULES)


def draw(rng: torch.Generator, n: int) -> dict[str, Tensor]:
    return {f"leaf_{i}": torch.randn(3, 2 + i % 2, generator=rng, dtype=torch.float64) for i in range(n)}


def scalar_operators(rule: optim.LeafwiseRule, ps: dict[str, Tensor]) -> int:
    """Return how many operators of a step depend on hyperparameters and counts alone."""
    opt_state = optim.setup(rule, ps)
    counts = [(leaf, slot) for leaf, slots in opt_state.state.leaves.items() for slot in slots if slot in COUNTS]
    state: Any = opt_state.state

    def step(hyper: Tensor, *tensors: Tensor) -> list[Tensor]:
        given, params = tensors[: len(counts)], tensors[len(counts) :]
        leaves = {leaf: dict(slots) for leaf, slots in state.leaves.items()}
        for (leaf, slot), value in zip(counts, given, strict=True):
            leaves[leaf][slot] = value
        # What is remembered of elements must not count as a constant.
        others = zip(leaves.items(), params, strict=True)
        leaves = {n: {s: v if s in COUNTS else v + p.sum() for s, v in slots.items()} for (n, slots), p in others}
        old = optim._opt_state.OptState(opt_state.layout, state._replace(hyper=hyper, leaves=leaves))
        named = dict(zip(ps, params, strict=True))
        return tree_leaves(optim.update(old, named, {name: p.sin() for name, p in named.items()}))

    given = [state.leaves[leaf][slot] for leaf, slot in counts]
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor) for tensor in (state.hyper, *given, *ps.values())]
    graph = record(step, fakes, {})
    placeholders = graph.graph.find_nodes(op="placeholder")
    alone = set(placeholders[: 1 + len(given)])
    found = 0
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and all(one in alone for one in node.all_input_nodes):
            alone.add(node)
            found += isinstance(node.target, torch._ops.OpOverload)
    return found


@every_rule
def test_terms_are_not_computed_for_each_leaf(name, rng):
    rule = RULES[name]
    few, many = (scalar_operators(rule, draw(rng, n)) for n in (2, 10))
    counts = sum(slot in COUNTS for slot in rule.slots(torch.zeros(3, 2)))
    assert (many - few) / 8 <= counts + 1  # the next counts, and at most one comparison


def test_a_step_of_adam_has_few_operators_for_each_leaf(rng):
    def operators(n: int) -> int:
        ps = draw(rng, n)
        step = lt.jit(lambda state, ps: optim.update(state, ps, ps), backend="replay")
        return step.lower(optim.setup(optim.Adam(), ps), ps).graph.count("torch.ops.")

    assert (operators(10) - operators(2)) / 8 <= 19


def steps(opt_state: Any, ps: Any, grads: list[Any]) -> Any:
    """Take steps by formula."""
    step = lt.jit(optim.update, backend="replay")
    for g in grads:
        opt_state, ps = step(opt_state, ps, g)
    return opt_state, ps


@every_rule
@pytest.mark.parametrize("by_path", [False, True], ids=["one rate", "rates by path"])
def test_leaves_step_as_if_alone(name, by_path, rng):
    rule, ps = RULES[name], draw(rng, 4)
    grads: list[dict[str, Any]] = [draw(rng, 4) for _ in range(5)]
    grads[1]["leaf_2"] = grads[3]["leaf_2"] = None  # its counts are other ones from then on

    def setup(ps: dict[str, Tensor]) -> optim.OptState:
        opt_state = optim.setup(rule, ps)
        if by_path and "leaf_1" in ps and "lr" in rule.hyperparameters:
            opt_state = optim.adjust(opt_state, lr=0.03, path=["leaf_1"])
        return opt_state

    opt_state, new = steps(setup(ps), ps, grads)
    for leaf in ps:
        alone = {leaf: ps[leaf]}
        own_state, own = steps(setup(alone), alone, [{leaf: g[leaf]} for g in grads])
        assert torch.equal(new[leaf], own[leaf])
        for slot, value in own_state.state.leaves[leaf].items():
            assert torch.equal(opt_state.state.leaves[leaf][slot], value), slot


@every_rule
def test_derivatives_by_all_hyperparameters_are_the_sum_of_each_leaf(name, rng):
    rule, ps = RULES[name], draw(rng, 3)
    grads: list[dict[str, Any]] = [draw(rng, 3) for _ in range(3)]
    grads[1]["leaf_2"] = None

    def loss(hyper: Tensor, names: list[str]) -> Tensor:
        params = {leaf: ps[leaf] for leaf in names}
        opt_state = optim.setup(rule, params)
        opt_state = optim._opt_state.OptState(opt_state.layout, opt_state.state._replace(hyper=hyper))
        for g in grads:
            opt_state, params = optim.update(opt_state, params, {leaf: g[leaf] for leaf in names})
        return sum(((p - 1) ** 2).sum() for p in params.values())

    hyper = optim.setup(rule, ps).state.hyper
    slope = torch.func.grad(loss)(hyper, list(ps))
    alone = sum(torch.func.grad(loss)(hyper, [leaf]) for leaf in ps)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope, alone, rtol=1e-10, atol=1e-10)
    tangent = torch.linspace(0.5, 1.5, len(hyper), dtype=hyper.dtype)
    _, forward = torch.func.jvp(lambda h: loss(h, list(ps)), (hyper,), (tangent,))
    torch.testing.assert_close(forward, (slope * tangent).sum(), rtol=1e-8, atol=1e-8)
