"""`optim.rate`: the hyperparameters of the next step, by the formulas of their schedules."""

from __future__ import annotations

import math

import pytest
import torch
import torchopt

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.jit import jit

PS = {"a": {"weight": torch.ones(2, 3)}, "b": torch.ones(3)}
GRADS = {"a": {"weight": torch.full((2, 3), 0.1)}, "b": torch.full((3,), 0.1)}

# Schedules, and their formulas of the steps taken in Python's numbers.
SCHEDULES = {
    "constant": (optim.constant(0.1), lambda n: 0.1),
    "linear": (optim.linear(0.1, 0.02, 4), lambda n: 0.1 - 0.02 * min(n, 4)),
    "polynomial": (optim.polynomial(0.1, 0.0, 4, 2.0), lambda n: 0.1 * (1 - min(n, 4) / 4) ** 2),
    "exponential": (optim.exponential(0.1, 0.5), lambda n: 0.1 * 0.5**n),
    "cosine": (optim.cosine(0.1, 0.0, 4), lambda n: 0.05 * (1 + math.cos(math.pi * min(n, 4) / 4))),
    "piecewise": (optim.piecewise([0.1, 0.01], [2]), lambda n: 0.1 if n < 2 else 0.01),
    "join": (
        optim.join([optim.constant(0.1), optim.exponential(0.2, 0.5)], [2]),
        lambda n: [0.1, 0.1, 0.2, 0.1, 0.05][n],
    ),
    "warmup_cosine": (
        optim.warmup_cosine(0.1, 2, 4),
        lambda n: 0.05 * n if n < 2 else 0.05 * (1 + math.cos(math.pi * (min(n, 4) - 2) / 2)),
    ),
    "one_cycle": (
        optim.one_cycle(0.1, 5),
        lambda n: optim.one_cycle(0.1, 5)(n).item(),  # against torch in test_schedules.py
    ),
    "arithmetic": (0.5 * optim.linear(0.0, 1.0, 4) + 0.1, lambda n: 0.125 * min(n, 4) + 0.1),
    "a function": (lambda n: 0.1 / (1 + n), lambda n: 0.1 / (1 + n)),
    "a factor": (torch.tensor(0.3) * optim.exponential(1.0, 0.5), lambda n: float(torch.tensor(0.3)) * 0.5**n),
}
STEPS = 5


