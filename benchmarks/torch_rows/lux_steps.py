"""Training steps of luxtorch: eager and compiled, on dicts and on vectors, with and without donation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import luxtorch as lt
from luxtorch import training

from ..problems import Data, Problem
from . import Build, Step

State = Callable[[Problem, Data, str, bool], tuple[training.TrainState, Any, Any]]
"""Makes a training state, the objective and the data; the last argument says whether of a ComponentVector."""


def lux_steps(state: State) -> dict[str, Build]:
    """Return the candidates by name."""
    return {
        f"{name}, {kind}{given}": build(state, vector, donate)
        for name, build, donated in (("luxtorch", eager, ", donate=True"), ("lt.jit", jitted, ", donated"))
        for kind, vector in (("dict", False), ("ComponentVector", True))
        for given, donate in (("", False), (donated, True))
    }


def eager(state: State, vector: bool, donate: bool) -> Build:
    """Train by `single_train_step`."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ts, objective, batch = state(problem, data, device, vector)

        def step() -> Tensor:
            nonlocal ts
            _, loss, _, ts = training.single_train_step(objective, batch, ts, donate=donate)
            return loss

        return step

    return build


def jitted(state: State, vector: bool, donate: bool) -> Build:
    """Train by `single_train_step`, the whole of it under `lt.jit`."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ts, objective, batch = state(problem, data, device, vector)

        @lt.jit(donate="ts" if donate else ())
        def compiled(ts: training.TrainState, batch: Any) -> tuple[Tensor, training.TrainState]:
            _, loss, _, ts = training.single_train_step(objective, batch, ts)
            return loss, ts

        def step() -> Tensor:
            nonlocal ts
            loss, ts = compiled(ts, batch)
            return loss

        return step

    return build
