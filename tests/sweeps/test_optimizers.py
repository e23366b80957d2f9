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
    """Report that luxtorch has no rule for an optimizer of torch, or for one of its options."""


def number(value: Any) -> Any:
    """Return a learning rate as the number that it is."""
    return value.item() if isinstance(value, Tensor) else value


def decayed(rule: Any, decay: float) -> Any:
    """Return a rule after L2 regularization, which is added to the gradient."""
    return optim.OptimiserChain(optim.WeightDecay(decay), rule) if decay else rule


def sgd(*, lr=1e-3, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
    if dampening:
        raise Missing("dampening")
    if not momentum:
        return decayed(optim.Descent(lr), weight_decay)
    return decayed((optim.Nesterov if nesterov else optim.Momentum)(lr, momentum), weight_decay)


def adam(*, amsgrad=False, weight_decay=0.0, **options):
    return decayed((optim.AMSGrad if amsgrad else optim.Adam)(**options), weight_decay)


def adamw(*, amsgrad=False, weight_decay=1e-2, lr=1e-3, **options):
    if amsgrad:
        raise Missing("decoupled weight decay with AMSGrad")
    return optim.AdamW(lr, weight_decay=weight_decay, **options)


def adagrad(*, initial_accumulator_value=0.0, **options):
    if initial_accumulator_value:
        raise Missing("initial_accumulator_value")
    return optim.AdaGrad(**options)


def adafactor(*, beta2_decay=-0.8, **options):
    return optim.Adafactor(decay_rate=-beta2_decay, **options)


def rmsprop(*, momentum=0.0, lr=1e-2, weight_decay=0.0, **options):
    if not momentum:
        return optim.RMSProp(lr, weight_decay=weight_decay, **options)
    # The momentum is that of the divided gradient.
    rule = optim.RMSProp(1.0, weight_decay=weight_decay, **options)
    return optim.OptimiserChain(rule, optim.Momentum(lr, momentum))


def muon(*, ns_coefficients=None, adjust_lr_fn="original", **options):
    if ns_coefficients or adjust_lr_fn not in ("original", "match_rms_adamw"):
        raise Missing("ns_coefficients" if ns_coefficients else f"adjust_lr_fn={adjust_lr_fn}")
    return optim.Muon(adjust_lr_fn=adjust_lr_fn, **options)


def missing(**options):
    raise Missing("the optimizer")


RULES = {
    "Adadelta": optim.AdaDelta,
    "Adafactor": adafactor,
    "Adagrad": adagrad,
    "Adam": adam,
    "Adamax": optim.AdaMax,
    "AdamW": adamw,
    "ASGD": missing,
    "LBFGS": missing,  # here it takes the function itself, and is tested with the other solvers
    "Muon": muon,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": rmsprop,
    "Rprop": optim.Rprop,
    "SGD": sgd,
    "SparseAdam": missing,
}


def configurations():
    """Yield each configuration of torch's database by a name."""
    for info in database("common_optimizers", "optim_db"):
        for given in info.optim_inputs_func(device="cpu"):
            yield f"{info.optim_cls.__name__} {given.desc}", info.optim_cls, given.kwargs


def rule_of(cls: Any, options: dict[str, Any]) -> Any:
    options = {name: number(value) for name, value in options.items() if name != "maximize"}
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


def of_luxtorch(rule: Any, ps: Any, all_grads: list[Any], maximize: bool, how: str) -> dict[str, Tensor]:
    kind = lt.ComponentVector if how == "vector" else dict
    tree: Any = kind(ps)
    opt_state = optim.setup(rule, tree)
    step = lt.jit(optim.update, backend="replay") if how == "jit" else optim.update
    for grads in all_grads:
        grads = kind({name: -g if maximize else g for name, g in grads.items()})
        opt_state, tree = step(opt_state, tree, grads)
    return tree.to_dict() if how == "vector" else tree


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
        # Torch computes with a rate that is a tensor in the precision of that.
        tolerance = 1e-6 if isinstance(options.get("lr"), Tensor) else DTYPES[dtype_name]
        maximize = options.get("maximize", False)
        outcomes = outcome(
            lambda rule=rule, ps=ps, grads=all_grads, maximize=maximize: of_luxtorch(rule, ps, grads, maximize, how),
            lambda got, wanted=wanted, near=tolerance: check_same(got, wanted, near, strides=False),
        )
        yield Result(f"torch.optim.{cls.__name__}", *outcomes, place)


EXCEPTIONS = {
    "torch.optim.Rprop": "A gradient that is not finite gives NaN, where torch hides that training has failed."
}


@pytest.mark.parametrize("how", ["eager", "jit", "vector"])
def test_optimizers(how, make_key):
    report(f"optimizers, {how}", list(calls(how, make_key())), EXCEPTIONS)
