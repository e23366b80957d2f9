"""Training steps: forward, backward and update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor
from torch.func import functional_call, grad_and_value

import luxtorch as lt
from luxtorch import optim, training

from ..problems import Data, Problem
from . import Build, Step
from .hand_written import adam, sgd, update, views
from .loop_models import Looping
from .lux_steps import lux_steps
from .models import LOSSES, inputs, lux_model, require_traceable, torch_model

Functional = Callable[[Problem, Data, str, Any], Callable[..., Any]]
"""What `functional` is, for another loss than that of a batch."""


def torch_nn(compiled: bool = False, scans: bool = False, **options: bool) -> Build:
    """Train a module by torch.optim, in place; with `scans`, loops in it are torch's scan."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]
        for part in module.modules():
            if isinstance(part, Looping):
                part.scans = scans
        x, y = inputs(data, device)
        optimizer = getattr(torch.optim, problem.optimizer)(module.parameters(), lr=problem.lr, **options)

        def forward() -> Tensor:
            return loss_of(module(x), y)

        # A graph that may break reads no numbers out of tensors, as the loop of torch's scan has to.
        call = torch.compile(forward, fullgraph=scans) if compiled else forward

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = call()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()

        return step

    return build


def functional(problem: Problem, data: Data, device: str, shapes: Any = None) -> Callable[..., Any]:
    """Return a function of parameters, buffers and a batch that gives the gradients, the loss and the new buffers.

    With shapes, the parameters are in one vector, named "flat".
    """
    module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]

    def loss(ps: Any, buffers: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        ps = views(ps["flat"], shapes) if shapes else ps
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # BatchNorm writes into them
        return loss_of(functional_call(module, (ps, buffers), (x,)), y), buffers

    return grad_and_value(loss, has_aux=True)


def trees(problem: Problem, data: Data, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the initial parameters and buffers by name."""
    module = torch_model(problem, data, device)
    return {name: p.detach() for name, p in module.named_parameters()}, dict(module.named_buffers())


def with_torchopt(functional: Functional = functional) -> Build:
    """Take gradients by torch.func and functional_call, and update by torchopt, out of place."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        (ps, buffers), (x, y) = trees(problem, data, device), inputs(data, device)
        gradients = functional(problem, data, device, None)
        rule = getattr(torchopt, problem.optimizer.lower())(problem.lr)
        state = rule.init(ps)

        def step() -> Tensor:
            nonlocal ps, buffers, state
            grads, (loss, buffers) = gradients(ps, buffers, x, y)
            updates, state = rule.update(grads, state, inplace=False)
            ps = torchopt.apply_updates(ps, updates, inplace=False)
            return loss

        return step

    return build


def whole_step(flat: bool, functional: Functional = functional) -> Build:
    """Compile a whole step that was written by hand, parameters in a dict or in one vector."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        require_traceable(problem)
        (ps, buffers), (x, y) = trees(problem, data, device), inputs(data, device)
        lr, (rule, moments) = problem.lr, {"Adam": (adam, 2), "SGD": (sgd, 0)}[problem.optimizer]
        shapes = {name: p.shape for name, p in ps.items()}
        ps = {"flat": torch.cat([p.reshape(-1) for p in ps.values()])} if flat else ps
        state = {name: tuple(torch.zeros_like(p) for _ in range(moments)) for name, p in ps.items()}
        count = torch.zeros((), device=device)
        gradients = functional(problem, data, device, shapes if flat else None)

        @torch.compile(fullgraph=True)
        def whole(ps: Any, buffers: Any, state: Any, count: Tensor, x: Tensor, y: Tensor) -> Any:
            grads, (loss, buffers) = gradients(ps, buffers, x, y)
            count = count + 1
            ps, state = update(rule, ps, grads, state, count, lr)
            return ps, buffers, state, count, loss

        def step() -> Tensor:
            nonlocal ps, buffers, state, count
            ps, buffers, state, count, loss = whole(ps, buffers, state, count, x, y)
            return loss

        return step

    return build


def lux_state(problem: Problem, data: Data, device: str, vector: bool) -> tuple[training.TrainState, lt.Loss, Any]:
    """Return luxtorch's training state, loss and data."""
    layer, ps, st = lux_model(problem, data, device)
    rule = optim.Adam(problem.lr) if problem.optimizer == "Adam" else optim.Descent(problem.lr)
    ts = training.TrainState(layer, lt.ComponentVector(ps) if vector else ps, st, rule)
    return ts, LOSSES[problem.loss][1], inputs(data, device)


CANDIDATES: dict[str, Build] = {
    "torch.nn + torch.optim": torch_nn(),
    "torch.nn + torch.optim, foreach": torch_nn(foreach=True),
    "torch.nn + torch.optim, fused": torch_nn(fused=True),
    "torch.compile of torch.nn, fused": torch_nn(compiled=True, fused=True),
    "functional_call + torchopt": with_torchopt(),
    "torch.compile of a functional step, dict": whole_step(flat=False),
    "torch.compile of a functional step, flat": whole_step(flat=True),
    **lux_steps(lux_state),
}
