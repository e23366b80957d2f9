"""Optimizers of many models at once: each member steps as it does alone, whatever its rule looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.optim import ClipGrad, ClipNorm, Descent, Groups, MixedPrecision, OptimiserChain

N = 3
SKIPPED = {"LeafwiseRule", "SignDecay", "WeightDecay", "Muon"}
RULES: dict[str, Any] = {
    **{
        name: rule()
        for name, rule in vars(optim).items()
        if isinstance(rule, type) and issubclass(rule, optim.LeafwiseRule) and name not in SKIPPED
    },
    "Muon": Groups({"layer_2.weight": optim.Muon(0.1)}, rest=optim.AdamW()),
    "Muon, float32": Groups({"layer_2.weight": optim.Muon(0.1, ns_dtype=None)}, rest=optim.AdamW()),
    "LBFGS": optim.LBFGS(0.1),
    "ClipNorm": ClipNorm(0.5),
    "ClipNorm, Descent": OptimiserChain(ClipNorm(0.5), Descent(0.1)),
    "ClipNorm of each": OptimiserChain(ClipNorm(0.5, per_array=True), optim.Adam(0.1)),
    "ClipNorm of order 3": OptimiserChain(ClipNorm(0.5, 3), optim.Adam(0.1)),
    "ClipGrad": OptimiserChain(ClipGrad(0.1), Descent(0.1)),
    "decays": OptimiserChain(optim.WeightDecay(), optim.SignDecay(), optim.Adam()),
    "AccumGrad": OptimiserChain(optim.AccumGrad(2), ClipNorm(0.5), optim.Adam()),
    "MixedPrecision": MixedPrecision(OptimiserChain(ClipNorm(0.5), optim.Adam()), torch.float64),
    "schedule": OptimiserChain(ClipNorm(optim.linear(0.5, 0.1, 4)), optim.Adam(0.1 * optim.cosine(1.0, 0.0, 9))),
    "torchopt chain": torchopt.chain(ClipNorm(0.5), optim.Adam(0.1)),
}


@pytest.fixture
def models(draw: Callable[..., Any]) -> tuple[list[Any], list[list[Any]]]:
    """Parameters of some members, and gradients for some steps of each, of different size."""
    ps = [draw(dtype=torch.float32) for _ in range(N)]
    grads = [[_times(draw(dtype=torch.float32), 10.0**i) for i in range(N)] for _ in range(4)]
    return ps, grads


def _times(tree: Any, factor: float) -> Any:
    return pytree.tree_map(lambda leaf: factor * leaf, tree)


def run(rule: Any, ps: Any, grads: list[Any], update: Any = optim.update, missing: str = "") -> Any:
    opt_state = optim.setup(rule, ps)
    for g in grads:
        if missing:
            g = {**g, missing: None}
        opt_state, ps = update(opt_state, ps, g)
    return ps, opt_state


def alike(one: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    leaves = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    for a, b in leaves:
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def room(name: str) -> dict[str, float]:
    # Of bfloat16 a last digit may be rounded the other way.
    return {"rtol": 1e-2, "atol": 2e-3} if name == "Muon" else {"rtol": 1e-4, "atol": 1e-5} if name == "LBFGS" else {}


FORMS = ("dict", "stacked vector", "batch of vectors", "vmap", "missing")
COMPILED = ("ClipNorm, Descent", "Muon")


def compiled(name: str) -> Any:
    return pytest.param(name, "jit", marks=[] if name in COMPILED else pytest.mark.slow)


@pytest.mark.parametrize("name, form", [*((n, f) for n in RULES for f in FORMS), *map(compiled, RULES)])
def test_members_step_as_they_do_alone(models: Any, name: str, form: str) -> None:
    rule, (ps, grads) = RULES[name], models
    missing = "layer_1" if form == "missing" else ""
    alone = lt.stack([run(rule, ps[i], [g[i] for g in grads], missing=missing)[0] for i in range(N)])
    together, all_grads = lt.stack(ps), [lt.stack(g) for g in grads]
    update: Any = optim.update
    if form == "vmap":

        def all_steps(ps: Any, grads: Any) -> Any:
            return run(rule, ps, grads)[0]

        alike(torch.vmap(all_steps)(together, all_grads), alone, **room(name))
        return
    if form == "stacked vector":
        together, *all_grads = map(lt.ComponentVector, (together, *all_grads))
    elif form == "batch of vectors":
        together, *all_grads = (lt.ComponentVector(tree, batch_dims=1) for tree in (together, *all_grads))
    elif form == "jit":
        update = lt.jit(optim.update, backend="replay")
    new, opt_state = run(optim.per_member(rule, N), together, all_grads, update, missing)
    assert type(new) is type(together)
    alike(new.to_dict() if isinstance(new, lt.ComponentVector) else new, alone, **room(name))
    assert repr(opt_state).startswith("OptState(per_member(")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Muon", "LAMB", "AccumGrad", "Adafactor"])
def test_members_step_by_inductor(models: Any, name: str) -> None:
    rule, (ps, grads) = RULES[name], models
    together, all_grads = lt.stack(ps), [lt.stack(g) for g in grads]
    rule = optim.per_member(rule, N)
    alike(run(rule, together, all_grads, lt.jit(optim.update))[0], run(rule, together, all_grads)[0], **room(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (32, 64)])
def test_muon_under_vmap_is_that_of_one_matrix(rng: torch.Generator, shape: tuple[int, int], dtype: Any) -> None:
    rule = optim.Muon(0.1, ns_dtype=dtype)
    ps, grads = (torch.randn(5, *shape, generator=rng) for _ in range(2))

    def stepped(p: Tensor, g: Tensor) -> Tensor:
        return run(rule, p, [g, g.sin(), g.cos()])[0]

    one = torch.stack([stepped(p, g) for p, g in zip(ps, grads, strict=True)])
    torch.testing.assert_close(torch.vmap(stepped)(ps, grads), one, rtol=1e-3, atol=1e-3 if dtype else 1e-5)


@pytest.mark.parametrize("jitted", [False, True])
def test_an_ensemble_trains_as_its_members(make_key: Callable[[], Tensor], jitted: bool) -> None:
    model, key = lt.Chain(lt.Dense(2, 4, torch.tanh), lt.Dense(4, 1)), make_key()
    rule = OptimiserChain(ClipNorm(0.01), optim.AdamW(0.05))
    ensemble = lt.Ensemble(model, N)
    x = lt.random.normal(make_key(), (8, 2))

    def objective(model: Any, ps: Any, st: Any, x: Tensor) -> Any:
        y, st = model(x, ps, st)
        return (y - x[:, :1]).square().mean((-2, -1)).sum(), st, {}  # a sum over the members, if there are many

    def step(ts: training.TrainState) -> training.TrainState:
        return training.single_train_step(objective, x, ts)[3]

    ps, st = lt.setup(key, ensemble)
    ps = {**ps, "layer_2": _times(ps["layer_2"], 3.0)}
    ts = training.TrainState(ensemble, ps, st, optim.per_member(rule, N))
    members = [
        training.TrainState(model, p, s, rule) for p, s in zip(lt.unstack(ps), [model_st(model)] * N, strict=True)
    ]
    take = lt.jit(step, backend="replay") if jitted else step
    for _ in range(5):
        ts, members = take(ts), [step(member) for member in members]
    for p, member in zip(lt.unstack(ts.parameters), members, strict=True):
        alike(p, member.parameters)


def model_st(model: Any) -> Any:
    return lt.setup(0, model)[1]


def test_members_may_have_rates_of_their_own(models: Any) -> None:
    ps, grads = models
    rates = torch.tensor([0.1, 0.2, 0.3])
    together = lt.stack(ps)
    opt_state = optim.adjust(optim.setup(optim.per_member(optim.LAMB(), N), together), lr=rates)
    _, new = optim.update(opt_state, together, lt.stack(grads[0]))
    for i, p in enumerate(lt.unstack(new)):
        alike(p, run(optim.LAMB(rates[i].item()), ps[i], [grads[0][i]])[0])
    assert torch.equal(opt_state.rule.rule.lr, rates.double())
    one = optim.adjust(opt_state, lr=0.5, path="layer_1")
    assert repr(one).startswith("OptState(per_member(LAMB(by path")
    assert optim.freeze(one, "layer_1").layout.frozen


def test_a_rule_per_member_is_cast_and_transferred(models: Any) -> None:
    ps, grads = models
    together, g = lt.stack(ps), lt.stack(grads[0])
    rule = optim.per_member(OptimiserChain(ClipNorm(1.0), optim.Adam()), N)
    opt_state, together = optim.update(optim.setup(rule, together), together, g)
    low = lt.bf16(opt_state)
    assert repr(low) == repr(opt_state)
    other = optim.transfer(opt_state, optim.per_member(optim.AdamW(optim.cosine(0.1, 0.0, 9)), N), together)
    alike(other.state.leaves, opt_state.state[1].leaves)


@pytest.mark.parametrize("n", [0, -1, 1.0, True, "3"])
def test_the_number_of_members(n: Any) -> None:
    with pytest.raises(lt.InputError, match="n must be a positive integer"):
        optim.per_member(optim.Adam(), n)


def test_parameters_of_another_number(models: Any) -> None:
    with pytest.raises(lt.InputError, match="not that of 4 members") as error:
        optim.setup(optim.per_member(optim.Adam(), 4), lt.stack(models[0]))
    assert "layer_1.weight" in str(error.value)
    with pytest.raises(lt.DTypeError, match="not a gradient transformation"):
        optim.per_member(torch.optim.Adam, 2)
