"""Torch's learning rate schedulers against the schedules that stand for them, over a grid of their options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torchs

import luxtorch as lt
from luxtorch import optim

from .harness import Result, check_same, outcome, report

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*(epoch|lr_scheduler|initial step)")]

LR, STEPS = 0.1, 60


def cases() -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each scheduler with its options, what makes it, and our schedule, None where there is none."""
    for factor, steps in itertools.product((0.5, 1.0, 0.1), (1, 5, 100)):
        yield (
            "ConstantLR",
            lambda o, f=factor, n=steps: torchs.ConstantLR(o, f, n),
            lambda f=factor, n=steps: optim.piecewise([LR * f, LR], [n]),
        )
    for (start, end), steps in itertools.product([(0.2, 0.8), (1.0, 0.0), (1 / 3, 1.0)], (1, 7, 100)):
        yield (
            "LinearLR",
            lambda o, a=start, b=end, n=steps: torchs.LinearLR(o, a, b, n),
            lambda a=start, b=end, n=steps: optim.linear(LR * a, LR * b, n),
        )
    for steps, power in itertools.product((1, 7, 100), (1.0, 2.0, 0.5, 0.0)):
        yield (
            "PolynomialLR",
            lambda o, n=steps, p=power: torchs.PolynomialLR(o, n, p),
            lambda n=steps, p=power: optim.polynomial(LR, 0.0, n, p),
        )
    for gamma in (0.9, 1.0, 1.1, 0.1):
        yield (
            "ExponentialLR",
            lambda o, g=gamma: torchs.ExponentialLR(o, g),
            lambda g=gamma: optim.exponential(LR, g),
        )
    for size, gamma in itertools.product((1, 7, 30), (0.1, 0.5, 1.5)):
        yield (
            "StepLR",
            lambda o, n=size, g=gamma: torchs.StepLR(o, n, g),
            lambda n=size, g=gamma: optim.exponential(LR, g, n, staircase=True),
        )
    for places, gamma in itertools.product(([5, 20], [1], [10, 20, 30], []), (0.1, 0.5)):
        yield (
            "MultiStepLR",
            lambda o, m=places, g=gamma: torchs.MultiStepLR(o, m, g),
            lambda m=places, g=gamma: optim.piecewise([LR * g**i for i in range(len(m) + 1)], m),
        )
    for steps, least in itertools.product((1, 10, 60), (0.0, 0.01, 0.2)):
        # Beyond its last step torch's rate rises again; ours stays.
        yield (
            "CosineAnnealingLR",
            lambda o, n=steps, e=least: torchs.CosineAnnealingLR(o, n, e),
            lambda n=steps, e=least: optim.cosine(LR, e, n),
        )
    for pct, how, div, final, three in itertools.product(
        (0.3, 0.1, 0.5), ("cos", "linear"), (25.0, 2.0), (1e4, 10.0), (False, True)
    ):
        options = {"pct_start": pct, "anneal_strategy": how, "div_factor": div, "final_div_factor": final}
        yield (
            "OneCycleLR",
            lambda o, k=options, t=three: torchs.OneCycleLR(o, LR, STEPS + 1, cycle_momentum=False, three_phase=t, **k),
            lambda k=options, t=three: optim.one_cycle(LR, STEPS + 1, three_phase=t, **k),
        )
    for warmup in (1, 5, 20):
        yield (
            "SequentialLR",
            lambda o, n=warmup: torchs.SequentialLR(
                o, [torchs.LinearLR(o, 0.1, 1.0, n), torchs.CosineAnnealingLR(o, STEPS - n)], [n]
            ),
            lambda n=warmup: optim.warmup_cosine(LR, n, STEPS, start=LR * 0.1),
        )
    for name in ("LambdaLR", "MultiplicativeLR"):
        make = getattr(torchs, name)
        yield (
            name,
            lambda o, make=make: make(o, lambda step: 1 / (1 + step) if make is torchs.LambdaLR else 0.9),
            # Any function of the step is a schedule.
            lambda make=make: (lambda step: LR / (1 + step)) if make is torchs.LambdaLR else optim.exponential(LR, 0.9),
        )


MISSING = {
    "ChainedScheduler": "Products of schedules are functions of the step.",
    "CosineAnnealingWarmRestarts": "`join` of as many `cosine`s.",
    "CyclicLR": "`join` of as many `linear`s.",
    "ReduceLROnPlateau": "It depends on a loss, not on the step: `optim.adjust`.",
}
"""Torch's schedulers for which there is no schedule, with the way out."""


def of_torch(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def by_steps(schedule: Any, steps: int) -> list[float]:
    """Return the rates that a rule takes: what a gradient of ones subtracts."""
    p = torch.zeros((), dtype=torch.float64)
    opt_state, rates = optim.setup(optim.Descent(schedule), p), []
    step = lt.jit(optim.update, backend="replay")
    for _ in range(steps):
        opt_state, new = step(opt_state, p, torch.ones_like(p))
        rates.append((p - new).item())
    return rates


def test_schedules():
    results = []
    for name, make, ours in cases():
        limit = STEPS
        reference = make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR))
        if name == "CosineAnnealingLR":
            limit = min(STEPS, reference.T_max + 1)
        wanted = torch.tensor(of_torch(make, limit), dtype=torch.float64)
        kind, words = outcome(
            lambda ours=ours, limit=limit: torch.tensor(by_steps(ours(), limit), dtype=torch.float64),
            lambda got, wanted=wanted: check_same(got, wanted, 1e-9),
        )
        results.append(Result(name, kind, words))
    report("schedules", results, {})


def test_every_scheduler_is_known():
    known = {name for name, _, _ in cases()} | MISSING.keys()
    classes = {n for n, c in vars(torchs).items() if isinstance(c, type) and issubclass(c, torchs.LRScheduler)}
    assert classes - {"LRScheduler", "SWALR"} <= known | {"_LRScheduler"}
