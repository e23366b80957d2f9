"""A training step of 32 models at once, on the same batch; the loss is the sum of theirs."""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

import luxtorch as lt
from luxtorch import optim, training

from ..problems import Data, Problem
from . import Build, Step
from .hand_written import adam, update, views
from .lux_steps import lux_steps
from .models import inputs, models, tensors, torch_model


def modules(problem: Problem, data: Data, device: str) -> list[nn.Module]:
    """Return the members as modules."""
    members = [Data({name: p[i] for name, p in data.ps.items()}, data.x, data.y) for i in range(_members(data))]
    return [torch_model(problem, member, device) for member in members]


def loop(one_optimizer: bool = False, **options: bool) -> Build:
    """Train the modules one after another, by an optimizer each or one for all."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        x, y = inputs(data, device)
        members = modules(problem, data, device)
        groups = [list(member.parameters()) for member in members]
        groups = [[p for group in groups for p in group]] if one_optimizer else groups
        optimizers = [torch.optim.Adam(group, lr=problem.lr, **options) for group in groups]

        def step() -> Tensor:
            total = torch.zeros((), device=device)
            for optimizer in optimizers:
                optimizer.zero_grad()
            for member in members:
                loss = (member(x) - y).square().mean()
                loss.backward()
                total += loss.detach()
            for optimizer in optimizers:
                optimizer.step()
            return total

        return step

    return build


def with_torchopt(problem: Problem, data: Data, device: str) -> Step:
    """Train the stacked modules by vmap over functional_call, and torchopt."""
    ps, (x, y) = tensors(data.ps, device), inputs(data, device)
    module = modules(problem, data, device)[0]
    gradients = vmap(grad_and_value(lambda ps: (functional_call(module, ps, (x,)) - y).square().mean()))
    rule = torchopt.adam(problem.lr)
    state = rule.init(ps)

    def step() -> Tensor:
        nonlocal ps, state
        grads, losses = gradients(ps)
        updates, state = rule.update(grads, state, inplace=False)
        ps = torchopt.apply_updates(ps, updates, inplace=False)
        return losses.sum()

    return step


def whole_step(flat: bool) -> Build:
    """Compile a whole step that was written by hand, parameters in a dict or in one vector a member."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        ps, (x, y) = tensors(data.ps, device), inputs(data, device)
        shapes = {name: p.shape[1:] for name, p in ps.items()}
        ps = {"flat": torch.cat([p.flatten(1) for p in ps.values()], 1)} if flat else ps
        state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in ps.items()}
        count, lr = torch.zeros((), device=device), problem.lr
        module = modules(problem, data, device)[0]

        def loss(ps: Any, x: Tensor, y: Tensor) -> Tensor:
            ps = views(ps["flat"], shapes) if flat else ps
            return (functional_call(module, ps, (x,)) - y).square().mean()

        @torch.compile(fullgraph=True)
        def whole(ps: Any, state: Any, count: Tensor, x: Tensor, y: Tensor) -> Any:
            grads, losses = vmap(grad_and_value(loss), (0, None, None))(ps, x, y)
            count = count + 1
            ps, state = update(adam, ps, grads, state, count, lr)
            return ps, state, count, losses.sum()

        def step() -> Tensor:
            nonlocal ps, state, count
            ps, state, count, total = whole(ps, state, count, x, y)
            return total

        return step

    return build


def objective(model: lt.Layer, ps: Any, st: Any, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return the sum of the members' losses: each member's gradient is that of its own."""
    x, y = data
    y_hat, st = model(x, ps, st)
    return (y_hat - y).square().mean((1, 2)).sum(), st, {}


def lux_state(problem: Problem, data: Data, device: str, vector: bool) -> tuple[training.TrainState, Any, Any]:
    """Return luxtorch's training state of an ensemble, the objective and the data."""
    layer = lt.Ensemble(models(problem, data)[1], _members(data))
    ps, st, _ = lt.load_weights(tensors(data.ps, "cpu"), *lt.setup(0, layer))
    ps, st = lt.to_device((ps, st), device)
    ts = training.TrainState(layer, lt.ComponentVector(ps) if vector else ps, st, optim.Adam(problem.lr))
    return ts, objective, inputs(data, device)


def _members(data: Data) -> int:
    return len(next(iter(data.ps.values())))


CANDIDATES: dict[str, Build] = {
    "torch.nn + torch.optim, a loop": loop(),
    "torch.nn + torch.optim, fused, a loop": loop(fused=True),
    "torch.nn, a loop, one fused Adam for all": loop(one_optimizer=True, fused=True),
    "vmap of functional_call + torchopt": with_torchopt,
    "torch.compile of a functional step, dict": whole_step(flat=False),
    "torch.compile of a functional step, flat": whole_step(flat=True),
    **lux_steps(lux_state),
}
