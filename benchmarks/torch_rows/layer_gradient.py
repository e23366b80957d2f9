"""One layer's gradient: that of the sum of squares of what it returns, by its parameters and its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad

import luxtorch as lt

from ..problems import Data, Problem
from . import Build, Step
from .models import inputs, lux_model, torch_model


def torch_nn(compiled: bool = False) -> Build:
    """Differentiate the module by autograd."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        module, x = torch_model(problem, data, device), inputs(data, device)[0].requires_grad_()
        wanted = [*module.parameters(), x]

        def forward() -> Tensor:
            return module(x).square().sum()

        call = torch.compile(forward) if compiled else forward
        return lambda: torch.autograd.grad(call(), wanted)

    return build


def functional(problem: Problem, data: Data, device: str) -> Step:
    """Differentiate functional_call by torch.func."""
    module, x = torch_model(problem, data, device), inputs(data, device)[0]
    ps = {name: p.detach() for name, p in module.named_parameters()}
    gradient = grad(lambda ps, x: functional_call(module, ps, (x,)).square().sum(), argnums=(0, 1))
    return lambda: gradient(ps, x)


def luxtorch(vector: bool, compiled: bool = False) -> Build:
    """Differentiate luxtorch's layer by luxtorch."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        layer, ps, st = lux_model(problem, data, device)
        x = inputs(data, device)[0]
        ps = lt.ComponentVector(ps) if vector else ps

        def gradient(ps: Any, x: Tensor) -> Any:
            return lt.gradient(lambda ps, x: layer(x, ps, st)[0].square().sum(), ps, x)

        call = lt.jit(gradient) if compiled else gradient
        return lambda: call(ps, x)

    return build


CANDIDATES: dict[str, Build] = {
    "torch.nn + autograd": torch_nn(),
    "torch.compile of torch.nn": torch_nn(compiled=True),
    "torch.func.grad of functional_call": functional,
    "luxtorch, dict": luxtorch(vector=False),
    "luxtorch, ComponentVector": luxtorch(vector=True),
    "lt.jit, dict": luxtorch(vector=False, compiled=True),
    "lt.jit, ComponentVector": luxtorch(vector=True, compiled=True),
}
