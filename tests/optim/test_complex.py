"""Complex parameters: every rule against torch.optim, and against their parts as parameters of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import torchopt
from torch import Tensor

import luxtorch as lt
from luxtorch import ComponentVector, DTypeError, optim

STEPS = 5
SHAPES = {"weight": (3, 4), "bias": (3,), "scalar": (), "none": (0, 3)}
Optimizer = torch.optim.Optimizer


def chain(*rules: Any) -> optim.OptimiserChain:
    return optim.OptimiserChain(*rules)


def l2(rule: Callable[..., Any]) -> Callable[[float], Any]:
    """Return a rule of the strength of a decay that is part of the gradient, and no part of the rule."""
    return lambda decay: chain(optim.WeightDecay(decay), rule(lr=0.05))


OF_TORCH: dict[str, tuple[Callable[[float], Any], Callable[..., Optimizer]]] = {
    "Descent": (l2(optim.Descent), torch.optim.SGD),
    "Momentum": (l2(optim.Momentum), lambda ps, **o: torch.optim.SGD(ps, momentum=0.9, **o)),
    "Nesterov": (l2(optim.Nesterov), lambda ps, **o: torch.optim.SGD(ps, momentum=0.9, nesterov=True, **o)),
    "Adam": (l2(optim.Adam), torch.optim.Adam),
    "AdamW": (lambda decay: optim.AdamW(0.05, weight_decay=decay), torch.optim.AdamW),
    "AMSGrad": (
        lambda decay: optim.AMSGrad(0.05, weight_decay=decay),
        lambda ps, **o: torch.optim.Adam(ps, amsgrad=True, **o),
    ),
    "AdaMax": (lambda decay: optim.AdaMax(0.05, weight_decay=decay), torch.optim.Adamax),
    "NAdam": (lambda decay: optim.NAdam(0.05, weight_decay=decay), torch.optim.NAdam),
    "NAdam decoupled": (
        lambda decay: optim.NAdam(0.05, weight_decay=decay, decoupled_weight_decay=True),
        lambda ps, **o: torch.optim.NAdam(ps, decoupled_weight_decay=True, **o),
    ),
    "RAdam": (lambda decay: optim.RAdam(0.05, weight_decay=decay), torch.optim.RAdam),
    "RAdam decoupled": (
        lambda decay: optim.RAdam(0.05, weight_decay=decay, decoupled_weight_decay=True),
        lambda ps, **o: torch.optim.RAdam(ps, decoupled_weight_decay=True, **o),
    ),
    "RMSProp": (lambda decay: optim.RMSProp(0.05, weight_decay=decay), torch.optim.RMSprop),
    "RMSProp centered": (
        lambda decay: optim.RMSProp(0.05, weight_decay=decay, centered=True),
        lambda ps, **o: torch.optim.RMSprop(ps, centered=True, **o),
    ),
    "AdaGrad": (lambda decay: optim.AdaGrad(0.05, weight_decay=decay), torch.optim.Adagrad),
    "AdaDelta": (lambda decay: optim.AdaDelta(0.05, weight_decay=decay), torch.optim.Adadelta),
    "Rprop": (l2(optim.Rprop), lambda ps, weight_decay, **o: torch.optim.Rprop(ps, **o)),
    "LBFGS": (l2(optim.LBFGS), lambda ps, weight_decay, **o: torch.optim.LBFGS(ps, max_iter=1, **o)),
}
WITHOUT_DECAY = ("Rprop", "LBFGS")

ALONE: dict[str, Any] = {
    "Lion": optim.Lion(0.05, weight_decay=0.1),
    "LAMB": optim.LAMB(0.05),
    "OAdam": optim.OAdam(0.05),
    "AdaBelief": optim.AdaBelief(0.05),
    "SignDecay": chain(optim.SignDecay(0.1), optim.Descent(0.1)),
    "ClipGrad": chain(optim.ClipGrad(0.5), optim.Adam(0.05)),
    "ClipNorm per array": chain(optim.ClipNorm(0.5, per_array=True), optim.Momentum(0.05)),
    "AccumGrad": chain(optim.AccumGrad(2), optim.AdamW(0.05)),
    "schedule": optim.Adam(optim.cosine(0.1, 0.0, 10)),
    "MixedPrecision": optim.MixedPrecision(optim.Adam(0.05), torch.float64),
    "Groups": optim.Groups({"weight": optim.AdaGrad(0.05)}, rest=optim.Momentum(0.05)),
    "torchopt": torchopt.adam(0.05),
    "torchopt chain": torchopt.chain(torchopt.clip_grad_norm(0.5), optim.Adam(0.05)),
    "per member": optim.per_member(optim.AdamW(0.05), 2),
}
KINDS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "dict": dict,
    "vector": ComponentVector,
    "both": lambda ps: {"first": ComponentVector({"weight": ps.pop("weight")}), "rest": (ps,)},
}
HOWS = ("eager", "in turns")


@pytest.fixture
def draw(rng: torch.Generator) -> Callable[..., dict[str, Tensor]]:
    def tree(dtype: torch.dtype = torch.complex128, *batch: int) -> dict[str, Tensor]:
        return {name: torch.randn((*batch, *shape), dtype=dtype, generator=rng) for name, shape in SHAPES.items()}

    return tree


def in_parts(tree: Any) -> Any:
    def parts(x: Tensor) -> Tensor:
        return torch.view_as_real(x.resolve_conj()).clone() if x.is_complex() else x

    return pytree.tree_map(parts, tree)


def update(how: str) -> Callable[..., Any]:
    jitted = lt.jit(optim.update, backend="replay")
    turns = itertools.cycle([optim.update] if how == "eager" else [optim.update, jitted, jitted])
    return lambda *args: next(turns)(*args)


def run(rule: Any, ps: Any, noises: list[Any], step: Any = optim.update, kind: Callable[..., Any] = dict) -> Any:
    """Return the parameters after steps by gradients that depend on them, and on chance."""
    tree = kind({**ps})
    opt_state = optim.setup(rule, tree)
    for noise in noises:
        opt_state, tree = step(opt_state, tree, kind(slope(_components(tree), noise)))
    return _components(tree)


def slope(ps: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
    # A conjugate is one that torch has not computed yet.
    return {name: (p * (1 + 2 * p.real) / (1 + p.abs() ** 3) + noise[name]).conj() for name, p in ps.items()}


def _components(tree: Any) -> dict[str, Tensor]:
    if isinstance(tree, ComponentVector):
        return tree.to_dict()
    if "first" in tree:
        return {**tree["first"].to_dict(), **tree["rest"][0]}
    return tree


def by_torch(optimizer: Callable[..., Optimizer], ps: Any, noises: list[Any], clip: Any = None, **options: Any) -> Any:
    parameters = {name: torch.nn.Parameter(p.clone()) for name, p in ps.items()}
    steps = optimizer(list(parameters.values()), lr=0.05, **options)
    for noise in noises:
        for name, g in slope({name: p.detach() for name, p in parameters.items()}, noise).items():
            parameters[name].grad = g.resolve_conj()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5, norm_type=clip, foreach=False)
        steps.step((lambda: torch.zeros(())) if isinstance(steps, torch.optim.LBFGS) else None)
    return {name: p.detach() for name, p in parameters.items()}


def close(actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("how", "decay"), [("eager", 0.0), ("eager", 0.3), ("in turns", 0.3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_TORCH)
def test_rules_are_those_of_torch(draw, name, decay, kind, how):
    make, optimizer = OF_TORCH[name]
    decay = 0.0 if name in WITHOUT_DECAY else decay
    ps, noises = draw(), [draw() for _ in range(STEPS)]
    expected = by_torch(optimizer, ps, noises, weight_decay=decay)
    new = run(make(decay), ps, noises, update(how), KINDS[kind])
    close({name: new[name] for name in expected}, expected)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1, 2, 3.5, math.inf])
def test_norms_are_those_of_magnitudes(draw, p, kind, how):
    ps, noises = draw(), [draw() for _ in range(STEPS)]
    del ps["none"]  # has no largest element
    expected = by_torch(torch.optim.SGD, ps, noises, clip=p)
    new = run(chain(optim.ClipNorm(0.5, p), optim.Descent(0.05)), ps, noises, update(how), KINDS[kind])
    close({name: new[name] for name in expected}, expected)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [(torch.complex128, "eager"), pytest.param(torch.complex64, "in turns", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", [*OF_TORCH, *ALONE])
def test_rules_step_on_parts(draw, name, mixed, dtype, how):
    """A complex parameter steps as two real ones do, beside real ones too."""
    if name == "torchopt chain" and how != "eager":
        pytest.skip("torchopt reads the norm")
    rule = OF_TORCH[name][0](0.3) if name in OF_TORCH else ALONE[name]
    batch = (2,) if name == "per member" else ()
    trees = [draw(dtype, *batch) for _ in range(STEPS + 1)]
    if mixed:
        trees = [{**tree, "bias": tree["bias"].real.clone(), "scalar": tree["scalar"].imag.clone()} for tree in trees]
    ps, *noises = trees
    expected = run_in_parts(rule, ps, noises)
    close(in_parts(run(rule, ps, noises, update(how))), expected, 1e-12 if dtype == torch.complex128 else 2e-5)


def run_in_parts(rule: Any, ps: Any, noises: list[Any]) -> Any:
    """Return the parts of the parameters, of which the rule is told nothing else."""
    kinds = {name: p.is_complex() for name, p in ps.items()}
    tree = in_parts(ps)
    opt_state = optim.setup(rule, tree)
    for noise in noises:
        whole = {name: torch.view_as_complex(p) if kinds[name] else p for name, p in tree.items()}
        opt_state, tree = optim.update(opt_state, tree, in_parts(slope(whole, noise)))
    return tree


REFUSING: dict[str, Callable[[Any], Any]] = {
    "alone": lambda rule: rule,
    "in a chain": lambda rule: chain(optim.ClipNorm(), rule),
    "in a group": lambda rule: optim.Groups({"weight": rule}, rest=optim.Adam()),
    "with copies": lambda rule: optim.MixedPrecision(chain(rule), torch.float64),
    "per member": lambda rule: optim.per_member(rule, 3),
    "in a chain of torchopt": lambda rule: torchopt.chain(torchopt.clip_grad_norm(1.0), rule),
}


@pytest.mark.parametrize("kind", [dict, ComponentVector])
@pytest.mark.parametrize("way", REFUSING)
@pytest.mark.parametrize("rule", [optim.Muon(), optim.Adafactor(), optim.SOAP()], ids=["Muon", "Adafactor", "SOAP"])
def test_rules_for_matrices_refuse(draw, rule, way, kind):
    ps = kind({"weight": draw()["weight"]})
    with pytest.raises(DTypeError, match=rf"weight: {type(rule).__name__} does not take complex(.|\n)*view_as_real"):
        optim.setup(REFUSING[way](rule), ps)


def test_a_rule_for_matrices_takes_the_real_ones(draw):
    ps = draw()
    ps["weight"] = ps["weight"].real.clone()
    rule = optim.Groups({"weight": optim.Muon(0.1)}, rest=optim.Adam(0.1))
    _, new = optim.update(optim.setup(rule, ps), ps, ps)
    assert not any(torch.equal(new[name], p) for name, p in ps.items() if p.numel())


@pytest.mark.parametrize("name", ["Adam", "AMSGrad", "RMSProp centered", "LBFGS", "Rprop"])
def test_states_are_real(draw, name):
    opt_state = optim.setup(OF_TORCH[name][0](0.1), draw())
    assert not any(leaf.is_complex() for leaf in pytree.tree_leaves(opt_state))


@pytest.mark.parametrize("kind", ["dict", "vector"])
@pytest.mark.parametrize("name", ["Descent", "AdamW", "AMSGrad", "RAdam", "AdaGrad"])
def test_vmap_over_models(draw, name, kind):
    models, noises = [draw() for _ in range(3)], [[draw() for _ in range(3)] for _ in range(STEPS)]
    stacked = lambda trees: pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)  # noqa: E731
    rule, make = OF_TORCH[name][0](0.1), KINDS[kind]
    ps = stacked([make({**model}) for model in models])
    opt_state = torch.vmap(lambda ps: optim.setup(rule, ps))(ps)

    def step(opt_state, ps, noise):
        return optim.update(opt_state, ps, make(slope(_components(ps), noise)))

    for noise in noises:
        opt_state, ps = torch.vmap(step)(opt_state, ps, stacked(noise))
    for i, model in enumerate(models):
        expected = run(rule, model, [noise[i] for noise in noises])
        close(_components(pytree.tree_map(lambda leaf, i=i: leaf[i], ps)), expected)


@pytest.mark.parametrize("name", ["Descent", "AdamW", "RMSProp", "AdaMax"])
def test_derivatives_through_steps(draw, name):
    ps, noises, direction = draw(), [draw() for _ in range(3)], draw()

    def loss(ps):
        return sum((p.real**2 + 3 * p.imag).sum() for p in run(OF_TORCH[name][0](0.1), ps, noises).values())

    moved = lambda h: {name: p + h * direction[name] for name, p in ps.items()}  # noqa: E731
    differences = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
    slopes = torch.func.grad(loss)(ps)
    reverse = sum((g.conj() * direction[name]).real.sum() for name, g in slopes.items())
    _, forward = torch.func.jvp(loss, (ps,), (direction,))
    torch.testing.assert_close(reverse, differences, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["Momentum", "AdamW", "RMSProp", "LBFGS"])
@pytest.mark.parametrize("steps", [0, 2])
def test_components_are_told_apart(draw, name, steps):
    """A state of a vector is taken apart when a component is frozen, and goes on as that of a dict."""
    ps, noises = draw(), [draw() for _ in range(STEPS)]
    results = []
    for kind in (dict, ComponentVector):
        opt_state, tree = optim.setup(OF_TORCH[name][0](0.1), kind({**ps})), kind({**ps})
        for i, noise in enumerate(noises):
            if i == steps:
                opt_state = optim.freeze(opt_state, "bias")
            opt_state, tree = optim.update(opt_state, tree, kind(slope(_components(tree), noise)))
        results.append(_components(tree))
    close(results[1], {name: results[0][name] for name in results[1]})
    if steps == 0:
        assert torch.equal(results[1]["bias"], ps["bias"])


def test_hyperparameters_by_path(draw):
    ps, noise = draw(), draw()
    opt_state = optim.adjust(optim.setup(optim.Descent(1.0), ComponentVector(ps)), path="weight", lr=0.0)
    _, new = optim.update(opt_state, ComponentVector(ps), ComponentVector(noise))
    close(new.to_dict(), {name: p if name == "weight" else p - noise[name] for name, p in ps.items()})


def test_moments_are_transferred(draw):
    ps, noises = draw(), [draw() for _ in range(STEPS)]
    opt_state, new = optim.update(optim.setup(optim.Adam(0.1), ps), ps, noises[0])
    moved = optim.transfer(opt_state, chain(optim.ClipNorm(1e9), optim.Adam(0.1)), new)
    close(optim.update(moved, new, noises[1])[1], optim.update(opt_state, new, noises[1])[1])


@pytest.mark.parametrize("rule", [optim.Adam(), optim.Momentum(), chain(optim.ClipNorm(0.1), optim.LBFGS())])
def test_what_has_no_gradient_is_shared(draw, rule):
    ps = draw()
    _, new = optim.update(optim.setup(rule, ps), ps, {"weight": ps["weight"]})
    assert new["bias"].data_ptr() == ps["bias"].data_ptr() and torch.equal(new["bias"], ps["bias"])


@pytest.mark.parametrize("rule", [optim.Adam(0.1), optim.LBFGS(), chain(optim.ClipGrad(), optim.NAdam())])
def test_updates_by_the_protocol_of_torchopt(draw, rule):
    ps, grads = draw(), draw()
    ps["bias"], grads["bias"] = ps["bias"].real.clone(), grads["bias"].real.clone()  # an odd number of real ones
    updates, _ = rule.update(grads, rule.init(ps), params=ps)
    close(torchopt.apply_updates(ps, updates, inplace=False), optim.update(optim.setup(rule, ps), ps, grads)[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("solver", ["minimize", "scipy", "newton", "least squares"])
def test_solvers(draw, solver, mixed, kind):
    target = draw()
    if mixed and kind == "vector":
        pytest.skip("a vector has one dtype")
    if mixed:
        target = {**target, "bias": target["bias"].real.clone()}
    start = KINDS[kind]({name: torch.zeros_like(p) for name, p in target.items()})

    def residuals(ps):
        found = _components(ps)
        errors = [found[name] * (2 + found[name] * found[name].conj()) - p for name, p in target.items()]
        return torch.cat([part.reshape(-1) for e in errors for part in (e.real, (e + 0j).imag)])

    f = lambda ps: residuals(ps).square().sum()  # noqa: E731
    if solver == "minimize":
        _, ps, _ = optim.minimize(f, optim.setup(optim.LBFGS(), start), start)
    elif solver == "least squares":
        ps, _ = optim.scipy_least_squares(residuals, start)
    else:
        ps, _ = optim.scipy_minimize(f, start, method="trust-exact" if solver == "newton" else "L-BFGS-B")
    assert f(ps) < 1e-8
    assert {name: p.dtype for name, p in _components(ps).items()} == {name: p.dtype for name, p in target.items()}


def test_sparse_gradients_are_steps_of_dense_ones(draw):
    g = draw()["weight"]
    ps = {"weight": torch.ones_like(g)}
    for name in OF_TORCH:
        opt_state = optim.setup(OF_TORCH[name][0](0.1), ps)
        got, expected = (optim.update(opt_state, ps, {"weight": x})[1] for x in (g.to_sparse(), g))
        close(got, expected)
