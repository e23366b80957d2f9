"""Chains and what can be put before a rule in them: against torch.nn.utils, torch.optim, and loops written by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
import torchopt
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, KeyNameError
from luxtorch.optim import AccumGrad, ClipGrad, ClipNorm, MixedPrecision, OptimiserChain, SignDecay, WeightDecay, linear

LR = 0.02
Loop = Callable[[list[Tensor]], None]


class Case(NamedTuple):
    """A rule for a learning rate, and the same step in torch: a function of parameters that hold gradients."""

    rule: Callable[[Any], Any]
    reference: Callable[[list[Tensor]], Loop]


def before(change: Callable[[list[Tensor]], Any], make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Any:
    """Return a reference that changes the gradients before each step of an optimizer."""

    def reference(parameters: list[Tensor]) -> Loop:
        optimizer = make(parameters)

        def step(parameters: list[Tensor]) -> None:
            change(parameters)
            optimizer.step()

        return step

    return reference


def add_signs(parameters: list[Tensor]) -> None:
    for p in parameters:
        p.grad = p.grad + 0.05 * p.detach().sign()


def each_norm(parameters: list[Tensor]) -> None:
    for p in parameters:
        clip_grad_norm_([p], 0.3)


def decoupled(parameters: list[Tensor]) -> Loop:
    optimizer = torch.optim.Adam(parameters, lr=LR)

    def step(parameters: list[Tensor]) -> None:
        old = [p.detach().clone() for p in parameters]
        optimizer.step()
        with torch.no_grad():
            for p, p_old in zip(parameters, old, strict=True):
                p -= 0.01 * p_old

    return step


def accumulated(n: int, clip: float | None, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Any:
    def reference(parameters: list[Tensor]) -> Loop:
        optimizer, collected = make(parameters), []

        def step(parameters: list[Tensor]) -> None:
            collected.append([p.grad for p in parameters])
            if len(collected) == n:
                for p, *grads in zip(parameters, *collected, strict=True):
                    p.grad = sum(grads) / n
                collected.clear()
                if clip is not None:
                    clip_grad_norm_(parameters, clip)
                optimizer.step()

        return step

    return reference


def adam(ps: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(ps, lr=LR, **options)


def adamw(ps: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ps, lr=LR)


def sgd(ps: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=LR, **options)


CASES = {
    "ClipNorm": Case(
        lambda lr: OptimiserChain(ClipNorm(0.5), optim.AdamW(lr)), before(lambda ps: clip_grad_norm_(ps, 0.5), adamw)
    ),
    "ClipNorm-rarely": Case(
        lambda lr: OptimiserChain(ClipNorm(4.0), optim.Descent(lr)), before(lambda ps: clip_grad_norm_(ps, 4.0), sgd)
    ),
    "ClipNorm-1": Case(
        lambda lr: OptimiserChain(ClipNorm(0.5, 1), optim.Adam(lr)),
        before(lambda ps: clip_grad_norm_(ps, 0.5, 1), adam),
    ),
    "ClipNorm-inf": Case(
        lambda lr: OptimiserChain(ClipNorm(0.5, math.inf), optim.Descent(lr)),
        before(lambda ps: clip_grad_norm_(ps, 0.5, math.inf), sgd),
    ),
    "ClipNorm-per-array": Case(
        lambda lr: OptimiserChain(ClipNorm(0.3, per_array=True), optim.Descent(lr)), before(each_norm, sgd)
    ),
    "ClipGrad": Case(
        lambda lr: OptimiserChain(ClipGrad(0.4), optim.Momentum(lr)),
        before(lambda ps: clip_grad_value_(ps, 0.4), lambda ps: sgd(ps, momentum=0.9)),
    ),
    "WeightDecay": Case(
        lambda lr: OptimiserChain(WeightDecay(0.1), optim.Adam(lr)),
        before(lambda ps: None, lambda ps: adam(ps, weight_decay=0.1)),
    ),
    "WeightDecay-after": Case(lambda lr: OptimiserChain(optim.Adam(lr), WeightDecay(0.01)), decoupled),
    "SignDecay": Case(lambda lr: OptimiserChain(SignDecay(0.05), optim.Descent(lr)), before(add_signs, sgd)),
    "AccumGrad": Case(
        lambda lr: OptimiserChain(AccumGrad(3), optim.Momentum(lr)),
        accumulated(3, None, lambda ps: sgd(ps, momentum=0.9)),
    ),
    "AccumGrad-ClipNorm": Case(
        lambda lr: OptimiserChain(AccumGrad(2), ClipNorm(0.4), optim.AdamW(lr)), accumulated(2, 0.4, adamw)
    ),
    "nested": Case(
        lambda lr: OptimiserChain(OptimiserChain(AccumGrad(2), ClipNorm(0.4)), OptimiserChain(optim.AdamW(lr))),
        accumulated(2, 0.4, adamw),
    ),
    "MixedPrecision": Case(lambda lr: MixedPrecision(optim.Adam(lr), torch.float64), before(lambda ps: None, adam)),
    "torchopt": Case(
        lambda lr: torchopt.chain(ClipNorm(0.5), optim.AdamW(lr)), before(lambda ps: clip_grad_norm_(ps, 0.5), adamw)
    ),
}
KINDS = {"dict": lambda tree: tree, "vector": ComponentVector}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return KINDS[request.param]


def leaves(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree.to_dict() if isinstance(tree, ComponentVector) else tree)


def gradient(ps: Any, noise: Any) -> Any:
    return pytree.tree_map(lambda p, n: torch.sin(3 * p) + n, ps, noise)


def step(opt_state: optim.OptState, ps: Any, noise: Any) -> tuple[optim.OptState, Any]:
    return optim.update(opt_state, ps, gradient(ps, noise))


def run(rule: Any, ps: Any, noises: list[Any], step: Callable[..., Any] = step) -> Any:
    opt_state = optim.setup(rule, ps)
    for noise in noises:
        opt_state, ps = step(opt_state, ps, noise)
    return ps


def same(a: Any, b: Any) -> bool:
    (xs, spec_a), (ys, spec_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec_a == spec_b and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(xs, ys, strict=True))


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


def test_against_torch(case, make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(100)]
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in leaves(ps)]
    torch_step = case.reference(parameters)
    for noise in noises:
        for p, n in zip(parameters, leaves(noise), strict=True):
            p.grad = gradient(p.detach(), n)
        torch_step(parameters)
    close(leaves(run(case.rule(LR), ps, noises)), [p.detach() for p in parameters])


@pytest.mark.slow
def test_one_graph(case, make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(10)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    new = run(case.rule(LR), ps, noises, torch.compile(step, backend=counter, fullgraph=True))
    close(leaves(new), leaves(run(case.rule(LR), ps, noises)))
    assert counter.frame_count == 1


def test_vmap_over_learning_rates(case, make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(4)]
    lrs = torch.logspace(-3, -1, 8, dtype=torch.float64)
    many = torch.vmap(lambda lr: run(case.rule(lr), ps, noises))(lrs)
    for i, lr in enumerate(lrs):
        one = run(case.rule(lr.item()), ps, noises)
        close(leaves(pytree.tree_map(lambda leaf, i=i: leaf[i], many)), leaves(one))


def test_vmap_over_states(case, make, draw):
    ps, noises, lrs = make(draw()), [make(draw()) for _ in range(4)], torch.tensor([0.1, 0.01]).double()
    opt_state, many = torch.vmap(lambda lr: (optim.setup(case.rule(lr), ps), ps))(lrs)
    for noise in noises:
        opt_state, many = torch.vmap(step, in_dims=(0, 0, None))(opt_state, many, noise)
    for i, lr in enumerate(lrs):
        one = run(case.rule(lr.item()), ps, noises)
        close(leaves(pytree.tree_map(lambda leaf, i=i: leaf[i], many)), leaves(one))


def test_meta_gradients(case, make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(3)]

    def loss(lr: Tensor) -> Tensor:
        return sum((leaf**2).sum() for leaf in leaves(run(case.rule(lr), ps, noises)))

    lr = torch.tensor(LR, dtype=torch.float64)
    expected = (loss(lr + 1e-6) - loss(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(loss)(lr), expected, rtol=1e-6, atol=1e-7)
    lr.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(lr), lr)[0], expected, rtol=1e-6, atol=1e-7)


def test_nothing_is_changed(case, make, draw):
    ps, grads = make(draw()), make(draw())
    opt_state, ps = optim.update(optim.setup(case.rule(LR), ps), ps, grads)
    copies = pytree.tree_map(torch.clone, (opt_state, ps, grads))
    assert same(optim.update(opt_state, ps, grads), optim.update(opt_state, ps, grads))
    assert same((opt_state, ps, grads), copies)


@pytest.mark.parametrize(
    "kind, by", [("dict", "missing"), ("dict", "absent"), ("dict", "frozen"), ("vector", "frozen")]
)
def test_left_alone(case, draw, kind, by):
    """A parameter without gradients keeps its value and all that is remembered of it."""
    make = KINDS[kind]
    ps, all_grads = make(draw()), [make(draw()) for _ in range(4)]
    opt_state, ps = optim.update(optim.setup(case.rule(LR), ps), ps, all_grads[0])
    if by == "frozen":
        opt_state = optim.freeze(opt_state, "layer_1")
    new_state, new = opt_state, ps
    for grads in all_grads:
        if by == "missing":
            grads = {**grads, "layer_1": None}
        elif by == "absent":
            grads = {"layer_2": grads["layer_2"]}
        new_state, new = optim.update(new_state, new, grads)
    assert [torch.equal(a, b) for a, b in zip(leaves(ps), leaves(new), strict=True)] == [True, True, False, False]
    for one, other in zip(states_of(opt_state), states_of(new_state), strict=True):
        assert same(*({n: s for n, s in state.leaves.items() if n.startswith("layer_1")} for state in (one, other)))


def states_of(opt_state: optim.OptState) -> list[Any]:
    is_state = lambda node: isinstance(node, optim.RuleState)  # noqa: E731
    return pytree.tree_leaves(opt_state.state, is_leaf=is_state)


def test_frozen_gradients_do_not_count(draw):
    ps, grads = draw(), draw()
    rule = OptimiserChain(ClipNorm(0.1), optim.Descent(LR))
    _, new = optim.update(optim.freeze(optim.setup(rule, ps), "layer_1"), ps, grads)
    alone, alone_grads = {"layer_2": ps["layer_2"]}, {"layer_2": grads["layer_2"]}
    close(new["layer_2"], optim.update(optim.setup(rule, alone), alone, alone_grads)[1]["layer_2"])


def test_thawed(case, make, draw):
    ps, grads = make(draw()), [make(draw()) for _ in range(6)]
    opt_state = optim.thaw(optim.freeze(optim.setup(case.rule(LR), ps), lambda name: "bias" in name), "layer_1.bias")
    assert opt_state.layout.frozen == ("layer_2.bias",)
    for g in grads:
        opt_state, new = optim.update(opt_state, ps, g)
    assert [torch.equal(a, b) for a, b in zip(leaves(ps), leaves(new), strict=True)] == [False, False, False, True]


def test_adjusted(case, make, draw):
    """A learning rate reaches its rule through all that is around it."""
    ps, noises = make(draw()), [make(draw()) for _ in range(6)]
    opt_state, new = optim.adjust(optim.setup(case.rule(0.5), ps), lr=LR), ps
    assert "lr=0.02" in repr(opt_state)
    for noise in noises:
        opt_state, new = step(opt_state, new, noise)
    close(leaves(new), leaves(run(case.rule(LR), ps, noises)))


def test_adjusted_by_path(case, make, draw):
    """With learning rate zero for one layer, that keeps still, but for a decay that comes after it."""
    ps, noises = make(draw()), [make(draw()) for _ in range(6)]
    opt_state, new = optim.adjust(optim.setup(case.rule(LR), ps), lr=0.0, path="layer_1"), ps
    for noise in noises:
        opt_state, new = step(opt_state, new, noise)
    still = case is not CASES["WeightDecay-after"]
    assert [torch.equal(a, b) for a, b in zip(leaves(ps), leaves(new), strict=True)] == [still, still, False, False]


def test_save_and_load(case, make, draw):
    ps, grads = make(draw()), make(draw())
    opt_state, ps = optim.update(optim.setup(case.rule(LR), ps), ps, grads)
    file = io.BytesIO()
    torch.save(optim.freeze(opt_state, "layer_1"), file)
    file.seek(0)
    loaded = optim.thaw(torch.load(file, weights_only=True))
    expected = optim.thaw(optim.freeze(opt_state, "layer_1"))
    assert same(loaded, expected)
    assert same(optim.update(loaded, ps, grads), optim.update(expected, ps, grads))


def test_nan_goes_through(case, make, draw):
    ps = make(draw())
    bad = pytree.tree_map(lambda p: torch.full_like(p, float("nan")), ps)
    new = run(case.rule(LR), ps, [bad] * 3)
    assert all(leaf.isnan().all() for leaf in leaves(new))


def test_rules_are_values(case):
    assert case.rule(LR) == case.rule(LR) != case.rule(0.3)
    assert hash(case.rule(LR)) == hash(case.rule(LR))


def test_as_torchopt_asks(case, draw):
    """Inside torchopt, in its protocol: the updates are what the step adds."""
    ps, grads = draw(), draw()
    rule = case.rule(LR)
    if "AccumGrad" in repr(rule):
        rule = case.rule(LR).rules[-1]
    copies = pytree.tree_map(torch.clone, (ps, grads))
    updates, _ = rule.update(grads, rule.init(ps), params=ps, inplace=False)
    close(torchopt.apply_updates(ps, updates, inplace=False), optim.update(optim.setup(rule, ps), ps, grads)[1])
    assert same((ps, grads), copies)


class TestKernel:
    """In eager mode the last rule of a chain steps by its fused kernel, in one call."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        kernel = torch._fused_adamw_

        def spy(*args, **kwargs):
            calls.append(args)
            return kernel(*args, **kwargs)

        monkeypatch.setattr("luxtorch.optim.rules._adam.fused_adamw_", spy)
        return calls

    @pytest.mark.parametrize(
        "rule, steps",
        [
            (OptimiserChain(ClipNorm(1.0), optim.AdamW()), 6),
            (OptimiserChain(WeightDecay(), ClipGrad(), optim.Adam()), 6),
            (torchopt.chain(ClipNorm(1.0), optim.AdamW()), 6),
            (MixedPrecision(OptimiserChain(ClipNorm(1.0), optim.AdamW()), torch.float64), 6),
            (OptimiserChain(AccumGrad(3), ClipNorm(1.0), optim.AdamW()), 2),
            (OptimiserChain(ClipNorm(linear(1.0, 0.0, 5)), optim.AdamW(linear(1.0, 0.0, 5))), 6),
        ],
    )
    def test_one_call_a_step(self, calls, make, draw, rule, steps):
        ps, grads = make(draw()), make(draw())
        opt_state = optim.setup(rule, ps)
        for _ in range(6):
            opt_state, ps = optim.update(opt_state, ps, grads)
        assert len(calls) == steps


