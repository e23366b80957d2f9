"""Schedules against torch.optim.lr_scheduler, by themselves and in rules."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
import torchopt
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedules

from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError
from luxtorch.optim import ClipNorm, OptimiserChain, Schedule
from luxtorch.optim._schedules import (
    constant,
    cosine,
    exponential,
    join,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    warmup_cosine,
)

STEPS = 100


def one_cycle_of_torch(optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    return torch_schedules.OneCycleLR(optimizer, 0.1, STEPS + 1, cycle_momentum=False, **options)


CASES: dict[str, tuple[Schedule, Callable[[torch.optim.Optimizer], Any]]] = {
    "constant": (constant(0.1), lambda o: torch_schedules.ConstantLR(o, 1.0)),
    "linear": (linear(0.02, 0.08, 40), lambda o: torch_schedules.LinearLR(o, 0.2, 0.8, 40)),
    "polynomial": (polynomial(0.1, 0.0, 70, 2.0), lambda o: torch_schedules.PolynomialLR(o, 70, 2.0)),
    "exponential": (exponential(0.1, 0.95), lambda o: torch_schedules.ExponentialLR(o, 0.95)),
    "staircase": (exponential(0.1, 0.5, 30, staircase=True), lambda o: torch_schedules.StepLR(o, 30, 0.5)),
    "cosine": (cosine(0.1, 0.01, 100), lambda o: torch_schedules.CosineAnnealingLR(o, 100, 0.01)),
    "piecewise": (piecewise([0.1, 0.03, 0.009], [20, 70]), lambda o: torch_schedules.MultiStepLR(o, [20, 70], 0.3)),
    "warmup_cosine": (
        warmup_cosine(0.1, 10, 100, start=0.01),
        lambda o: torch_schedules.SequentialLR(
            o, [torch_schedules.LinearLR(o, 0.1, 1.0, 10), torch_schedules.CosineAnnealingLR(o, 90)], [10]
        ),
    ),
    "join": (
        join([constant(0.05), exponential(0.1, 0.9), linear(0.1, 0.0, 30)], [5, 60]),
        lambda o: torch_schedules.SequentialLR(
            o,
            [
                torch_schedules.ConstantLR(o, 0.5, 1000),
                torch_schedules.ExponentialLR(o, 0.9),
                torch_schedules.LinearLR(o, 1.0, 0.0, 30),
            ],
            [5, 60],
        ),
    ),
    "one_cycle": (one_cycle(0.1, STEPS + 1), one_cycle_of_torch),
    "one_cycle-linear": (
        one_cycle(0.1, STEPS + 1, 0.2, anneal_strategy="linear", div_factor=5.0, final_div_factor=100.0),
        lambda o: one_cycle_of_torch(
            o, pct_start=0.2, anneal_strategy="linear", div_factor=5.0, final_div_factor=100.0
        ),
    ),
    "one_cycle-three": (
        one_cycle(0.1, STEPS + 1, 0.25, three_phase=True),
        lambda o: one_cycle_of_torch(o, pct_start=0.25, three_phase=True),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


@pytest.fixture
def schedule(case: Any) -> Schedule:
    return case[0]


@pytest.fixture(params=["dict", "vector"])
def make(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return {"dict": lambda tree: tree, "vector": ComponentVector}[request.param]


def leaves(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree.to_dict() if isinstance(tree, ComponentVector) else tree)


def step(opt_state: optim.OptState, ps: Any, noise: Any) -> tuple[optim.OptState, Any]:
    return optim.update(opt_state, ps, pytree.tree_map(lambda p, n: torch.sin(3 * p) + n, ps, noise))


def run(rule: Any, ps: Any, noises: list[Any], step: Callable[..., Any] = step) -> Any:
    opt_state = optim.setup(rule, ps)
    for noise in noises:
        opt_state, ps = step(opt_state, ps, noise)
    return ps


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore")  # torch's own: SequentialLR calls what it deprecates
def test_values(case):
    schedule, make_torch = case
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = make_torch(optimizer)
    for i in range(STEPS + 1):
        value = schedule(i)
        assert (value.shape, value.dtype) == ((), torch.float64)
        close(value.item(), optimizer.param_groups[0]["lr"])
        assert torch.equal(value, schedule(torch.tensor(i)))
        optimizer.step()
        if i < STEPS:
            scheduler.step()


def test_many_steps_at_once(schedule):
    steps = torch.arange(STEPS)
    one_by_one = torch.stack([schedule(i) for i in range(STEPS)])
    close(schedule(steps), one_by_one)
    close(torch.vmap(schedule)(steps), one_by_one)


def test_ends_stay(schedule):
    if "gamma" not in repr(schedule):
        close(schedule(1000), schedule(101))
    close(schedule(-3), schedule(0))


@pytest.mark.filterwarnings("ignore")
def test_training(case, make, draw):
    schedule, make_torch = case
    ps, noises = make(draw()), [make(draw()) for _ in range(STEPS)]
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in leaves(ps)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    scheduler = make_torch(optimizer)
    for noise in noises:
        for p, n in zip(parameters, leaves(noise), strict=True):
            p.grad = torch.sin(3 * p.detach()) + n
        optimizer.step()
        scheduler.step()
    close(leaves(run(optim.AdamW(schedule), ps, noises)), [p.detach() for p in parameters])


@pytest.mark.slow
def test_one_graph(schedule, make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(10)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    new = run(optim.Momentum(schedule), ps, noises, torch.compile(step, backend=counter, fullgraph=True))
    close(leaves(new), leaves(run(optim.Momentum(schedule), ps, noises)))
    assert counter.frame_count == 1


def test_vmap_over_peaks(schedule, make, draw):
    """A factor of a schedule is a number of the state: it can be batched, at setup and in steps."""
    ps, noises, peaks = make(draw()), [make(draw()) for _ in range(4)], torch.linspace(0.1, 3.0, 8).double()
    many = torch.vmap(lambda peak: run(optim.Adam(peak * schedule), ps, noises))(peaks)
    opt_state, stepped = torch.vmap(lambda peak: (optim.setup(optim.Adam(schedule * peak), ps), ps))(peaks)
    for noise in noises:
        opt_state, stepped = torch.vmap(step, in_dims=(0, 0, None))(opt_state, stepped, noise)
    for i, peak in enumerate(peaks):
        one = run(optim.Adam(peak.item() * schedule), ps, noises)
        for each in (many, stepped):
            close(leaves(pytree.tree_map(lambda leaf, i=i: leaf[i], each)), leaves(one))


def test_meta_gradients(schedule, draw):
    ps, noises = draw(), [draw() for _ in range(3)]

    def loss(peak: Tensor) -> Tensor:
        return sum((leaf**2).sum() for leaf in leaves(run(optim.Adam(peak * schedule), ps, noises)))

    peak = torch.tensor(0.7, dtype=torch.float64)
    expected = (loss(peak + 1e-6) - loss(peak - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(loss)(peak), expected, rtol=1e-6, atol=1e-7)


def test_nothing_is_changed(schedule, make, draw):
    ps, grads = make(draw()), make(draw())
    opt_state, ps = optim.update(optim.setup(optim.Adam(schedule), ps), ps, grads)
    copies = pytree.tree_map(torch.clone, (opt_state, ps, grads))
    results = [optim.update(opt_state, ps, grads) for _ in range(2)]
    for a, b in ((results[0], results[1]), (copies, (opt_state, ps, grads))):
        assert all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(opt_state))


def test_save_and_load(schedule, draw):
    ps, grads = draw(), draw()
    opt_state, ps = optim.update(optim.setup(optim.Adam(2.0 * schedule), ps), ps, grads)
    file = io.BytesIO()
    torch.save(opt_state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert pytree.tree_structure(loaded) == pytree.tree_structure(opt_state)
    torch.testing.assert_close(
        optim.update(loaded, ps, grads)[1], optim.update(opt_state, ps, grads)[1], rtol=0, atol=0
    )


def test_schedules_are_values(case, schedule):
    name = next(name for name, other in CASES.items() if other is case)
    assert [other for other, (value, _) in CASES.items() if value == schedule] == [name]
    assert hash(schedule * 2.0) == hash(schedule * 2.0)
    assert optim.Adam(schedule) == optim.Adam(schedule) != optim.Adam(2.0 * schedule)


def test_a_fused_kernel_all_the_same(monkeypatch, make, draw):
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(
        "luxtorch.optim.rules._adam.fused_adamw_",
        lambda *args, **options: calls.append(options) or kernel(*args, **options),
    )
    ps, grads = make(draw()), make(draw())
    opt_state = optim.setup(optim.AdamW(linear(0.1, 0.0, 4), weight_decay=constant(0.5)), ps)
    opt_state = optim.adjust(opt_state, betas=(0.5, 0.6), path="layer_1")
    for _ in range(4):
        opt_state, ps = optim.update(opt_state, ps, grads)
    close([call["lr"] for call in calls], [lr for lr in (0.1, 0.075, 0.05, 0.025) for _ in range(2)])
    assert {call["weight_decay"] for call in calls} == {0.5}


@pytest.mark.parametrize("by", ["frozen", "missing"])
def test_steps_that_are_not_taken_do_not_count(draw, by):
    ps, grads = draw(), draw()
    opt_state = optim.setup(optim.Descent(linear(1.0, 0.0, 4)), ps)
    for i in range(3):
        off = i == 1
        state = optim.freeze(opt_state) if off and by == "frozen" else opt_state
        state, ps = optim.update(state, ps, None if off and by == "missing" else grads)
        opt_state = optim.thaw(state)
    assert opt_state.state.steps.item() == 2


def test_any_number_may_follow_one(draw):
    ps, grads = draw(), draw()
    rule = OptimiserChain(ClipNorm(exponential(1.0, 0.5)), optim.AdamW(weight_decay=linear(0.0, 1.0, 2), lr=0.1))
    opt_state = optim.setup(rule, ps)
    numbers = {"max_norm": [1.0, 0.5, 0.25], "weight_decay": [0.0, 0.5, 1.0]}
    expected_state, expected = optim.setup(OptimiserChain(ClipNorm(1.0), optim.AdamW(0.1)), ps), ps
    for max_norm, weight_decay in zip(*numbers.values(), strict=True):
        opt_state, ps = optim.update(opt_state, ps, grads)
        expected_state = optim.adjust(expected_state, max_norm=max_norm, weight_decay=weight_decay)
        expected_state, expected = optim.update(expected_state, expected, grads)
    close(ps, expected)


def test_schedules_of_torchopt(make, draw):
    ps, noises = make(draw()), [make(draw()) for _ in range(10)]
    theirs = torchopt.schedule.polynomial_schedule(0.1, 0.01, 2.0, 6, 2)
    ours = join([constant(0.1), polynomial(0.1, 0.01, 6, 2.0)], [2])
    expected = run(optim.Adam(ours), ps, noises)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for each in (step, torch.compile(step, backend=counter, fullgraph=True)):
        close(leaves(run(optim.Adam(theirs), ps, noises, each)), leaves(expected))
    assert counter.frame_count == 1
    close(
        join([theirs, constant(0.5)], [3])(torch.arange(5)),
        torch.tensor([0.1, 0.1, 0.1, 0.5, 0.5], dtype=torch.float64),
    )


def test_in_the_protocol_of_torchopt(draw):
    ps, grads = draw(), draw()
    rule = torchopt.chain(torchopt.clip_grad_norm(1e9), optim.Descent(linear(1.0, 0.0, 4)))
    opt_state = optim.setup(rule, ps)
    for lr in (1.0, 0.75):
        opt_state, new = optim.update(opt_state, ps, grads)
        close(new, pytree.tree_map(lambda p, g, lr=lr: p - lr * g, ps, grads))


class TestErrors:
    @pytest.mark.parametrize("path", [None, "layer_1"])
    def test_adjusted(self, draw, path):
        opt_state = optim.setup(optim.Adam(linear(0.1, 0.0, 10)), draw())
        with pytest.raises(InputError, match="'lr' follows a schedule(.|\n)*Polynomial(.|\n)*optim.join"):
            optim.adjust(opt_state, 0.1, path=path)
        assert "eps=0.5" in repr(optim.adjust(opt_state, eps=0.5))

    def test_factors_are_checked(self):
        with pytest.raises(InputError, match=r"lr must be in \[0, inf\)"):
            optim.Adam(-1.0 * linear(0.1, 0.0, 10))
        with pytest.raises(DTypeError, match="betas must be 2 numbers"):
            optim.Adam(betas=linear(0.1, 0.0, 10))

    @pytest.mark.parametrize(
        "make, problem",
        [
            (lambda: linear(1.0, 0.0, 0), "steps must be above 0(.|\n)*0"),
            (lambda: exponential(1.0, -0.5), "gamma must be above 0"),
            (lambda: polynomial(1.0, 0.0, 5, 0.0), "power must be above 0"),
            (lambda: warmup_cosine(1.0, 10, 10), "steps must be above 0"),
            (
                lambda: one_cycle(1.0, 10, anneal_strategy="cosine"),
                "anneal_strategy must be 'cos' or",
            ),
            (lambda: piecewise([1.0, 2.0], [3, 4]), "number of boundaries(.|\n)*1 boundaries between 2(.|\n)*2"),
            (lambda: join([], []), "number of boundaries"),
            (lambda: piecewise([1.0, 2.0, 3.0], [4, 4]), "boundaries of a schedule do not rise"),
            (lambda: linear(math.nan, 0.0, 5), "start must be a finite number"),
        ],
    )
    def test_values(self, make, problem):
        with pytest.raises(InputError, match=problem):
            make()


def test_repr(draw):
    assert repr(optim.setup(optim.Descent(0.5 * cosine(1.0, 0.0, 9)), draw())) == (
        "OptState(Descent(lr=0.5 * Cosine(start=1.0, end=0.0, steps=9)), 4 parameters)"
    )


class TestArithmetic:
    """Schedules combine with each other and with numbers."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda a, b: a + b,
            lambda a, b: a - b,
            lambda a, b: a * b,
            lambda a, b: a / b,
            lambda a, b: a**b,
            lambda a, b: a + 2.0,
            lambda a, b: 2.0 - a,
            lambda a, b: 3 * a * (2 * b),
            lambda a, b: a / 2,
            lambda a, b: 2 / a,
            lambda a, b: a**2,
            lambda a, b: 2**a,
            lambda a, b: (-a) * b + 1,
        ],
    )
    def test_values(self, make):
        a, b = optim.linear(1.0, 2.0, 8), optim.cosine(0.5, 0.25, 6)
        schedule = make(a, b)
        assert hash(schedule) == hash(make(a, b)) and schedule == make(a, b)
        for step in (0, 1, 5, 20):
            expected = make(a(step).item(), b(step).item())
            torch.testing.assert_close(schedule(step).item(), expected, rtol=1e-14, atol=0.0)
            torch.testing.assert_close(float(schedule.at(float(step))), expected, rtol=1e-14, atol=0.0)

    def test_as_hyperparameters(self, make, draw):
        """A rule that follows them is one that is adjusted by hand; each of a few numbers may follow its own."""
        ps, noises = make(draw()), [make(draw()) for _ in range(6)]
        lr, beta = optim.linear(0.0, 1.0, 3) * optim.cosine(0.1, 0.0, 6), optim.linear(0.5, 0.9, 6)
        opt_state = optim.setup(optim.Adam(lr, betas=(0.9, beta)), ps)
        by_hand, expected = optim.setup(optim.Adam(), ps), ps
        compiled = torch.compile(optim.update, backend="aot_eager", fullgraph=True)
        compiled_state, compiled_ps = opt_state, ps
        assert optim.setup(opt_state.rule, ps).layout == opt_state.layout
        for step, noise in enumerate(noises):
            opt_state, ps = optim.update(opt_state, ps, noise)
            compiled_state, compiled_ps = compiled(compiled_state, compiled_ps, noise)
            by_hand = optim.adjust(by_hand, lr(step).item(), betas=(0.9, beta(step).item()))
            by_hand, expected = optim.update(by_hand, expected, noise)
        close(ps, expected)
        close(compiled_ps, expected)
        assert "betas=(0.9, Polynomial" in repr(opt_state)

    def test_tensors_are_factors_alone(self):
        lr = torch.tensor(0.1) * optim.linear(1.0, 0.0, 5) * optim.linear(0.0, 1.0, 5)
        assert isinstance(lr.factor, torch.Tensor)
        for make in (lambda s: s + torch.tensor(1.0), lambda s: s ** torch.tensor(2.0), lambda s: lr + s):
            with pytest.raises(DTypeError, match="a schedule or a number"):
                make(optim.linear(1.0, 0.0, 5))