def same(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def rates_of(rule, ps=PS, grads=GRADS, name="lr", read=optim.rate, **extra):
    opt_state, found = optim.setup(rule, ps), []
    for _ in range(STEPS):
        found.append(read(opt_state, name))
        opt_state, ps = optim.update(opt_state, ps, grads, **extra)
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_is_that_of_the_schedule(name):
    schedule, formula = SCHEDULES[name]
    found = rates_of(optim.Descent(schedule))
    assert all(one.dtype == torch.float64 and one.shape == () for one in found)
    same(torch.stack(found), torch.tensor([formula(n) for n in range(STEPS)], dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_is_what_the_next_step_goes_by(name):
    opt_state, ps = optim.setup(optim.Descent(SCHEDULES[name][0]), PS), PS
    for _ in range(STEPS):
        rate = optim.rate(opt_state)
        opt_state, new = optim.update(opt_state, ps, GRADS)
        same(ps["b"] - new["b"], 0.1 * rate.expand(3).float(), 1e-5)
        ps = new


def own(rule):
    """Tell whether a rule is one by itself, with a learning rate."""
    return isinstance(rule, type) and issubclass(rule, optim.ListRule) and "lr" in rule.hyperparameters


RULES = sorted({rule.__name__ for rule in vars(optim).values() if own(rule)} - {"LBFGS"})
EXTRA = {"value": torch.tensor(1.0), "hessian": GRADS}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_rate(name):
    found = rates_of(getattr(optim, name)(lr=optim.linear(0.1, 0.02, 4)), {"a": PS["a"]}, {"a": GRADS["a"]}, **{
        **EXTRA, "hessian": {"a": GRADS["a"]}
    })  # fmt: skip
    same(torch.stack(found), torch.tensor([0.1, 0.08, 0.06, 0.04, 0.02], dtype=torch.float64))


@pytest.mark.parametrize("name", RULES)
def test_every_hyperparameter_is_read(name):
    rule = getattr(optim, name)()
    opt_state = optim.setup(rule, {"a": PS["a"]})
    for hyperparameter in rule.hyperparameters:
        same(optim.rate(opt_state, hyperparameter), torch.tensor(getattr(rule, hyperparameter), dtype=torch.float64))


LINEAR = optim.linear(0.1, 0.02, 4)
MODIFIED = {
    "chain": (optim.OptimiserChain(optim.ClipNorm(1.0), optim.Adam(LINEAR)), [0.1, 0.08, 0.06, 0.04, 0.02]),
    "mixed precision": (optim.MixedPrecision(optim.Adam(LINEAR)), [0.1, 0.08, 0.06, 0.04, 0.02]),
    "accumulated": (optim.OptimiserChain(optim.AccumGrad(2), optim.Adam(LINEAR)), [0.1, 0.1, 0.08, 0.08, 0.06]),
    "plateau": (
        optim.OptimiserChain(optim.Adam(0.1), optim.ReduceLROnPlateau(0.5, patience=0)),
        [0.1, 0.1, 0.05, 0.025, 0.0125],
    ),
    "plateau of a schedule": (
        optim.OptimiserChain(optim.Adam(LINEAR), optim.ReduceLROnPlateau(0.5, patience=0)),
        [0.1, 0.08, 0.03, 0.01, 0.0025],
    ),
    "torchopt's chain": (
        torchopt.chain(torchopt.clip_grad_norm(1.0), optim.Adam(LINEAR)),
        [0.1, 0.08, 0.06, 0.04, 0.02],
    ),
}


@pytest.mark.parametrize("name", MODIFIED)
@pytest.mark.parametrize("way", ["eager", "jit"])
def test_modifiers_count(name, way):
    rule, expected = MODIFIED[name]
    read = jit(optim.rate, backend="replay", static="name") if way == "jit" else optim.rate
    found = rates_of(rule, value=torch.tensor(1.0), read=read)
    same(torch.stack(found), torch.tensor(expected, dtype=torch.float64), 1e-12)


def test_a_plateau_before_the_rule_changes_no_rate():
    rule = optim.OptimiserChain(optim.ReduceLROnPlateau(0.5, patience=0), optim.Adam(0.1))
    assert [one.item() for one in rates_of(rule, value=torch.tensor(1.0))] == [0.1] * STEPS


def test_groups_have_a_rate_each():
    rule = optim.Groups({"a": optim.Adam(LINEAR), lambda name: name == "b": optim.Descent(0.3)})
    first, second, *_ = rates_of(rule)
    assert {k: v.item() for k, v in first.items()} == {"a": 0.1, "<predicate 1>": 0.3}
    assert {k: v.item() for k, v in second.items()} == {"a": pytest.approx(0.08), "<predicate 1>": 0.3}
    assert list(optim.rate(optim.setup(optim.Groups({"b": optim.Adam()}, rest=optim.Lion()), PS))) == ["b", "rest"]


def test_a_chain_around_groups_counts_for_each():
    groups = optim.Groups({"a": optim.Adam(0.1)}, rest=optim.Descent(0.4))
    rule = optim.OptimiserChain(groups, optim.ReduceLROnPlateau(0.5, patience=0))
    assert {k: v.item() for k, v in rates_of(rule, value=torch.tensor(1.0))[2].items()} == {"a": 0.05, "rest": 0.2}


def test_what_was_adjusted_by_path_is_a_tree():
    opt_state = optim.adjust(optim.setup(optim.Adam(0.1), PS), 0.5, path="a")
    rates = optim.rate(opt_state)
    assert (rates["a"]["weight"].item(), rates["b"].item()) == (0.5, 0.1)


@pytest.mark.parametrize("kind", ["tensor", "vector"])
def test_trees_of_all_kinds(kind):
    ps = torch.ones(3) if kind == "tensor" else lt.ComponentVector({"a": torch.ones(2), "b": torch.zeros(1)})
    assert [round(one.item(), 6) for one in rates_of(optim.Adam(LINEAR), ps, ps)] == [0.1, 0.08, 0.06, 0.04, 0.02]


def test_the_rates_of_many_models():
    expected = torch.tensor([0.1, 0.08, 0.06, 0.04, 0.02], dtype=torch.float64)[:, None] * torch.ones(3)
    same(torch.stack(rates_of(optim.per_member(optim.Adam(LINEAR), 3), {"w": torch.ones(3, 2)}, {"w": torch.ones(3, 2)})), expected)  # fmt: skip  # noqa: E501
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def one(rate):
        opt_state, ps = optim.setup(optim.Descent(rate * optim.exponential(1.0, 0.5)), PS), PS
        inside = [optim.rate(opt_state)]
        opt_state, ps = optim.update(opt_state, ps, GRADS)
        return torch.stack([*inside, optim.rate(opt_state)]), opt_state

    inside, opt_state = torch.vmap(one)(rates)
    same(inside, torch.stack([rates, 0.5 * rates], 1), 1e-12)
    same(optim.rate(opt_state), 0.5 * rates, 1e-12)


def test_a_gradient_flows_into_the_rate():
    rate = lambda lr: optim.rate(optim.setup(optim.Descent(lr * optim.constant(0.5)), PS))  # noqa: E731
    assert torch.func.grad(rate)(torch.tensor(2.0)).item() == 0.5


@pytest.mark.parametrize(
    "rule, name, error, text",
    [
        (torchopt.adam(0.1), "lr", lt.InputError, "torchopt hides its own"),
        (optim.Adam(), "lrs", lt.KeyNameError, "Did you mean 'lr'"),
        (optim.OptimiserChain(optim.Descent(0.1), optim.Adam()), "lr", lt.InputError, "Two rules"),
        (optim.OptimiserChain(), "lr", lt.InputError, "no hyperparameters"),
    ],
)
def test_what_cannot_be_read_is_an_error(rule, name, error, text):
    with pytest.raises(error, match=text):
        optim.rate(optim.setup(rule, PS), name)


# In the stats of a training step.


def objective(stats):
    def f(model, ps, st, data):
        y, st = model(data, ps, st)
        return y.square().mean(), st, stats

    return f


def steps(rule, stats, step=training.single_train_step, **options):
    model = lt.Dense(2, 1)
    ts, found = training.TrainState(model, *lt.setup(0, model), rule), []
    for _ in range(3):
        _, _, made, ts = step(objective(stats), torch.ones(4, 2), ts, **options)
        found.append(made)
    return found


@pytest.mark.parametrize("options", [{}, {"donate": True}, {"skip_nonfinite": True}])
def test_a_rate_that_changes_is_in_the_stats(options):
    found = steps(optim.Adam(LINEAR), {"largest": torch.tensor(1.0)}, **options)
    assert all(one.keys() == {"largest", "rate"} for one in found)
    same(torch.stack([one["rate"] for one in found]), torch.tensor([0.1, 0.08, 0.06], dtype=torch.float64), 1e-12)


def test_a_compiled_step_has_it_too():
    model = lt.Dense(2, 1)
    ts, found = training.TrainState(model, *lt.setup(0, model), optim.Adam(LINEAR)), []

    @jit(donate="ts", backend="replay")
    def step(ts):
        _, _, stats, ts = training.single_train_step(objective({}), torch.ones(4, 2), ts)
        return stats, ts

    for _ in range(3):
        stats, ts = step(ts)
        found.append(stats["rate"])
    same(torch.stack(found), torch.tensor([0.1, 0.08, 0.06], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("stats", [{"rate": 7}, None, (1,)], ids=str)
def test_stats_of_the_user_stay(stats):
    assert steps(optim.Adam(LINEAR), stats) == [stats] * 3


@pytest.mark.parametrize("rule", [torchopt.adam(0.1), optim.Adam(0.1)], ids=["torchopt", "fixed"])
def test_a_rate_that_does_not_change_is_not_in_the_stats(rule):
    assert steps(rule, {}) == [{}] * 3


def test_stats_of_microbatches_stay():
    assert steps(optim.Adam(LINEAR), {}, accumulate=2) == [({}, {})] * 3


def test_loggers_take_the_stats(tmp_path):
    logger = training.CSVLogger(tmp_path / "run.csv")
    rule = optim.Groups({"weight": optim.Adam(LINEAR)}, rest=optim.Descent(0.5))
    for step, stats in enumerate(steps(rule, {})):
        logger.log(step, stats)
    assert logger.path.read_text().splitlines()[0] == "step,rate/weight,rate/rest"