class TestClipNorm:
    def test_components_of_a_vector(self, draw):
        """Per array, a vector is clipped as a dict is; by the norm of all, as one array."""
        ps, grads = draw(), draw()
        for rule in (ClipNorm(0.1), ClipNorm(0.1, per_array=True)):
            vectors = optim.update(optim.setup(rule, ComponentVector(ps)), ComponentVector(ps), ComponentVector(grads))[
                1
            ]
            close(vectors.to_dict(), optim.update(optim.setup(rule, ps), ps, grads)[1])

    def test_by_torchopt_protocol_on_a_vector(self, draw):
        rule, grads = ClipNorm(0.1, per_array=True), ComponentVector(draw())
        clipped, _ = rule.update(grads, rule.init(grads))
        for g, one in zip(leaves(grads), leaves(clipped), strict=True):
            close(one, g * min(1.0, 0.1 / (g.norm().item() + 1e-6)))

    def test_zero_gradients(self):
        ps = {"w": torch.zeros(3, dtype=torch.float64)}
        for per_array in (False, True):
            opt_state = optim.setup(ClipNorm(0.1, per_array=per_array), ps)
            slope = torch.func.grad(lambda g, s=opt_state: optim.update(s, ps, {"w": g})[1]["w"].sum())(ps["w"])
            close(slope, -torch.ones(3, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtypes(self, dtype):
        ps = {"w": torch.ones(300, dtype=dtype), "b": torch.tensor(1.0, dtype=dtype)}
        _, new = optim.update(optim.setup(ClipNorm(1.0), ps), ps, pytree.tree_map(lambda p: 200 * p, ps))
        assert {leaf.dtype for leaf in leaves(new)} == {dtype}
        torch.testing.assert_close(new["w"][0].float(), torch.tensor(1 - 301**-0.5), rtol=1e-2, atol=1e-2)

    def test_mixed_dtypes(self):
        ps = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)}
        grads = {"a": torch.full((1,), 3.0), "b": torch.full((1,), 4.0, dtype=torch.float64)}
        _, new = optim.update(optim.setup(ClipNorm(1.0), ps), ps, grads)
        torch.testing.assert_close(new, {"a": torch.full((1,), -0.6), "b": torch.full((1,), -0.8).double()})

    def test_adjust(self, draw):
        ps, grads = draw(), draw()
        chain = lambda limit: OptimiserChain(ClipNorm(limit), optim.Descent(LR))  # noqa: E731
        opt_state = optim.adjust(optim.setup(chain(5.0), ps), max_norm=0.1)
        close(optim.update(opt_state, ps, grads)[1], optim.update(optim.setup(chain(0.1), ps), ps, grads)[1])
        with pytest.raises(InputError, match="ClipNorm treats all parameters together"):
            optim.adjust(opt_state, max_norm=0.1, path="layer_1")
        with pytest.raises(KeyNameError, match="no hyperparameter 'max_nrom'(.|\n)*'max_norm'"):
            optim.adjust(opt_state, max_nrom=0.1)

    def test_adjust_per_array(self, draw):
        ps, grads = draw(), draw()
        opt_state = optim.setup(ClipNorm(5.0, per_array=True), ps)
        _, new = optim.update(optim.adjust(opt_state, max_norm=0.0, path="layer_1"), ps, grads)
        close(new["layer_1"], ps["layer_1"])
        assert not torch.equal(new["layer_2"]["weight"], ps["layer_2"]["weight"])

    @pytest.mark.parametrize("make", [lambda: ClipNorm(-1.0), lambda: ClipNorm(1.0, 0), lambda: ClipGrad(-1.0)])
    def test_values(self, make):
        with pytest.raises(InputError, match="must be in|p must be above 0"):
            make()

    def test_repr(self):
        assert repr(optim.setup(ClipNorm(1.0, math.inf, per_array=True), torch.zeros(2))) == (
            "OptState(ClipNorm(max_norm=1.0, p=inf, per_array=True), 1 parameter)"
        )


