"""One layer's forward, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import luxtorch as lt

from ..problems import Data, Problem
from . import Build, Step
from .models import inputs, lux_model, torch_model

Forward = Callable[[Any, Tensor], Tensor]


def torch_nn(compiled: bool = False) -> Build:
    """Call the module."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        module, x = torch_model(problem, data, device), inputs(data, device)[0]
        call = torch.compile(module) if compiled else module
        return torch.no_grad()(lambda: call(x))

    return build


def functional(problem: Problem, data: Data, device: str) -> Step:
    """Call the module by functional_call."""
    module, x = torch_model(problem, data, device), inputs(data, device)[0]
    ps = {name: p.detach() for name, p in module.named_parameters()}
    return lambda: functional_call(module, ps, (x,))


def luxtorch(vector: bool, compiled: bool = False) -> Build:
    """Call luxtorch's layer."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        layer, ps, st = lux_model(problem, data, device)
        x = inputs(data, device)[0]
        ps = lt.ComponentVector(ps) if vector else ps
        call: Any = lt.jit(lambda x, ps, st: layer(x, ps, st)) if compiled else layer
        return lambda: call(x, ps, st)[0]

    return build


CANDIDATES: dict[str, Build] = {
    "torch.nn": torch_nn(),
    "torch.compile of torch.nn": torch_nn(compiled=True),
    "functional_call": functional,
    "luxtorch, dict": luxtorch(vector=False),
    "luxtorch, ComponentVector": luxtorch(vector=True),
    "lt.jit, dict": luxtorch(vector=False, compiled=True),
    "lt.jit, ComponentVector": luxtorch(vector=True, compiled=True),
}
