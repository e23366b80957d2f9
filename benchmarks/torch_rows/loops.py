"""Training steps through a loop, of many more bodies than a compiler likes to see."""

from __future__ import annotations

from ..problems import Data, LeftOut, Problem
from . import Build, Step, training
from .lux_steps import lux_steps


def unrolled(build: Build) -> Build:
    """Leave out what torch.compile would unroll for long: the 100 steps of the GRU took it over 14 minutes.

    The equal layers have three operators each.
    """

    def or_left_out(problem: Problem, data: Data, device: str) -> Step:
        if problem.model != "equal":
            raise LeftOut(f"torch.compile would unroll {problem.steps:,} steps")
        return build(problem, data, device)

    return or_left_out


CANDIDATES: dict[str, Build] = {
    "torch.nn + torch.optim": training.torch_nn(),
    "torch.nn + torch.optim, fused": training.torch_nn(fused=True),
    "torch.compile of torch.nn, fused": unrolled(training.torch_nn(compiled=True, fused=True)),
    "torch.compile of torch.nn, torch's scan, fused": training.torch_nn(compiled=True, scans=True, fused=True),
    "torch.compile of a functional step, dict": unrolled(training.whole_step(flat=False)),
    # The update is a small part of such a step: whether it is in place decides nothing in eager code.
    **{name: build for name, build in lux_steps(training.lux_state).items() if "donate=True" not in name},
}