class LargestEntry(optim.LeafwiseRule):
    """A rule that depends on the shapes of the parameters."""

    lr: float | Tensor = 0.1

    def splits_vectors(self):
        return True

    def delta(self, g, p, slots, h):
        return -h["lr"] * torch.where(g == g.amax(-1, keepdim=True), g, 0.0), slots


@pytest.mark.parametrize(
    "wrap",
    [lambda rule: rule, OptimiserChain, MixedPrecision, lambda r: torchopt.chain(torchopt.clip_grad_norm(9.0), r)],
)
def test_rules_that_need_shapes_see_the_components_of_a_vector(draw, wrap):
    ps, grads = draw(), draw()
    opt_state = optim.setup(wrap(LargestEntry()), ComponentVector(ps))
    _, new = optim.update(opt_state, ComponentVector(ps), ComponentVector(grads))
    close(new.to_dict(), optim.update(optim.setup(wrap(LargestEntry()), ps), ps, grads)[1])


class TestAccumGrad:
    def test_untouched_in_between(self, make, draw):
        ps, grads = make(draw()), make(draw())
        rule = OptimiserChain(AccumGrad(3), optim.Adam(linear(0.1, 0.0, 10)))
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        for update in (optim.update, torch.compile(optim.update, backend=counter, fullgraph=True)):
            opt_state, new = optim.setup(rule, ps), ps
            for call in range(1, 7):
                (_, inner), before_call = opt_state.state, new
                opt_state, new = update(opt_state, new, grads)
                assert same(opt_state.state[1], inner) == same(new, before_call) == (call % 3 != 0)
            assert opt_state.state[1].steps.item() == 2
        assert counter.frame_count == 1

    def test_mean_of_those_that_came(self):
        ps = {"a": torch.zeros(1), "b": torch.zeros(1)}
        opt_state = optim.setup(OptimiserChain(AccumGrad(2), optim.Descent(1.0)), ps)
        calls = [{"a": 2.0, "b": 1.0}, {"a": 4.0}, {"b": 3.0}, {"a": 5.0, "b": 5.0}]
        seen = []
        for call in calls:
            opt_state, ps = optim.update(opt_state, ps, {name: torch.tensor([g]) for name, g in call.items()})
            seen.append((ps["a"].item(), ps["b"].item()))
        # b misses the second call, and steps at the fourth by the mean of the three that came.
        assert seen == [(0.0, 0.0), (-3.0, 0.0), (-3.0, 0.0), (-8.0, -3.0)]

    def test_calls_without_any_gradient_do_not_count(self, draw):
        ps = draw()
        opt_state = optim.setup(OptimiserChain(AccumGrad(2), optim.Descent(1.0)), ps)
        assert same(optim.update(opt_state, ps, None), (opt_state, ps))

    def test_alone(self):
        p = torch.zeros(1)
        opt_state = optim.setup(AccumGrad(2), p)
        for g in (1.0, 3.0):
            opt_state, p = optim.update(opt_state, p, torch.tensor([g]))
        assert p.item() == -2.0

    @pytest.mark.parametrize("n", [0, -1, 1.5, True])
    def test_values(self, n):
        with pytest.raises(InputError, match="n must be a positive integer"):
            AccumGrad(n)

    def test_not_before_torchopt(self):
        with pytest.raises(InputError, match="AccumGrad cannot hold back(.|\n)*OptimiserChain"):
            optim.setup(torchopt.chain(AccumGrad(2), torchopt.sgd(0.1)), torch.zeros(2))


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_is_the_rounded_run_in_float32(self, make, draw, dtype):
        ps, all_grads = make(draw(dtype=dtype)), [make(draw(dtype=dtype)) for _ in range(20)]
        masters = [torch.nn.Parameter(p.float()) for p in leaves(ps)]
        optimizer = torch.optim.AdamW(masters, lr=1e-3)
        opt_state = optim.setup(MixedPrecision(OptimiserChain(ClipNorm(1.0), optim.AdamW(1e-3))), ps)
        for grads in all_grads:
            for p, g in zip(masters, leaves(grads), strict=True):
                p.grad = g.float()
            clip_grad_norm_(masters, 1.0)
            optimizer.step()
            opt_state, ps = optim.update(opt_state, ps, grads)
        copies = [slots["master"] for slots in opt_state.state[0].leaves.values()]
        flat = torch.cat([p.detach().flatten() for p in masters])
        torch.testing.assert_close(torch.cat([copy.flatten() for copy in copies]), flat, rtol=1e-5, atol=1e-6)
        assert same([c.to(dtype).flatten() for c in copies], [p.flatten() for p in pytree.tree_leaves(ps)])
        remembered = opt_state.state[1][1].leaves.values()
        assert {value.dtype for slots in remembered for value in slots.values()} == {torch.float32}

    def test_no_copies_where_none_are_needed(self):
        ps = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}
        opt_state, new = optim.update(optim.setup(MixedPrecision(optim.Descent(0.5)), ps), ps, ps)
        assert [list(slots) for slots in opt_state.state[0].leaves.values()] == [[], ["master"]]
        close(new, pytree.tree_map(lambda p: p / 2, ps))

    def test_last(self):
        with pytest.raises(InputError, match="MixedPrecision keeps copies of the parameters, and is not the last"):
            OptimiserChain(MixedPrecision(optim.Adam()), WeightDecay())

    def test_dtype(self):
        with pytest.raises(InputError, match="dtype must be a floating point dtype"):
            MixedPrecision(optim.Adam(), torch.int32)


