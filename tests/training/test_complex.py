"""Training of layers with complex parameters, against the tape and the optimizers of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch import ComponentVector, optim, training

STEPS = 4


class Spectral(lt.Layer):
    """Multiply the modes of the input by complex weights, as a Fourier neural operator does."""

    size: int
    biased: bool = True

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        modes = self.size // 2 + 1
        weight = lt.init.glorot_uniform(key, (modes, modes), dtype=torch.complex64)
        return {"weight": weight, **({"bias": torch.zeros(self.size)} if self.biased else {})}

    def __call__(self, x: Tensor, ps: Any, st: Any) -> tuple[Tensor, Any]:
        modes = torch.fft.rfft(x) @ ps["weight"]
        y = torch.fft.irfft(modes, n=self.size)
        return (y + ps["bias"] if self.biased else y).tanh(), st


class Rotated(lt.Layer):
    """Multiply complex inputs by complex weights."""

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        return {"weight": lt.init.normal(key, (3, 2), dtype=torch.complex64)}

    def __call__(self, x: Tensor, ps: Any, st: Any) -> tuple[Tensor, Any]:
        return (x @ ps["weight"]).conj() * 2, st


RULES = {
    "adamw": optim.AdamW(0.05, weight_decay=0.2),
    "momentum": optim.Momentum(0.05),
    "clipped": optim.OptimiserChain(optim.ClipNorm(0.1), optim.RMSProp(0.05)),
    "copies": optim.MixedPrecision(optim.Adam(0.05), torch.float64),
}
KINDS = {"dict": dict, "vector": ComponentVector}


def data(rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 8, generator=rng), torch.randn(4, 8, generator=rng)) for _ in range(STEPS)]


def state(make_key: Any, rule: str, kind: str) -> training.TrainState:
    layer = Spectral(8, biased=kind == "dict")
    ps, st = lt.setup(make_key(), layer)
    return training.TrainState(layer, KINDS[kind](lt.f64(ps)), st, RULES[rule])


def doubled(batches: list[Any]) -> list[Any]:
    return [(x.double(), y.double()) for x, y in batches]


def trained(ts: training.TrainState, batches: list[Any], step: Any = training.single_train_step, **options: Any) -> Any:
    for batch in batches:
        *_, ts = step(lt.MSELoss(), batch, ts, **options)
    return ts


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def by_torch(ts: training.TrainState, batches: list[Any]) -> dict[str, Tensor]:
    ps = ts.parameters.to_dict() if isinstance(ts.parameters, ComponentVector) else ts.parameters
    parts = {name: torch.view_as_real(p).clone() if p.is_complex() else p.clone() for name, p in ps.items()}
    parts = {name: p.requires_grad_() for name, p in parts.items()}
    optimizer = torch.optim.AdamW(parts.values(), lr=0.05, weight_decay=0.2)
    for x, y in batches:
        optimizer.zero_grad()
        whole = {name: torch.view_as_complex(p) if ps[name].is_complex() else p for name, p in parts.items()}
        (ts.model(x, whole, {})[0] - y).square().mean().backward()
        optimizer.step()
    return {name: torch.view_as_complex(p) if ps[name].is_complex() else p for name, p in parts.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_torch(make_key, rng, kind):
    ts, batches = state(make_key, "adamw", kind), doubled(data(rng))
    new = trained(ts, batches).parameters
    close(dict(new.items()), {name: p.detach() for name, p in by_torch(ts, batches).items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"donate": True},
        {"skip_nonfinite": True},
        {"loss_scale": 8.0},
        {"dtype": torch.float64},
        {"differentiable": True},
        {"jit": "replay"},
        {"jit": "replay", "donate": True},
    ],
    ids=str,
)
def test_steps_of_all_kinds(make_key, rng, rule, kind, options):
    ts, batches = state(make_key, rule, kind), doubled(data(rng))
    expected = trained(ts, batches)
    step = training.single_train_step
    options = {**options}
    if backend := options.pop("jit", None):
        donated = {"donate": ("ts",)} if options.pop("donate", False) else {}

        def step(objective, batch, ts, **options):
            return jitted(batch, ts)

        jitted = lt.jit(
            lambda batch, ts: training.single_train_step(lt.MSELoss(), batch, ts), backend=backend, **donated
        )
    start = pytree.tree_map(lambda leaf: leaf.clone(), ts.parameters)
    new = trained(pytree.tree_map(torch.clone, ts), batches, step, **options)
    close(new.parameters, expected.parameters)
    close(ts.parameters, start)


@pytest.mark.parametrize("kind", KINDS)
def test_donated_steps_reuse_memory(make_key, rng, kind):
    ts, batches = state(make_key, "adamw", kind), doubled(data(rng))
    ts = trained(ts, batches[:1], donate=True)
    places = [leaf.data_ptr() for leaf in pytree.tree_leaves(ts._trees.parameters)]
    ts = trained(ts, batches[1:], donate=True)
    assert places == [leaf.data_ptr() for leaf in pytree.tree_leaves(ts._trees.parameters)]
    kept = ts.parameters
    before = pytree.tree_map(torch.clone, kept)
    trained(ts, batches, donate=True)
    close(kept, before, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_checkpoints(make_key, rng, tmp_path, rule, kind):
    ts, batches = trained(state(make_key, rule, kind), doubled(data(rng))), doubled(data(rng))
    training.save_checkpoint(tmp_path / "ts", ts)
    loaded = training.load_checkpoint(tmp_path / "ts", ts)
    close(trained(loaded, batches).parameters, trained(ts, batches).parameters, 0.0)


def test_a_step_that_is_not_finite_is_left_out(make_key, rng):
    ts, ((x, y), *_) = state(make_key, "adamw", "dict"), doubled(data(rng))
    new = trained(ts, [(x * torch.inf, y)], skip_nonfinite=True)
    close(new.parameters, ts.parameters, 0.0)
    assert new.skipped == 1


@pytest.mark.parametrize("kind", KINDS)
def test_averages(make_key, rng, kind):
    ts, batches = state(make_key, "momentum", kind), doubled(data(rng))
    average = lt.EMA(0.5)
    seen, st = [ts.parameters], average.init(ts.parameters)
    for batch in batches:
        ts = trained(ts, [batch])
        seen.append(ts.parameters)
        st = average.update(st, ts.parameters)
    sizes = [0.5 ** (STEPS - i) for i in range(STEPS + 1)]
    weights = [size / sum(sizes) for size in sizes]
    expected = pytree.tree_map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *seen)
    close(average.parameters(st), expected)


@pytest.mark.parametrize("layer", [Spectral(8), Spectral(7, biased=False)])
def test_laws(layer, rng):
    lt.testing.check_layer(layer, torch.randn(2, layer.size, generator=rng), skip=["compile"])


def test_laws_of_complex_inputs(rng):
    lt.testing.check_layer(Rotated(), torch.randn(4, 3, dtype=torch.complex64, generator=rng), skip=["compile"])


class Detached(Rotated):
    """Have a derivative that is wrong."""

    def __call__(self, x: Tensor, ps: Any, st: Any) -> tuple[Tensor, Any]:
        return x @ torch.complex(ps["weight"].real, ps["weight"].imag.detach()), st


@pytest.mark.parametrize("law", ["gradient", "orders"])
def test_laws_see_wrong_derivatives_of_complex_parameters(law, rng):
    with pytest.raises(lt.testing.LawError, match=f"{law}"):
        lt.testing.check_layer(Detached(), torch.randn(4, 3, dtype=torch.complex64, generator=rng), laws=[law])


class Cut(Rotated):
    """Have no derivative by the input."""

    def __call__(self, x: Tensor, ps: Any, st: Any) -> tuple[Tensor, Any]:
        return x.detach() @ ps["weight"], st


def test_laws_differentiate_by_complex_inputs(rng):
    with pytest.raises(lt.testing.LawError, match="gradient"):
        lt.testing.check_layer(Cut(), torch.randn(4, 3, dtype=torch.complex64, generator=rng), laws=["gradient"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_falls_back(make_key, rng, kind):
    ts, batches = state(make_key, "adamw", kind), doubled(data(rng))
    jitted = lt.jit(lambda batch, ts: training.single_train_step(lt.MSELoss(), batch, ts))
    new = trained(ts, batches, lambda objective, batch, ts: jitted(batch, ts))
    close(new.parameters, trained(ts, batches).parameters, 1e-6)  # bias corrections are computed in float32
