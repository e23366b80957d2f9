"""Every rule against torch.optim or its paper, and every rule in every way in which it can be run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.core import InputError
from luxtorch.optim import (
    LAMB,
    LBFGS,
    AdaBelief,
    AdaDelta,
    Adafactor,
    AdaGrad,
    AdaMax,
    AMSGrad,
    Lion,
    Muon,
    NAdam,
    OAdam,
    RAdam,
    RMSProp,
    Rprop,
)

STEPS = 100


class Written:
    """An optimizer whose formula is written out: a function of a parameter, its gradient, a memory and the step."""

    def __init__(self, formula: Callable[..., Tensor], parameters: list[Tensor], **options: Any) -> None:
        self.formula, self.parameters, self.options = formula, parameters, options
        self.memories: list[dict[str, Any]] = [{} for _ in parameters]
        self.t = 0

    def step(self) -> None:
        self.t += 1
        for p, memory in zip(self.parameters, self.memories, strict=True):
            p.data = self.formula(p.data, p.grad, memory, self.t, **self.options)


def adam_moments(g: Tensor, memory: dict[str, Any], t: int, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
    return memory["m"] / (1 - beta1**t), memory["v"] / (1 - beta2**t)


def asgd(p, g, memory, t, lr, lambd, alpha, weight_decay):
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    return p * (1 - lambd * eta) - eta * (g + weight_decay * p)


def oadam(p, g, memory, t, lr, beta1, beta2, eps):
    m, v = adam_moments(g, memory, t, beta1, beta2)
    before, memory["term"] = memory.get("term", 0.0), lr * m / (v.sqrt() + eps)
    return p - 2 * memory["term"] + before


def adabelief(p, g, memory, t, lr, beta1, beta2, eps):
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    memory["s"] = beta2 * memory.get("s", 0.0) + (1 - beta2) * (g - memory["m"]) ** 2 + eps
    m, s = memory["m"] / (1 - beta1**t), memory["s"] / (1 - beta2**t)
    return p - lr * m / (s.sqrt() + eps)


def lion(p, g, memory, t, lr, beta1, beta2, weight_decay):
    m = memory.get("m", torch.zeros_like(p))
    memory["m"] = beta2 * m + (1 - beta2) * g
    return p - lr * ((beta1 * m + (1 - beta1) * g).sign() + weight_decay * p)


def lamb(p, g, memory, t, lr, beta1, beta2, eps, weight_decay):
    m, v = adam_moments(g, memory, t, beta1, beta2)
    r = m / (v.sqrt() + eps) + weight_decay * p
    return p - lr * p.norm() / r.norm() * r


class Case(NamedTuple):
    """A rule, and an optimizer of torch or of this file with the same numbers."""

    rule: optim.LeafwiseRule
    reference: Callable[[list[Tensor]], Any]


torch_optim = torch.optim
CASES = {
    "rmsprop": Case(RMSProp(), lambda ps: torch_optim.RMSprop(ps)),
    "rmsprop-decay": Case(
        RMSProp(0.02, 0.9, 1e-3, 0.1), lambda ps: torch_optim.RMSprop(ps, 0.02, 0.9, 1e-3, weight_decay=0.1)
    ),
    "rmsprop-centered": Case(
        RMSProp(0.02, 0.9, 1e-3, 0.1, centered=True),
        lambda ps: torch_optim.RMSprop(ps, 0.02, 0.9, 1e-3, weight_decay=0.1, centered=True),
    ),
    "rprop": Case(Rprop(), lambda ps: torch_optim.Rprop(ps)),
    "rprop-bounds": Case(
        Rprop(0.1, (0.3, 1.5), (0.02, 0.2)), lambda ps: torch_optim.Rprop(ps, 0.1, (0.3, 1.5), (0.02, 0.2))
    ),
    "amsgrad": Case(AMSGrad(), lambda ps: torch_optim.Adam(ps, amsgrad=True)),
    "amsgrad-decay": Case(
        AMSGrad(0.02, (0.8, 0.9), 1e-3, 0.1),
        lambda ps: torch_optim.Adam(ps, 0.02, (0.8, 0.9), 1e-3, 0.1, amsgrad=True),
    ),
    "adamax": Case(AdaMax(), lambda ps: torch_optim.Adamax(ps)),
    "adamax-decay": Case(
        AdaMax(0.02, (0.8, 0.9), 1e-3, 0.1), lambda ps: torch_optim.Adamax(ps, 0.02, (0.8, 0.9), 1e-3, 0.1)
    ),
    "nadam": Case(NAdam(), lambda ps: torch_optim.NAdam(ps)),
    "nadam-decay": Case(
        NAdam(0.02, (0.8, 0.9), 1e-3, 0.1, 0.03), lambda ps: torch_optim.NAdam(ps, 0.02, (0.8, 0.9), 1e-3, 0.1, 0.03)
    ),
    "nadam-decoupled": Case(
        NAdam(0.02, weight_decay=0.1, decoupled_weight_decay=True),
        lambda ps: torch_optim.NAdam(ps, 0.02, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "radam": Case(RAdam(), lambda ps: torch_optim.RAdam(ps)),
    "radam-decay": Case(
        RAdam(0.02, (0.8, 0.9), 1e-3, 0.1), lambda ps: torch_optim.RAdam(ps, 0.02, (0.8, 0.9), 1e-3, 0.1)
    ),
    "radam-decoupled": Case(
        RAdam(0.02, weight_decay=0.1, decoupled_weight_decay=True),
        lambda ps: torch_optim.RAdam(ps, 0.02, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "radam-never-rectified": Case(RAdam(0.02, (0.9, 0.6)), lambda ps: torch_optim.RAdam(ps, 0.02, (0.9, 0.6))),
    "adagrad": Case(AdaGrad(), lambda ps: torch_optim.Adagrad(ps)),
    "adagrad-decay": Case(AdaGrad(0.1, 0.05, 0.1, 1e-3), lambda ps: torch_optim.Adagrad(ps, 0.1, 0.05, 0.1, eps=1e-3)),
    "adadelta": Case(AdaDelta(), lambda ps: torch_optim.Adadelta(ps)),
    "adadelta-decay": Case(AdaDelta(0.5, 0.8, 1e-3, 0.1), lambda ps: torch_optim.Adadelta(ps, 0.5, 0.8, 1e-3, 0.1)),
    "oadam": Case(OAdam(), lambda ps: Written(oadam, ps, lr=0.001, beta1=0.5, beta2=0.9, eps=1e-8)),
    "adabelief": Case(
        AdaBelief(eps=1e-8), lambda ps: Written(adabelief, ps, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-8)
    ),
    "lion": Case(
        Lion(0.01, weight_decay=0.1), lambda ps: Written(lion, ps, lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1)
    ),
    "lamb": Case(
        LAMB(0.01, weight_decay=0.1),
        lambda ps: Written(lamb, ps, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.1),
    ),
    "adafactor": Case(Adafactor(), lambda ps: torch_optim.Adafactor(ps)),
    "adafactor-decay": Case(
        Adafactor(0.3, 0.6, 1.5, 0.1, 1e-2, 1e-3),
        lambda ps: torch_optim.Adafactor(ps, 0.3, -0.6, (1e-3, 1e-2), 1.5, 0.1),
    ),
    "muon": Case(Muon(), lambda ps: torch_optim.Muon(ps)),
    "sgd": Case(optim.SGD(0.05), lambda ps: torch_optim.SGD(ps, 0.05)),
    "sgd-dampening": Case(
        optim.SGD(0.05, 0.9, 0.3, 0.1), lambda ps: torch_optim.SGD(ps, 0.05, 0.9, 0.3, weight_decay=0.1)
    ),
    "sgd-no-momentum": Case(optim.SGD(0.05, 0.0, 0.3), lambda ps: torch_optim.SGD(ps, 0.05, 0.0, 0.3)),
    "sgd-nesterov": Case(
        optim.SGD(0.05, 0.9, 0.0, 0.1, nesterov=True),
        lambda ps: torch_optim.SGD(ps, 0.05, 0.9, weight_decay=0.1, nesterov=True),
    ),
    "asgd": Case(optim.ASGD(), lambda ps: Written(asgd, ps, lr=0.01, lambd=1e-4, alpha=0.75, weight_decay=0.0)),
    "asgd-decay": Case(
        optim.ASGD(0.05, 0.1, 0.5, 3.0, 0.1),
        lambda ps: Written(asgd, ps, lr=0.05, lambd=0.1, alpha=0.5, weight_decay=0.1),
    ),
    "adagrad-initial": Case(
        AdaGrad(0.1, initial_accumulator_value=0.5),
        lambda ps: torch_optim.Adagrad(ps, 0.1, initial_accumulator_value=0.5),
    ),
    "rmsprop-momentum": Case(
        RMSProp(0.02, 0.9, 1e-3, 0.1, centered=True, momentum=0.8),
        lambda ps: torch_optim.RMSprop(ps, 0.02, 0.9, 1e-3, 0.1, 0.8, centered=True),
    ),
    "adamw-amsgrad": Case(
        optim.AdamW(0.02, (0.8, 0.9), 1e-3, 0.1, amsgrad=True),
        lambda ps: torch_optim.AdamW(ps, 0.02, (0.8, 0.9), 1e-3, 0.1, amsgrad=True),
    ),
    "muon-coefficients": Case(
        Muon(0.02, ns_coefficients=(2.0, -1.5, 0.5)),
        lambda ps: torch_optim.Muon(ps, 0.02, ns_coefficients=(2.0, -1.5, 0.5)),
    ),
    "muon-plain": Case(
        Muon(0.02, 0.3, 0.5, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
        lambda ps: torch_optim.Muon(ps, 0.02, 0.3, 0.5, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ),
}

MAXIMIZED: list[tuple[type[optim.LeafwiseRule], Any, dict[str, Any]]] = [
    (optim.SGD, torch_optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    (optim.Descent, torch_optim.SGD, {}),
    (optim.Momentum, torch_optim.SGD, {"momentum": 0.9}),
    (optim.Adam, torch_optim.Adam, {}),
    (optim.AdamW, torch_optim.AdamW, {"weight_decay": 0.1}),
    (AdaGrad, torch_optim.Adagrad, {"weight_decay": 0.1}),
    (AdaDelta, torch_optim.Adadelta, {"weight_decay": 0.1}),
    (AdaMax, torch_optim.Adamax, {"weight_decay": 0.1}),
    (NAdam, torch_optim.NAdam, {"weight_decay": 0.1}),
    (RAdam, torch_optim.RAdam, {"weight_decay": 0.1}),
    (RMSProp, torch_optim.RMSprop, {"weight_decay": 0.1, "momentum": 0.5}),
    (Rprop, torch_optim.Rprop, {}),
    (Adafactor, torch_optim.Adafactor, {"weight_decay": 0.1}),
]
CASES |= {
    f"{rule.__name__}-maximize": Case(
        rule(lr=0.05, maximize=True, **options),
        lambda ps, reference=reference, options=options: reference(ps, lr=0.05, maximize=True, **options),
    )
    for rule, reference, options in MAXIMIZED
}

# Every rule once, with decay where it has one, and a learning rate that shows.
RULES = {
    type(rule).__name__: rule
    for rule in (
        optim.Descent(0.05),
        optim.Momentum(0.05),
        optim.Nesterov(0.05),
        optim.Adam(0.05),
        optim.AdamW(0.05, weight_decay=0.1),
        RMSProp(0.05, weight_decay=0.1, centered=True),
        Rprop(0.05),
        AMSGrad(0.05, weight_decay=0.1),
        AdaMax(0.05, weight_decay=0.1),
        NAdam(0.05, weight_decay=0.1),
        RAdam(0.05, (0.9, 0.99), weight_decay=0.1),
        OAdam(0.05),
        AdaGrad(0.05, 0.1, 0.1),
        AdaDelta(0.5, weight_decay=0.1),
        AdaBelief(0.05),
        Lion(0.05, weight_decay=0.1),
        LAMB(0.05, weight_decay=0.1),
        Adafactor(0.05, weight_decay=0.1),
        Muon(0.05, ns_dtype=None),
        optim.SGD(0.05, 0.9, 0.1, 0.1),
        optim.ASGD(0.05, t0=2.0, weight_decay=0.1),
        LBFGS(0.05, 3),
    )
}


def gradient(ps: Any, noise: Any) -> Any:
    """Return gradients that depend on the parameters, so that errors show up again, and on chance."""
    return pytree.tree_map(lambda p, n: torch.sin(3 * p) + n, ps, noise)


def step(opt_state: optim.OptState, ps: Any, noise: Any) -> tuple[optim.OptState, Any]:
    return optim.update(opt_state, ps, gradient(ps, noise))


def run(opt_state: optim.OptState, ps: Any, noises: list[Any], step: Callable[..., Any] = step) -> Any:
    for noise in noises:
        opt_state, ps = step(opt_state, ps, noise)
    return ps


def by_formula(rule: optim.LeafwiseRule) -> optim.LeafwiseRule:
    """Return a rule without its kernel."""
    plain = type(type(rule).__name__, (type(rule),), {"kernel": None, "__annotations__": {}})
    return plain(**vars(rule))


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.fixture
def make(draw):
    """Return a function that draws trees for a rule: of matrices alone for Muon."""

    def tree(rule: optim.LeafwiseRule, kind: Any, layers: int = 2, **options: Any) -> Any:
        leaves = dict(list(draw(**options).items())[:layers])
        if isinstance(rule, Muon):
            for layer in leaves.values():
                del layer["bias"]
        return kind.make(leaves)

    return tree


both_kinds = pytest.mark.parametrize("kind", ["dict", "vector"], indirect=True)


@pytest.mark.parametrize("kind, form", [("dict", "kernel"), ("vector", "formula")], indirect=["kind"])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_reference(case, kind, form, make):
    rule, reference = CASES[case]
    rule = by_formula(rule) if form == "formula" else rule
    ps, noises = make(rule, kind), [make(rule, kind) for _ in range(STEPS)]
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in kind.leaves(ps)]
    optimizer = reference(parameters)
    for noise in noises:
        for p, n in zip(parameters, kind.leaves(noise), strict=True):
            p.grad = gradient(p.detach(), n)
        optimizer.step()
    close(kind.leaves(run(optim.setup(rule, ps), ps, noises)), [p.detach() for p in parameters])


def eager(rule, kind, make):
    """The kernel and the formula take the same steps."""
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        ps, *noises = (make(rule, kind, dtype=dtype) for _ in range(11))
        close(run(optim.setup(rule, ps), ps, noises), run(optim.setup(by_formula(rule), ps), ps, noises), rtol)


def compiled_once(rule, kind, make):
    torch._dynamo.reset()
    ps, *noises = (make(rule, kind, layers=1) for _ in range(11))  # few leaves: it is the compiler that takes time
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    opt_state = optim.setup(rule, ps)
    new = run(opt_state, ps, noises, torch.compile(step, backend=counter, fullgraph=True))
    close(new, run(opt_state, ps, noises), 1e-12)
    assert counter.frame_count == 1


def vmap_over_rates(rule, kind, make):
    ps, noises = make(rule, kind), [make(rule, kind) for _ in range(4)]
    lrs = torch.logspace(-3, 0, 8, dtype=torch.float64)

    def trained(lr: Any) -> Any:
        return run(optim.setup(type(rule)(**{**vars(rule), "lr": lr}), ps), ps, noises)

    many = torch.vmap(trained)(lrs)
    for i, lr in enumerate(lrs.tolist()):
        close(pytree.tree_map(lambda leaf, i=i: leaf[i], many), trained(lr), 1e-12)


def meta_gradient(rule, kind, make):
    """The derivative through three steps, by parameters and learning rate, is that by finite differences."""
    ps, direction = make(rule, kind), make(rule, kind)
    noises = [make(rule, kind) for _ in range(3)]
    lr = torch.tensor(0.05, dtype=torch.float64)

    def loss(ps: Any, lr: Any) -> Tensor:
        new = run(optim.setup(type(rule)(**{**vars(rule), "lr": lr}), ps), ps, noises)
        return sum((leaf**2).sum() for leaf in kind.leaves(new))

    by_ps, by_lr = torch.func.grad(loss, argnums=(0, 1))(ps, lr)
    slope = sum((g * d).sum() for g, d in zip(kind.leaves(by_ps), kind.leaves(direction), strict=True)) + by_lr
    _, forward = torch.func.jvp(loss, (ps, lr), (direction, torch.ones_like(lr)))
    shifted = [loss(pytree.tree_map(lambda p, d, h=h: p + h * d, ps, direction), lr + h) for h in (1e-6, -1e-6)]
    assert slope.isfinite()
    torch.testing.assert_close(slope, (shifted[0] - shifted[1]) / 2e-6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(forward, slope, rtol=1e-8, atol=1e-9)


def pure(rule, kind, make):
    """No argument changes, and the same arguments give the same step, bit for bit."""
    ps, noise = make(rule, kind), make(rule, kind)
    opt_state, ps = step(optim.setup(rule, ps), ps, noise)
    arguments = (opt_state, ps, noise)
    before = pytree.tree_map(torch.clone, arguments)
    first, second = optim.update(*arguments), optim.update(*arguments)
    close(pytree.tree_leaves(arguments), pytree.tree_leaves(before), 0.0)
    close(pytree.tree_leaves(first), pytree.tree_leaves(second), 0.0)


WAYS = {
    "eager": eager,
    "compiled once": compiled_once,
    "vmap over rates": vmap_over_rates,
    "meta-gradient": meta_gradient,
    "pure": pure,
}
TABLE: dict[tuple[str, str, str], bool] = {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
@both_kinds
def test_every_rule_every_way(name, way, kind, make, request):
    cell = name, request.node.callspec.params["kind"], way
    TABLE[cell] = False
    WAYS[way](RULES[name], kind, make)
    TABLE[cell] = True


def test_print_the_table(capsys):
    """Show what the test before has found, a rule a row: for a dict, and for a ComponentVector."""
    if not TABLE:
        pytest.skip("shows the results of test_every_rule_every_way")
    marks = {True: "yes", False: "NO", None: "-"}
    rows = [
        [name, *(" / ".join(marks[TABLE.get((name, kind, way))] for kind in ("dict", "vector")) for way in WAYS)]
        for name in RULES
    ]
    with capsys.disabled():
        print()
        for row in [["dict / ComponentVector", *WAYS], *rows]:
            print(" | ".join(f"{cell:<22}" if i == 0 else f"{cell:<15}" for i, cell in enumerate(row)))
    assert all(TABLE.values())


everywhere = pytest.mark.parametrize("name", RULES)


@everywhere
@both_kinds
def test_vmap_over_models(name, kind, make):
    rule = RULES[name]
    models, noises = [[make(rule, kind) for _ in range(3)] for _ in range(2)]
    stack = lambda trees: pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)  # noqa: E731
    ps, noise = stack(models), stack(noises)
    opt_state = torch.vmap(lambda ps: optim.setup(rule, ps))(ps)
    for _ in range(3):
        opt_state, ps = torch.vmap(step)(opt_state, ps, noise)
    for i, (model, n) in enumerate(zip(models, noises, strict=True)):
        one = run(optim.setup(rule, model), model, [n] * 3)
        close(pytree.tree_map(lambda leaf, i=i: leaf[i], ps), one, 1e-12)


@everywhere
def test_hyperparameters_on_the_cpu_meet_parameters_anywhere(name):
    """The meta device stands for a GPU."""
    ps = torch.ones(3, 2, device="meta")
    opt_state = optim.setup(RULES[name], ps)
    assert opt_state.state.hyper.device.type == "cpu"
    new_state, new = optim.update(opt_state, ps, ps)
    assert new.device.type == "meta"
    assert all(value.device.type == "meta" for value in pytree.tree_leaves(new_state.state.leaves))


@everywhere
@both_kinds
def test_dead_units_stay(name, kind, make):
    """Where all gradients are zero nothing moves but by decay, and derivatives through steps stay finite."""
    rule = RULES[name]
    if "weight_decay" in rule.hyperparameters:
        rule = type(rule)(**{**vars(rule), "weight_decay": 0.0})
    if name == "ASGD":
        rule = dataclasses.replace(rule, lambd=0.0)
    ps = make(rule, kind)
    dead = pytree.tree_map(lambda p: (torch.arange(p.numel()) < p.numel() // 2).view(p.shape), ps)
    if name == "Muon":  # it turns the whole matrix: the dead unit is a row
        dead = pytree.tree_map(lambda d: torch.zeros_like(d), dead)

    def trained(ps: Any) -> Any:
        opt_state = optim.setup(rule, ps)
        for _ in range(3):
            grads = pytree.tree_map(lambda p, d: p.masked_fill(d, 0.0), ps, dead)
            opt_state, ps = optim.update(opt_state, ps, grads)
        return ps

    new = trained(ps)
    for p, q, d in zip(*map(kind.leaves, (ps, new, dead)), strict=True):
        close(q[d], p[d], 0.0)
        assert q.isfinite().all()
    grads = torch.func.grad(lambda ps: sum(leaf.sum() for leaf in kind.leaves(trained(ps))))(ps)
    assert all(g.isfinite().all() for g in kind.leaves(grads))


@everywhere
@pytest.mark.parametrize("form", ["kernel", "formula"])
def test_all_gradients_zero(name, form):
    rule = by_formula(RULES[name]) if form == "formula" else RULES[name]
    for p in (torch.ones(3, 2), torch.zeros(3, 2)):
        opt_state, new = optim.update(optim.setup(rule, p), p, torch.zeros(3, 2))
        _, new = optim.update(opt_state, new, torch.zeros(3, 2))
        assert new.isfinite().all()


@everywhere
@pytest.mark.parametrize("form", ["kernel", "formula"])
def test_nan_is_seen(name, form):
    rule = by_formula(RULES[name]) if form == "formula" else RULES[name]
    p, g = torch.ones(3, 2), torch.ones(3, 2)
    g[0, 0] = torch.nan
    _, new = optim.update(optim.setup(rule, p), p, g)
    assert new[0, 0].isnan()
    if not rule_sees_shapes(rule):
        assert new.isnan().sum() == 1


def rule_sees_shapes(rule: optim.LeafwiseRule) -> bool:
    return isinstance(rule, (LAMB, Adafactor, Muon, LBFGS))


@pytest.mark.parametrize("name", [name for name in RULES if name != "Muon"])
@pytest.mark.parametrize("form", ["kernel", "formula"])
def test_numbers_are_parameters(name, form):
    rule = by_formula(RULES[name]) if form == "formula" else RULES[name]
    p, g = torch.tensor(0.5), torch.tensor(-2.0)
    opt_state, new = optim.update(optim.setup(rule, p), p, g)
    _, alike = optim.update(optim.setup(rule, p[None]), p[None], g[None])
    torch.testing.assert_close(new, alike[0])
    assert all(value.dtype == torch.float32 for value in opt_state.state.leaves[""].values())
    many = torch.vmap(lambda p, g: optim.update(optim.setup(rule, p), p, g)[1])(p.expand(2), g.expand(2))
    torch.testing.assert_close(many, new.expand(2))


@everywhere
@pytest.mark.parametrize("kind, form", [("dict", "kernel"), ("vector", "formula")], indirect=["kind"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(name, kind, form, dtype, make):
    rule = RULES[name]
    if "eps" in rule.hyperparameters and dtype == torch.float16:  # it rounds 1e-8 to zero, here as in torch.optim
        rule = type(rule)(**{**vars(rule), "eps": 1e-3})
    rule = by_formula(rule) if form == "formula" else rule
    ps, noises = make(rule, kind, dtype=dtype), [make(rule, kind, dtype=dtype) for _ in range(3)]
    opt_state, new = optim.setup(rule, ps), ps
    for noise in noises:
        opt_state, new = step(opt_state, new, noise)
    slots = [slots for leaf in opt_state.state.leaves.values() for slots in leaf.items()]
    assert {value.dtype for slot, value in slots if slot not in ("step", "mu_product")} <= {dtype}
    single = pytree.tree_map(torch.Tensor.float, (ps, noises))
    exact = run(optim.setup(rule, single[0]), *single)
    for q, e in zip(*map(kind.leaves, (new, exact)), strict=True):
        assert q.dtype == dtype
        torch.testing.assert_close(q.float(), e, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["dict", "vector", "mixed"], indirect=True)
@pytest.mark.parametrize("name", ["LAMB", "Adafactor"])
def test_parts_of_a_vector_are_adjusted_and_frozen(name, kind, draw):
    ps, noise = kind.make(draw()), kind.make(draw())
    opt_state = optim.adjust(
        optim.setup(RULES[name], ps), lr=0.5, path=lambda name: "layer_2" in name or "rest" in name
    )
    opt_state = optim.freeze(opt_state, lambda name: "layer_1.weight" in name)
    _, new = step(opt_state, ps, noise)
    _, slow = step(optim.setup(RULES[name], ps), ps, noise)
    changed = [not p.equal(q) for p, q in zip(kind.leaves(ps), kind.leaves(new), strict=True)]
    agreeing = [p.equal(q) for p, q in zip(kind.leaves(slow), kind.leaves(new), strict=True)]
    assert changed == [False, True, True, True]
    assert agreeing == [False, True, False, False]


@pytest.mark.parametrize("rule", [RULES[name] for name in ("LAMB", "Adafactor", "Muon")], ids=repr)
@pytest.mark.parametrize("kind", ["vector"], indirect=True)
def test_a_vector_steps_as_the_dict_of_its_components(rule, kind, make):
    ps = make(rule, kind)
    _, expected = step(optim.setup(rule, ps.to_dict()), ps.to_dict(), ps.to_dict())
    _, new = step(optim.setup(rule, ps), ps, ps)
    close(new.to_dict(), expected, 0.0)


def test_muon_is_for_matrices():
    with pytest.raises(InputError, match=r"Muon is for matrices\.(?s:.)*shape \(3,\)(?s:.)*AdamW"):
        optim.setup(Muon(), {"bias": torch.zeros(3)})
    with pytest.raises(InputError, match="adjust_lr_fn must be 'original'"):
        Muon(adjust_lr_fn="orignal")


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (3, 3)])
def test_muon_scales_by_shape(shape, rng):
    g = torch.randn(shape, generator=rng, dtype=torch.float64)
    steps = {}
    for scale in ("original", "match_rms_adamw", "spectral_unclamped"):
        rule = Muon(1.0, weight_decay=0.0, adjust_lr_fn=scale, ns_dtype=None)
        steps[scale] = optim.update(optim.setup(rule, g), torch.zeros_like(g), g)[1]
    values = torch.linalg.svdvals(steps["spectral_unclamped"]) / (shape[0] / shape[1]) ** 0.5
    assert ((values > 0.6) & (values < 1.3)).all()
    close(steps["original"], steps["spectral_unclamped"] * max(1.0, shape[1] / shape[0]) ** 0.5)
    close(
        steps["match_rms_adamw"], steps["spectral_unclamped"] * 0.2 * max(shape) ** 0.5 / (shape[0] / shape[1]) ** 0.5
    )


def test_rprop_remembers_its_own_step_sizes():
    p = torch.zeros(2)
    opt_state, p = optim.update(optim.setup(Rprop(0.5), p), p, torch.ones(2))
    _, after = optim.update(optim.adjust(opt_state, lr=100.0), p, torch.ones(2))
    close(after, torch.full((2,), -1.1), 1e-6)


@pytest.mark.parametrize("form", ["kernel", "formula"])
def test_rmsprop_survives_a_constant_gradient(form, rng):
    """Its spread is zero but for rounding, the root of which may not be taken; torch's becomes NaN here."""
    rule = RMSProp(1e-3, alpha=0.5, eps=1.0, centered=True)
    rule = by_formula(rule) if form == "formula" else rule
    p, g = torch.zeros(1000), torch.rand(1000, generator=rng)
    opt_state = optim.setup(rule, p)
    theirs = torch.nn.Parameter(p.clone())
    theirs.grad = g
    optimizer = torch.optim.RMSprop([theirs], 1e-3, 0.5, 1.0, centered=True)
    for _ in range(60):
        opt_state, p = optim.update(opt_state, p, g)
        optimizer.step()
    assert p.isfinite().all()
    known = theirs.detach().isfinite()
    assert known.any() and not known.all()
    close(p[known], theirs.detach()[known], 1e-4)