class TestOptimiserChain:
    def test_empty_is_descent(self, make, draw):
        ps, grads = make(draw()), make(draw())
        for rule in (OptimiserChain(), OptimiserChain(ClipGrad(100.0)), ClipNorm(100.0)):
            new = optim.update(optim.setup(rule, ps), ps, grads)[1]
            close(leaves(new), [p - g for p, g in zip(leaves(ps), leaves(grads), strict=True)])

    def test_chains_are_spliced(self):
        a, b, c = ClipNorm(), WeightDecay(), optim.Adam()
        assert (
            OptimiserChain(a, OptimiserChain(b, c))
            == OptimiserChain(a, b, c)
            == OptimiserChain(torchopt.chain(a, b), c)
        )

    def test_in_a_chain_of_torchopt(self, draw):
        ps, grads = draw(), draw()
        mixed = torchopt.chain(torchopt.clip_grad_norm(0.5), OptimiserChain(WeightDecay(0.1), optim.Adam(LR)))
        ours = OptimiserChain(ClipNorm(0.5), WeightDecay(0.1), optim.Adam(LR))
        new = [optim.update(optim.setup(rule, ps), ps, grads)[1] for rule in (mixed, ours)]
        torch.testing.assert_close(*new, rtol=1e-5, atol=1e-6)

    def test_after_a_descent_in_torchopt(self, draw):
        """There, what comes after a descent sees the step; here it sees a gradient."""
        ps, grads = draw(), draw()
        for chain in (torchopt.chain, OptimiserChain):
            rule = chain(optim.Descent(0.5), optim.Descent(0.5))
            _, new = optim.update(optim.setup(rule, ps), ps, grads)
            sign = 1.0 if chain is torchopt.chain else -1.0
            close(new, pytree.tree_map(lambda p, g, s=sign: p + s * 0.25 * g, ps, grads))
        with pytest.raises(InputError, match="WeightDecay would have the wrong sign(.|\n)*OptimiserChain"):
            optim.setup(torchopt.chain(optim.Adam(), WeightDecay()), ps)

    @pytest.mark.parametrize("bad", [torch.optim.Adam, 0.1])
    def test_other_rules(self, bad):
        with pytest.raises(DTypeError, match="not a gradient transformation"):
            OptimiserChain(ClipNorm(), bad)

    def test_state_of_other_names(self):
        for rule in (OptimiserChain(ClipNorm(), AccumGrad(2), optim.Adam()), MixedPrecision(optim.Adam()), ClipGrad()):
            opt_state = optim.setup(rule, {"a": torch.ones(2)})
            with pytest.raises(KeyNameError, match="state belongs to other parameters"):
                optim.update(opt_state, {"b": torch.ones(2)}, {"b": torch.ones(2)})

    def test_repr(self, draw):
        rule = MixedPrecision(OptimiserChain(AccumGrad(2), ClipNorm(1.0), optim.Descent(linear(1.0, 0.0, 5))))
        assert repr(optim.setup(rule, draw())) == (
            "OptState(MixedPrecision(OptimiserChain(AccumGrad(n=2), ClipNorm(max_norm=1.0), "
            "Descent(lr=Polynomial(start=1.0, end=0.0, steps=5, power=1.0))), torch.float32), 4 parameters)"
        )
