"""A step of model-agnostic meta-learning: the loss is that of parameters after gradient descent on each task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap

import luxtorch as lt
from luxtorch import optim
from luxtorch import training as lux_training

from ..problems import INNER_LR, INNER_STEPS, Data, Problem
from . import Build, Step, training
from .hand_written import views
from .lux_steps import lux_steps
from .models import LOSSES, inputs, torch_model


def functional(problem: Problem, data: Data, device: str, shapes: Any = None) -> Callable[..., Any]:
    """Return what `training.functional` does, of the mean over tasks."""
    module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]

    def loss(ps: Any, x: Tensor, y: Tensor) -> Tensor:
        ps = views(ps["flat"], shapes) if shapes else ps
        return loss_of(functional_call(module, ps, (x,)), y)

    def of_task(ps: Any, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(INNER_STEPS):
            grads = grad(loss)(ps, x[0], y[0])
            ps = {name: p - INNER_LR * grads[name] for name, p in ps.items()}
        return loss(ps, x[1], y[1])

    def mean(ps: Any, buffers: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        return vmap(of_task, (None, 0, 0))(ps, x, y).mean(), buffers

    return grad_and_value(mean, has_aux=True)


def torch_optim(**options: bool) -> Build:
    """Take gradients by torch.func, and update by torch.optim, in place."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        (ps, buffers), (x, y) = training.trees(problem, data, device), inputs(data, device)
        gradients = functional(problem, data, device)
        optimizer = getattr(torch.optim, problem.optimizer)(ps.values(), lr=problem.lr, **options)

        def step() -> Tensor:
            grads, (loss, _) = gradients(ps, buffers, x, y)
            for name, p in ps.items():
                p.grad = grads[name]
            optimizer.step()
            return loss

        return step

    return build


def objective(model: lt.Layer, ps: Any, st: Any, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return the mean over tasks of the loss after gradient descent, for luxtorch."""

    def loss(ps: Any, x: Tensor, y: Tensor) -> Tensor:
        return lt.MSELoss()(model(x, ps, st)[0], y)

    def of_task(x: Tensor, y: Tensor) -> Tensor:
        opt_state, adapted = optim.setup(optim.Descent(INNER_LR), ps), ps
        for _ in range(INNER_STEPS):
            grads = lt.gradient(lambda ps: loss(ps, x[0], y[0]), adapted)
            opt_state, adapted = optim.update(opt_state, adapted, grads)
        return loss(adapted, x[1], y[1])

    return vmap(of_task)(*data).mean(), st, {}


def lux_state(problem: Problem, data: Data, device: str, vector: bool) -> tuple[lux_training.TrainState, Any, Any]:
    """Return luxtorch's training state, the objective and the tasks."""
    ts, _, batch = training.lux_state(problem, data, device, vector)
    return ts, objective, batch


CANDIDATES: dict[str, Build] = {
    "torch.func + torch.optim": torch_optim(),
    "torch.func + torch.optim, fused": torch_optim(fused=True),
    "torch.func + torchopt": training.with_torchopt(functional),
    "torch.compile of a functional step, dict": training.whole_step(flat=False, functional=functional),
    "torch.compile of a functional step, flat": training.whole_step(flat=True, functional=functional),
    **lux_steps(lux_state),
}
