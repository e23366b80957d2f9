"""Groups of parameters with rules of their own, against torch.optim with one optimizer for each group."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
import torchopt
from torch import Tensor

from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, KeyNameError
from luxtorch.optim import AccumGrad, ClipNorm, Groups, MixedPrecision, OptimiserChain, WeightDecay, linear

NAMES = ["layer_1.weight", "layer_1.bias", "layer_2.weight", "layer_2.bias"]


def is_bias(name: str) -> bool:
    return name.endswith("bias")


def three(lr: Any = 0.05) -> Groups:
    """One group by path, one by predicate, and the rest."""
    groups = {"layer_1.weight": optim.Adam(lr), is_bias: optim.Descent(0.1)}
    return Groups(groups, rest=optim.AdamW(lr, weight_decay=0.3))


def three_of_torch(ps: list[Tensor]) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.Adam([ps[0]], lr=0.05),
        torch.optim.SGD([ps[1], ps[3]], lr=0.1),
        torch.optim.AdamW([ps[2]], lr=0.05, weight_decay=0.3),
    ]


@pytest.fixture(params=["dict", "vector", "mixed"])
def make(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return {
        "dict": lambda tree: tree,
        "vector": ComponentVector,
        "mixed": lambda tree: {**tree, "layer_1": ComponentVector(tree["layer_1"])},
    }[request.param]


def leaves(tree: Any) -> list[Tensor]:
    is_vector = lambda node: isinstance(node, ComponentVector)  # noqa: E731
    plain = pytree.tree_map(lambda node: node.to_dict() if is_vector(node) else node, tree, is_leaf=is_vector)
    return pytree.tree_leaves(plain)


def step(opt_state: optim.OptState, ps: Any, noise: Any) -> tuple[optim.OptState, Any]:
    return optim.update(opt_state, ps, pytree.tree_map(lambda p, n: torch.sin(3 * p) + n, ps, noise))


def run(rule: Any, ps: Any, noises: list[Any], step: Callable[..., Any] = step) -> Any:
    opt_state = optim.setup(rule, ps)
    for noise in noises:
        opt_state, ps = step(opt_state, ps, noise)
    return ps


def torch_run(ps: list[Tensor], noises: list[list[Tensor]], make: Any, clip: float | None = None) -> list[Tensor]:
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in ps]
    optimizers = make(parameters)
    for noise in noises:
        for p, n in zip(parameters, noise, strict=True):
            p.grad = torch.sin(3 * p.detach()) + n
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in parameters]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def same(a: Any, b: Any) -> bool:
    (xs, spec_a), (ys, spec_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec_a == spec_b and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_against_torch(make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(100)]
    expected = torch_run(leaves(ps), [leaves(n) for n in noises], three_of_torch)
    close(leaves(run(three(), ps, noises)), expected)


def test_param_groups(make, draw):
    """One rule with two learning rates, as torch's param_groups have it."""
    ps, noises = make(draw()), [make(draw()) for _ in range(100)]
    rule = Groups({"layer_1": optim.AdamW(0.01), "layer_2": optim.AdamW(0.1, weight_decay=0.0)})

    def groups(ps: list[Tensor]) -> list[torch.optim.Optimizer]:
        params = [{"params": ps[:2], "lr": 0.01}, {"params": ps[2:], "lr": 0.1, "weight_decay": 0.0}]
        return [torch.optim.AdamW(params)]

    close(leaves(run(rule, ps, noises)), torch_run(leaves(ps), [leaves(n) for n in noises], groups))


@pytest.mark.parametrize("chain", [OptimiserChain, torchopt.chain])
def test_behind_one_clip(make, draw, chain):
    """The norm is that of all gradients, whatever group they belong to."""
    ps, noises = make(draw()), [make(draw()) for _ in range(20)]
    expected = torch_run(leaves(ps), [leaves(n) for n in noises], three_of_torch, clip=0.5)
    close(leaves(run(chain(ClipNorm(0.5), three()), ps, noises)), expected)


def test_before_a_decay(make, draw):
    """In the middle of a chain, groups hand on what they make of the gradients."""
    ps, grads = make(draw()), make(draw())
    rule = OptimiserChain(Groups({"layer_1": optim.Descent(0.5)}, rest=OptimiserChain()), WeightDecay(0.1))
    _, new = optim.update(optim.setup(rule, ps), ps, grads)
    steps = [0.5, 0.5, 1.0, 1.0]
    expected = [p - lr * g - 0.1 * p for p, g, lr in zip(leaves(ps), leaves(grads), steps, strict=True)]
    close(leaves(new), expected)