@pytest.mark.parametrize("name", ["Adafactor", "LAMB", "Muon", "AdaGrad"])
@pytest.mark.parametrize("form", ["kernel", "formula"])
def test_a_state_of_other_shapes_is_an_error(name, form):
    rule = by_formula(RULES[name]) if form == "formula" else RULES[name]
    opt_state, p = optim.setup(rule, {"weight": torch.ones(3, 2)}), {"weight": torch.ones(4, 5)}
    with pytest.raises(InputError, match=r"weight: The optimizer state has '\w+' of another shape than"):
        optim.update(opt_state, p, p)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 3), (4,), ()])
def test_adafactor_factors_the_last_two_dimensions(shape, rng):
    p, g = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    opt_state, theirs = optim.setup(Adafactor(), p), torch.nn.Parameter(p.clone())
    optimizer = torch.optim.Adafactor([theirs])
    for _ in range(5):
        opt_state, p = optim.update(opt_state, p, g)
        theirs.grad = g
        optimizer.step()
    close(p, theirs.detach())


@pytest.mark.parametrize("maximize", [False, True])
def test_asgd_is_that_of_torch(maximize):
    """Which rounds its learning rate to float32."""
    p, g = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.25])
    parameter = torch.nn.Parameter(p.clone())
    options = {"lr": 0.1, "lambd": 0.1, "t0": 2.0, "weight_decay": 0.1, "maximize": maximize}
    optimizer = torch_optim.ASGD([parameter], **options)
    opt_state = optim.setup(optim.ASGD(**options), p)
    for _ in range(8):
        parameter.grad = g
        optimizer.step()
        opt_state, p = optim.update(opt_state, p, g)
        torch.testing.assert_close(p, parameter.detach())
        torch.testing.assert_close(opt_state.state.leaves[""]["ax"], optimizer.state[parameter]["ax"])


def test_momentum_of_rmsprop_begins_with_the_rule():
    ps = {"weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"set up without momentum(.|\n)*optim.transfer"):
        optim.adjust(optim.setup(RMSProp(), ps), momentum=0.9)
    opt_state = optim.adjust(optim.setup(RMSProp(momentum=0.5), ps), momentum=0.9)
    assert opt_state.rule == RMSProp(momentum=0.9)


def test_maximized_steps_in_place():
    model, data = lt.Dense(2, 2), (torch.ones(3, 2), torch.zeros(3, 2))
    for rule in (optim.AdamW(0.1, maximize=True), optim.Descent(0.1, maximize=True), optim.SGD(0.1, 0.9, 0.1)):
        ts = training.TrainState(model, *lt.setup(0, model), rule)
        donated = training.TrainState(model, *lt.setup(0, model), rule)
        for _ in range(3):
            ts = training.single_train_step(lt.MSELoss(), data, ts)[-1]
            donated = training.single_train_step(lt.MSELoss(), data, donated, donate=True)[-1]
        torch.testing.assert_close(ts.parameters, donated.parameters, rtol=0, atol=0)
