"""Torch's own configurations of its optimizers against the rules that stand for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch import optim

from .harness import Result, check_same, database, outcome, report

pytestmark = pytest.mark.slow

STEPS = 6


class Missing(Exception):
    """Report that luxtorch has no rule for an optimizer of torch."""


def adam(*, amsgrad=False, weight_decay=0.0, maximize=False, **options):
    if amsgrad:
        return optim.AMSGrad(weight_decay=weight_decay, maximize=maximize, **options)
    return optim.OptimiserChain(optim.WeightDecay(weight_decay, maximize=maximize), optim.Adam(**options))


def adafactor(*, beta2_decay=-0.8, **options):
    return optim.Adafactor(decay_rate=-beta2_decay, **options)


def missing(**options):
    raise Missing("the optimizer")


RULES = {
    "Adadelta": optim.AdaDelta,
    "Adafactor": adafactor,
    "Adagrad": optim.AdaGrad,
    "Adam": adam,
    "Adamax": optim.AdaMax,
    "AdamW": optim.AdamW,
    "ASGD": optim.ASGD,
    "LBFGS": missing,  # here it takes the function itself, and is tested with the other solvers
    "Muon": optim.Muon,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": optim.RMSProp,
    "Rprop": optim.Rprop,
    "SGD": optim.SGD,
    "SparseAdam": missing,
}


def configurations():
    """Yield each configuration of torch's database by a name."""
    for info in database("common_optimizers", "optim_db"):
        for given in info.optim_inputs_func(device="cpu"):
            yield f"{info.optim_cls.__name__} {given.desc}", info.optim_cls, given.kwargs


def rule_of(cls: Any, options: dict[str, Any]) -> Any:
    """Return the rule that stands for an optimizer of torch; a learning rate as the number that it is."""
    options = {name: value.item() if isinstance(value, Tensor) else value for name, value in options.items()}
    return RULES[cls.__name__](**options)


def draw(shapes: dict[str, tuple[int, ...]], key: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    def normal(key, shape):
        if dtype.is_complex:
            return torch.complex(*(lt.random.normal(k, shape, dtype=torch.float64) for k in lt.random.split(key)))
        return lt.random.normal(key, shape, dtype=torch.float64)

    return {name: normal(lt.random.fold_in(key, i), shape).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


SHAPES = {
    "many": {"weight": (3, 4), "bias": (3,), "scalar": (), "kernel": (2, 3, 2), "none": (0, 3)},
    "matrices": {"a": (3, 4), "b": (5, 2)},
}
SPECIAL = {"ordinary": None, "zero": 0.0, "nan": float("nan"), "inf": float("inf"), "tiny": 1e-15, "huge": 1e15}
DTYPES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.05, "complex128": 1e-12}


def gradients(shapes: Any, key: Tensor, dtype: torch.dtype, special: float | None) -> Iterator[dict[str, Tensor]]:
    for step in range(STEPS):
        grads = draw(shapes, lt.random.fold_in(key, step), dtype)
        if special is not None and step == 2:
            grads = {name: torch.full_like(g, special) for name, g in grads.items()}
        yield grads


def of_torch(cls: Any, options: dict[str, Any], ps: Any, all_grads: list[Any]) -> dict[str, Tensor]:
    parameters = {name: torch.nn.Parameter(p.clone()) for name, p in ps.items()}
    optimizer = cls(list(parameters.values()), **options)
    for grads in all_grads:
        for name, p in parameters.items():
            p.grad = grads[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


def of_luxtorch(rule: Any, ps: Any, all_grads: list[Any], how: str) -> dict[str, Tensor]:
    kind = lt.ComponentVector if how == "vector" else dict
    tree: Any = kind(ps)
    opt_state = optim.setup(rule, tree)
    step = lt.jit(optim.update, backend="replay") if how == "jit" else optim.update
    for grads in all_grads:
        grads = kind(grads)
        opt_state, tree = step(opt_state, tree, grads)
    return tree.to_dict() if how == "vector" else tree


def lost(ps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters with NaN for infinity: which of the two an infinite gradient leaves is chance."""
    return {name: torch.where(p.isfinite(), p, torch.nan) for name, p in ps.items()}


def calls(how: str, key: Tensor) -> Iterator[Result]:
    dtypes = ("float64", "bfloat16") if how == "jit" else DTYPES
    specials = ("ordinary", "nan") if how == "jit" else SPECIAL
    for (name, cls, options), dtype_name, kind in itertools.product(configurations(), dtypes, specials):
        place, dtype = f"{name}, {dtype_name}, {kind}", getattr(torch, dtype_name)
        try:
            rule = rule_of(cls, options)
        except Missing as error:
            if (dtype_name, kind) == ("float64", "ordinary"):
                yield Result(f"torch.optim.{cls.__name__}", "refused", str(error), place)
            continue
        shapes = SHAPES["matrices" if cls.__name__ == "Muon" else "many"]
        ps = draw(shapes, lt.random.fold_in(key, 1), dtype)
        all_grads = list(gradients(shapes, lt.random.fold_in(key, 2), dtype, SPECIAL[kind]))
        try:
            wanted = of_torch(cls, options, ps, all_grads)
        except Exception:
            continue  # torch has no such kernel
        # Torch computes with a rate that is a tensor in the precision of that, and with those of ASGD in single.
        single = cls is torch.optim.ASGD or isinstance(options.get("lr"), Tensor)
        tolerance = max(1e-6, DTYPES[dtype_name]) if single else DTYPES[dtype_name]
        outcomes = outcome(
            lambda rule=rule, ps=ps, grads=all_grads: of_luxtorch(rule, ps, grads, how),
            lambda got, wanted=wanted, near=tolerance: check_same(lost(got), lost(wanted), near, strides=False),
        )
        yield Result(f"torch.optim.{cls.__name__}", *outcomes, place)


EXCEPTIONS = {
    "torch.optim.Rprop": "A gradient that is not finite gives NaN, where torch hides that training has failed."
}


@pytest.mark.parametrize("how", ["eager", "jit", "vector"])
def test_optimizers(how, make_key):
    report(f"optimizers, {how}", list(calls(how, make_key())), EXCEPTIONS)