def test_modifiers_in_groups(make, draw):
    ps, grads = make(draw()), make(draw())
    rule = OptimiserChain(Groups({"layer_1": WeightDecay(0.1)}, rest=OptimiserChain()), optim.Descent(0.5))
    _, new = optim.update(optim.setup(rule, ps), ps, grads)
    decays = [0.1, 0.1, 0.0, 0.0]
    expected = [p - 0.5 * (g + d * p) for p, g, d in zip(leaves(ps), leaves(grads), decays, strict=True)]
    close(leaves(new), expected)


def test_in_high_precision(draw):
    ps, noises = draw(), [draw() for _ in range(20)]
    expected = torch_run(leaves(ps), [leaves(n) for n in noises], three_of_torch)
    close(leaves(run(MixedPrecision(three(), torch.float64), ps, noises)), expected)


@pytest.mark.slow
def test_one_graph(make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(10)]
    rule = OptimiserChain(AccumGrad(2), ClipNorm(1.0), three(linear(0.1, 0.0, 20)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    close(
        leaves(run(rule, ps, noises, torch.compile(step, backend=counter, fullgraph=True))),
        leaves(run(rule, ps, noises)),
    )
    assert counter.frame_count == 1


def test_vmap_over_learning_rates(make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(4)]
    lrs = torch.logspace(-3, -1, 8, dtype=torch.float64)
    many = torch.vmap(lambda lr: run(three(lr), ps, noises))(lrs)
    for i, lr in enumerate(lrs):
        one = run(three(lr.item()), ps, noises)
        close(leaves(pytree.tree_map(lambda leaf, i=i: leaf[i], many)), leaves(one))


def test_meta_gradients(make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(3)]

    def loss(lr: Tensor) -> Tensor:
        return sum((leaf**2).sum() for leaf in leaves(run(three(lr), ps, noises)))

    lr = torch.tensor(0.05, dtype=torch.float64)
    expected = (loss(lr + 1e-6) - loss(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(loss)(lr), expected, rtol=1e-6, atol=1e-7)


def test_nothing_is_changed(make, draw):
    ps, grads = make(draw()), make(draw())
    opt_state, ps = optim.update(optim.setup(three(), ps), ps, grads)
    copies = pytree.tree_map(torch.clone, (opt_state, ps, grads))
    assert same(optim.update(opt_state, ps, grads), optim.update(opt_state, ps, grads))
    assert same((opt_state, ps, grads), copies)


def test_one_kernel_a_group(monkeypatch, make, draw):
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(
        "luxtorch.optim.rules._adam.fused_adamw_",
        lambda *args, **options: calls.append(args) or kernel(*args, **options),
    )
    ps, grads = make(draw()), make(draw())
    rule = Groups({is_bias: optim.AdamW(0.1, weight_decay=0.0)}, rest=optim.AdamW(0.1))
    optim.update(optim.setup(OptimiserChain(ClipNorm(), rule), ps), ps, grads)
    assert [len(args[0]) for args in calls] == [2, 2]


class TestControl:
    def test_adjust(self, make, draw):
        ps, noises = make(draw()), [make(draw()) for _ in range(5)]
        opt_state, new = optim.adjust(optim.setup(three(0.5), ps), lr=0.05, path="layer_1.weight"), ps
        opt_state = optim.adjust(optim.adjust(opt_state, lr=0.05, path="layer_2.weight"), weight_decay=0.3)
        assert repr(opt_state).startswith(
            "OptState(Groups(layer_1.weight: Adam(by path), <predicate 1>: Descent(lr=0.1)"
        )
        for noise in noises:
            opt_state, new = step(opt_state, new, noise)
        close(leaves(new), leaves(run(three(), ps, noises)))

    def test_adjust_all(self, make, draw):
        """Where no path is given, every rule that has the number gets it."""
        ps = make(draw())
        opt_state = optim.adjust(optim.setup(three(), ps), lr=0.7)
        assert repr(opt_state).count("lr=0.7") == 3

    def test_adjust_what_the_group_lacks(self, make, draw):
        opt_state = optim.setup(three(), make(draw()))
        with pytest.raises(KeyNameError, match="no hyperparameter 'weight_decay'"):
            optim.adjust(opt_state, weight_decay=0.1, path="layer_1")
        with pytest.raises(KeyNameError, match="No parameter is named 'layer_3'"):
            optim.adjust(opt_state, lr=0.1, path="layer_3")

    @pytest.mark.parametrize("path", ["layer_1", "layer_2.weight", is_bias, None])
    def test_freeze(self, make, draw, path):
        ps, grads = make(draw()), make(draw())
        opt_state = optim.freeze(optim.setup(three(), ps), path)
        new_state, new = optim.update(opt_state, ps, grads)
        chosen = [path is None or (path(n) if callable(path) else n.startswith(path)) for n in NAMES]
        assert [torch.equal(a, b) for a, b in zip(leaves(ps), leaves(new), strict=True)] == chosen
        _, thawed = optim.update(optim.thaw(new_state), new, grads)
        assert not any(torch.equal(a, b) for a, b in zip(leaves(ps), leaves(thawed), strict=True))

    def test_a_frozen_group_counts_no_steps(self, draw):
        ps, grads = draw(), draw()
        rule = Groups({"layer_1": optim.Descent(linear(1.0, 0.0, 5)), "layer_2": optim.Descent(linear(1.0, 0.0, 5))})
        opt_state, _ = optim.update(optim.setup(rule, ps), ps, {"layer_1": grads["layer_1"]})
        assert [state.steps.item() for state in opt_state.state.states] == [1, 0]

    def test_save_and_load(self, make, draw):
        ps, grads = make(draw()), make(draw())
        opt_state, ps = optim.update(optim.setup(three(), ps), ps, grads)
        file = io.BytesIO()
        torch.save(opt_state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert same(loaded, opt_state)
        assert same(optim.update(loaded, ps, grads), optim.update(opt_state, ps, grads))

    def test_structure(self, draw):
        """Predicates leave no trace but their members: a new lambda makes no new graph."""
        ps = draw()
        states = [optim.setup(Groups({lambda name: "bias" in name: optim.Adam()}, rest=optim.Adam()), ps) for _ in "ab"]
        assert pytree.tree_structure(states[0]) == pytree.tree_structure(states[1])


class TestErrors:
    def test_two_groups(self, make, draw):
        rule = Groups({"layer_1": optim.Adam(), "layer_1.bias": optim.Descent()}, rest=optim.Adam())
        with pytest.raises(
            InputError, match=r"layer_1.bias: .* belongs to two groups(.|\n)*'layer_1' and 'layer_1.bias'"
        ):
            optim.setup(rule, make(draw()))

    def test_no_group(self, make, draw):
        with pytest.raises(InputError, match="belong to no group(.|\n)*layer_2.weight, layer_2.bias(.|\n)*rest="):
            optim.setup(Groups({"layer_1": optim.Adam()}), make(draw()))

    def test_misspelt(self, make, draw):
        with pytest.raises(
            KeyNameError, match="No parameter is named 'layer_1.wieght'(.|\n)*Did you mean 'layer_1.weight'"
        ):
            optim.setup(Groups({"layer_1.wieght": optim.Adam()}, rest=optim.Adam()), make(draw()))
        with pytest.raises(KeyNameError, match="The predicate is true of no parameter"):
            optim.setup(Groups({lambda name: False: optim.Adam()}, rest=optim.Adam()), make(draw()))

    def test_other_rules(self):
        with pytest.raises(DTypeError, match="not a gradient transformation"):
            Groups({"layer_1": torch.optim.Adam})

    def test_state_of_other_names(self, draw):
        opt_state = optim.setup(three(), draw())
        with pytest.raises(KeyNameError, match="state belongs to other parameters"):
            optim.update(opt_state, {"b": torch.ones(2)}, {"b": torch.ones(2)})

    def test_an_empty_rest(self, draw):
        ps = draw()
        rule = Groups({"layer_1": optim.Descent(0.5), "layer_2": optim.Descent(0.5)}, rest=optim.Adam())
        close(leaves(optim.update(optim.setup(rule, ps), ps, ps)[1]), [p / 2 for p in leaves(ps)])
