"""The gradient of each sample of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import luxtorch as lt

from ..problems import Data, Problem
from . import Build, Step
from .models import LOSSES, inputs, lux_model, require_traceable, torch_model


def loop(problem: Problem, data: Data, device: str) -> Step:
    """Differentiate the module once for each sample."""
    module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]
    (x, y), ps = inputs(data, device), list(module.parameters())

    def step() -> list[Tensor]:
        each = [torch.autograd.grad(loss_of(module(x[i, None]), y[i, None]), ps) for i in range(len(x))]
        return [torch.stack(grads) for grads in zip(*each, strict=True)]

    return step


def vmapped(compiled: bool = False) -> Build:
    """Differentiate functional_call by vmap of grad."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        if compiled:
            require_traceable(problem)
        module, loss_of = torch_model(problem, data, device), LOSSES[problem.loss][0]
        (x, y), ps = inputs(data, device), {name: p.detach() for name, p in module.named_parameters()}
        each = vmap(grad(lambda ps, x, y: loss_of(functional_call(module, ps, (x[None],)), y[None])), (None, 0, 0))
        call = torch.compile(each, fullgraph=True) if compiled else each
        return lambda: call(ps, x, y)

    return build


def luxtorch(vector: bool, compiled: bool = False) -> Build:
    """Call lt.per_sample_gradients."""

    def build(problem: Problem, data: Data, device: str) -> Step:
        layer, ps, st = lux_model(problem, data, device)
        batch, loss_of = inputs(data, device), LOSSES[problem.loss][1]
        ps = lt.ComponentVector(ps) if vector else ps

        def loss(ps: Any, st: Any, sample: tuple[Tensor, Tensor]) -> Tensor:
            x, y = sample
            return loss_of(layer(x, ps, st)[0], y)

        def each(ps: Any, st: Any, batch: Any) -> Any:
            return lt.per_sample_gradients(loss, ps, st, batch)

        call = lt.jit(each) if compiled else each
        return lambda: call(ps, st, batch)

    return build


CANDIDATES: dict[str, Build] = {
    "torch.nn, a loop over the samples": loop,
    "torch.func: vmap(grad(functional_call))": vmapped(),
    "torch.compile of vmap(grad(functional_call))": vmapped(compiled=True),
    "luxtorch, dict": luxtorch(vector=False),
    "luxtorch, ComponentVector": luxtorch(vector=True),
    "lt.jit, dict": luxtorch(vector=False, compiled=True),
    "lt.jit, ComponentVector": luxtorch(vector=True, compiled=True),
}
