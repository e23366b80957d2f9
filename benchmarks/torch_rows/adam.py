"""The update of Adam alone, with gradients that are there: they are the initial parameters."""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training

from ..problems import Data, Problem
from . import Build, Step
from .hand_written import adam, update
from .models import tensors


def torch_optim(compiled: bool = False, **options: bool) -> Build:
    """Update by torch.optim, in place."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps = [torch.nn.Parameter(p) for p in tensors(data.ps, device).values()]
        for p, grad in zip(ps, tensors(data.ps, device).values(), strict=True):
            p.grad = grad
        optimizer = torch.optim.Adam(ps, lr=torch.tensor(problem.lr) if compiled else problem.lr, **options)
        call = torch.compile(optimizer.step) if compiled else optimizer.step

        def step() -> list[Tensor]:
            call()
            return [p.detach() for p in ps]

        return step

    return build


def with_torchopt(problem: Problem, data: Data, device: str) -> Step:
    """Update by torchopt, out of place."""
    ps, grads = tensors(data.ps, device), tensors(data.ps, device)
    rule = torchopt.adam(problem.lr)
    state = rule.init(ps)

    def step() -> dict[str, Tensor]:
        nonlocal ps, state
        updates, state = rule.update(grads, state, inplace=False)
        ps = torchopt.apply_updates(ps, updates, inplace=False)
        return ps

    return step


def by_hand(flat: bool) -> Build:
    """Compile an Adam that was written by hand, parameters in a dict or in one vector."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps = tensors(data.ps, device)
        ps = {"flat": torch.cat(list(ps.values()))} if flat else ps
        grads = {name: p.clone() for name, p in ps.items()}
        state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in ps.items()}
        count, lr = torch.zeros((), device=device), problem.lr

        @torch.compile(fullgraph=True)
        def whole(ps: Any, state: Any, count: Tensor, grads: Any) -> Any:
            count = count + 1
            return *update(adam, ps, grads, state, count, lr), count

        def step() -> Any:
            nonlocal ps, state, count
            ps, state, count = whole(ps, state, count, grads)
            return ps

        return step

    return build


def lux_trees(data: Data, device: str, vector: bool) -> tuple[Any, Any]:
    """Return the parameters, and gradients that equal them."""
    ps, grads = tensors(data.ps, device), tensors(data.ps, device)
    return (lt.ComponentVector(ps), lt.ComponentVector(grads)) if vector else (ps, grads)


def luxtorch(vector: bool) -> Build:
    """Update by luxtorch's Adam."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps, grads = lux_trees(data, device, vector)
        opt_state = optim.setup(optim.Adam(problem.lr), ps)

        def step() -> Any:
            nonlocal ps, opt_state
            opt_state, ps = optim.update(opt_state, ps, grads)
            return ps

        return step

    return build


def luxtorch_donated(vector: bool) -> Build:
    """Update a training state that is given away: its memory is used again."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps, grads = lux_trees(data, device, vector)
        ts = training.TrainState(lt.NoOpLayer(), ps, {}, optim.Adam(problem.lr))
        calls = 0

        def step() -> Any:
            nonlocal ts, calls
            calls += 1
            ts = training.apply_gradients(ts, grads, donate=True)
            # Who reads a training state may keep what was read, so that the next step does not reuse its memory.
            return ts.parameters if calls <= 4 else None

        return step

    return build


def luxtorch_jit(vector: bool, donate: bool = False) -> Build:
    """Update by luxtorch's Adam, compiled."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps, grads = lux_trees(data, device, vector)
        opt_state = optim.setup(optim.Adam(problem.lr), ps)

        @lt.jit(donate=("opt_state", "ps") if donate else ())
        def updated(opt_state: optim.OptState, ps: Any, grads: Any) -> Any:
            return optim.update(opt_state, ps, grads)

        def step() -> Any:
            nonlocal ps, opt_state
            opt_state, ps = updated(opt_state, ps, grads)
            return ps

        return step

    return build


CANDIDATES: dict[str, Build] = {
    "torch.optim.Adam": torch_optim(),
    "torch.optim.Adam, foreach": torch_optim(foreach=True),
    "torch.optim.Adam, fused": torch_optim(fused=True),
    "torch.compile of torch.optim.Adam": torch_optim(compiled=True),
    "torchopt.adam": with_torchopt,
    "torch.compile of a functional Adam, dict": by_hand(flat=False),
    "torch.compile of a functional Adam, flat": by_hand(flat=True),
    "luxtorch, dict": luxtorch(vector=False),
    "luxtorch, dict, donate=True": luxtorch_donated(vector=False),
    "luxtorch, ComponentVector": luxtorch(vector=True),
    "luxtorch, ComponentVector, donate=True": luxtorch_donated(vector=True),
    "lt.jit, dict": luxtorch_jit(vector=False),
    "lt.jit, dict, donated": luxtorch_jit(vector=False, donate=True),
    "lt.jit, ComponentVector": luxtorch_jit(vector=True),
    "lt.jit, ComponentVector, donated": luxtorch_jit(vector=True, donate=True),
}
