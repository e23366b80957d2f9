"""The product of a loss's Hessian and a vector; the vector is that of the parameters themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp

import luxtorch as lt

from ..problems import Data, Problem
from . import Build, Step
from .models import LOSSES, inputs, lux_model, torch_model


def double_backward(problem: Problem, data: Data, device: str) -> Step:
    """Differentiate the module's gradient by autograd."""
    module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]
    (x, y), ps = inputs(data, device), list(module.parameters())
    us = [p.detach().clone() for p in ps]

    def step() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss_of(module(x), y), ps, create_graph=True)
        return torch.autograd.grad(grads, ps, us)

    return step


def functional(forward: bool, compiled: bool = False) -> Build:
    """Differentiate the gradient of functional_call by torch.func, in forward or in reverse mode."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]
        x, y = inputs(data, device)
        ps = {name: p.detach() for name, p in module.named_parameters()}
        us = {name: p.clone() for name, p in ps.items()}

        def product(ps: Any, us: Any, x: Tensor, y: Tensor) -> Any:
            gradient = grad(lambda ps: loss_of(functional_call(module, ps, (x,)), y))
            return jvp(gradient, (ps,), (us,))[1] if forward else vjp(gradient, ps)[1](us)[0]

        call = torch.compile(product, fullgraph=True) if compiled else product
        return lambda: call(ps, us, x, y)

    return build


def luxtorch(vector: bool, compiled: bool = False) -> Build:
    """Call lt.hvp."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        layer, ps, st = lux_model(problem, data, device)
        (x, y), loss_of = inputs(data, device), LOSSES[problem.loss][1]
        ps = lt.ComponentVector(ps) if vector else ps
        us = ps + 0 if vector else lt.unflatten_names({n: p.clone() for n, p in lt.flatten_names(ps).items()}, like=ps)

        def product(ps: Any, us: Any, x: Tensor, y: Tensor) -> Any:
            return lt.hvp(lambda ps: loss_of(layer(x, ps, st)[0], y), ps, us)

        call = lt.jit(product) if compiled else product
        return lambda: call(ps, us, x, y)

    return build


CANDIDATES: dict[str, Build] = {
    "torch.nn, autograd.grad twice": double_backward,
    "torch.func: jvp of grad": functional(forward=True),
    "torch.func: vjp of grad": functional(forward=False),
    "torch.compile of jvp of grad": functional(forward=True, compiled=True),
    "torch.compile of vjp of grad": functional(forward=False, compiled=True),
    "luxtorch, dict": luxtorch(vector=False),
    "luxtorch, ComponentVector": luxtorch(vector=True),
    "lt.jit, dict": luxtorch(vector=False, compiled=True),
    "lt.jit, ComponentVector": luxtorch(vector=True, compiled=True),
}
