"""Torch's own samples of its modules, converted by `from_torch`: outputs, buffers, gradients, eager and jitted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch.core import flatten_names

from .harness import ALL, Result, check_same, database, outcome, report

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of modules that are called as their samples say

# Their random numbers are others than the module's, which draws from the global generator.
RANDOM = ("Dropout", "RReLU")


def inputs(info, dtype, training):
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
        found = [one for one in found if one.forward_input is not None]
        limit = len(found) if ALL else 3
        for one in found[:: max(1, -(-len(found) // limit))]:
            args, kwargs = one.constructor_input.args, one.constructor_input.kwargs
            factory = (
                {"device": "cpu", "dtype": dtype} if "dtype" in info.module_cls.__init__.__code__.co_varnames else {}
            )
            module = info.module_cls(*args, **{**factory, **kwargs}).to(dtype).train(training)
            args, kwargs = one.forward_input.args, one.forward_input.kwargs
            yield one.desc, module, args, kwargs
            if any(map(torch.nn.parameter.is_lazy, module.parameters())):  # once more, when it knows its shapes
                module = copy.deepcopy(module)
                module(*args, **kwargs)
                yield f"{one.desc} called", module, args, kwargs


def is_real(leaf):
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided


def total(y):
    """Return a number in which every real output has a weight."""
    leaves = [leaf for leaf in pytree.tree_leaves(y) if is_real(leaf)]
    weights = [torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype)).reshape(leaf.shape) for leaf in leaves]
    return sum(((w * leaf).sum() for w, leaf in zip(weights, leaves, strict=True)), torch.zeros(()))


def of_module(module, args, kwargs):
    """Return the output of a module, its buffers after the call, and the gradients by its parameters."""
    y = module(*args, **kwargs)
    named = dict(module.named_parameters())
    number, gradients = total(y), {}
    if named and number.requires_grad:
        values = torch.autograd.grad(number, list(named.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(named, values, strict=True))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return pytree.tree_map_only(Tensor, Tensor.detach, y), buffers, gradients


def of_layer(layer, x, ps, st, wants_gradients, buffers):
    def loss(ps, x, st):
        y, st = layer(x, ps, st)
        return total(y), (y, st)

    if wants_gradients:
        gradients, (y, st) = lt.gradient(lambda ps: loss(ps, x, st), ps, has_aux=True)
    else:
        gradients, (_, (y, st)) = {}, loss(ps, x, st)
    new = flatten_names(st)
    return y, {name: new[name] for name in buffers}, flatten_names(gradients)


def failure_of_torch(module, args, kwargs, how):
    """Return how torch fails at what is asked of luxtorch: outputs, buffers and gradients, of arguments alone."""
    module = copy.deepcopy(module)  # a lazy one is changed even by a call that fails
    values = dict(module.named_parameters()), dict(module.named_buffers())

    def fn(ps, buffers, args, kwargs):
        def loss(ps):
            y = torch.func.functional_call(module, (ps, buffers), args, kwargs)
            return total(y), ([leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor)], buffers)

        return torch.func.grad(loss, has_aux=True)(ps) if ps else loss(ps)

    try:
        torch.compiler.reset()
        (torch.compile(fn, fullgraph=True, backend="aot_eager") if how == "jit" else fn)(*values, args, kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}."
    return ""


def calls(how: str, training: bool) -> Iterator[Result]:
    for info in database("common_modules", "module_db"):
        name = info.name
        if training and name.removeprefix("nn.").startswith(RANDOM):
            continue
        for dtype in (torch.float64, torch.float32) if how == "eager" else (torch.float64,):
            for desc, module, args, kwargs in inputs(info, dtype, training) if dtype in info.dtypes else ():
                try:
                    wanted = of_module(copy.deepcopy(module), *copy.deepcopy((args, kwargs)))
                except Exception:
                    continue  # it has no such kernel

                def call(module: Any = module, args: Any = args, kwargs: Any = kwargs, wanted: Any = wanted) -> Any:
                    layer, ps, st = lt.from_torch(module)
                    x = args[0] if len(args) == 1 and not kwargs else lt.Inputs(*args, **kwargs)

                    def fn(x: Any, ps: Any, st: Any) -> Any:
                        return of_layer(layer, x, ps, st, bool(wanted[2]), wanted[1])

                    return (lt.jit(fn, backend="replay") if how == "jit" else fn)(x, ps, st)

                near = 1e-9 if dtype == torch.float64 else 1e-4
                outcomes = outcome(
                    call, lambda got, wanted=wanted, near=near: check_same(got, wanted, near, strides=False)
                )
                failure = failure_of_torch(module, args, kwargs, how) if outcomes[0] == "refused" else None
                yield Result(name, *outcomes, f"{desc} {dtype}", failure)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_modules(how, training):
    report(f"modules, {how}, {'train' if training else 'eval'}", list(calls(how, training)), {})
