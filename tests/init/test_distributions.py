"""The distributions of the initializers, against torch.nn.init and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

import luxtorch.init as init
from luxtorch.core import InputError

Keys = Callable[[], Tensor]

SHAPES = [(40, 60), (90, 20), (16, 8, 5), (16, 8, 3, 3)]
# A false alarm once in ten thousand draws; the draws are seeded by the tests' names, so it does not come and go.
RARE = 1e-4

VARIANCE: dict[str, tuple[init.BindableInitializer, Callable[..., Tensor]]] = {
    "glorot_uniform": (init.glorot_uniform, torch.nn.init.xavier_uniform_),
    "glorot_normal": (init.glorot_normal, torch.nn.init.xavier_normal_),
    "glorot_uniform, gain 2": (
        init.glorot_uniform(gain=2.0),
        lambda w, generator: torch.nn.init.xavier_uniform_(w, gain=2.0, generator=generator),
    ),
    "glorot_normal, gain 2": (
        init.glorot_normal(gain=2.0),
        lambda w, generator: torch.nn.init.xavier_normal_(w, gain=2.0, generator=generator),
    ),
    **{
        f"kaiming_{kind}, {mode}": (
            getattr(init, f"kaiming_{kind}")(mode=mode),
            lambda w, generator, kind=kind, mode=mode: getattr(torch.nn.init, f"kaiming_{kind}_")(
                w, mode=mode, nonlinearity="relu", generator=generator
            ),
        )
        for kind in ("uniform", "normal")
        for mode in ("fan_in", "fan_out")
    },
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANCE)
def test_same_distribution_as_torch(name: str, shape: tuple[int, ...], make_key: Keys, rng: torch.Generator) -> None:
    ours, theirs = VARIANCE[name]
    reference = theirs(torch.empty(shape), generator=rng)
    draw = ours(make_key(), shape)
    assert stats.ks_2samp(draw.flatten().numpy(), reference.flatten().numpy()).pvalue > RARE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("function", "fan"),
    [
        (init.glorot_uniform, lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out))),
        (init.glorot_uniform(gain=0.5), lambda fan_in, fan_out: 0.5 * math.sqrt(6 / (fan_in + fan_out))),
        (init.kaiming_uniform, lambda fan_in, fan_out: math.sqrt(6 / fan_in)),
        (init.kaiming_uniform(gain=1.0, mode="fan_out"), lambda fan_in, fan_out: math.sqrt(3 / fan_out)),
    ],
    ids=["glorot", "glorot, gain", "kaiming", "kaiming, fan_out"],
)
def test_uniform_support_is_exact(
    function: init.BindableInitializer, fan: Callable[[int, int], float], shape: tuple[int, ...], make_key: Keys
) -> None:
    bound = fan(*torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape)))
    draw = function(make_key(), shape, dtype=torch.float64)
    assert draw.abs().max() <= bound * (1 + 1e-12)
    assert stats.kstest(draw.flatten().numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > RARE
    assert draw.max() > 0.95 * bound
    assert draw.min() < -0.95 * bound


@pytest.mark.parametrize(
    ("shape", "bound"), [((), math.sqrt(3)), ((5,), 1.0), ((2, 4), 1.0), ((2, 4, 0), math.sqrt(3))], ids=str
)
def test_fans_of_small_and_empty_shapes(shape: tuple[int, ...], bound: float, make_key: Keys) -> None:
    draws = torch.stack([init.glorot_uniform(make_key(), shape) for _ in range(500)])
    assert draws.numel() == 0 or 0.98 * bound < draws.abs().max() <= bound


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, -1.0)])
def test_uniform(low: float, high: float, make_key: Keys) -> None:
    draw = init.uniform(make_key(), (2000,), low=low, high=high, dtype=torch.float64)
    assert draw.min() >= low
    assert draw.max() < high
    assert stats.kstest(draw.numpy(), stats.uniform(low, high - low).cdf).pvalue > RARE


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.1), (-1.0, 3.0)])
def test_normal(mean: float, std: float, make_key: Keys) -> None:
    draw = init.normal(make_key(), (2000,), mean=mean, std=std, dtype=torch.float64)
    assert stats.kstest(draw.numpy(), stats.norm(mean, std).cdf).pvalue > RARE


@pytest.mark.parametrize(("mean", "std", "low", "high"), [(0, 1, -2, 2), (0.5, 2, -1, 0.2), (1.0, 0.5, 1.2, 5)])
def test_truncated_normal(mean: float, std: float, low: float, high: float, make_key: Keys) -> None:
    draw = init.truncated_normal(make_key(), (2000,), mean=mean, std=std, low=low, high=high, dtype=torch.float64)
    assert draw.min() >= low
    assert draw.max() <= high
    reference = stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    assert stats.kstest(draw.numpy(), reference.cdf).pvalue > RARE


@pytest.mark.parametrize(("mean", "fits"), [(4.0, True), (-4.0, True), (4.5, False), (-4.5, False)])
def test_truncated_normal_far_from_the_mean(mean: float, fits: bool, make_key: Keys) -> None:
    if fits:
        assert init.truncated_normal(make_key(), (50,), mean=mean).abs().max() <= 2.0
    else:
        with pytest.raises(InputError, match="two std outside the cuts"):
            init.truncated_normal(make_key(), (50,), mean=mean)


def test_truncated_normal_cuts_in_order(make_key: Keys) -> None:
    with pytest.raises(InputError, match="low must be below high"):
        init.truncated_normal(make_key(), (3,), low=1.0, high=-1.0)


@pytest.mark.parametrize(
    ("function", "variance"),
    [
        (init.glorot_uniform, 2 / 100),
        (init.glorot_normal, 2 / 100),
        (init.kaiming_uniform, 2 / 60),
        (init.kaiming_normal, 2 / 60),
        (init.normal, 1.0),
    ],
)
def test_complex_variance_is_the_real_one(function: init.BindableInitializer, variance: float, make_key: Keys) -> None:
    draw = function(make_key(), (40, 60), dtype=torch.complex128)
    for part in (draw.real, draw.imag):
        assert part.square().mean().item() == pytest.approx(variance / 2, rel=0.15)
    correlation = stats.pearsonr(draw.real.flatten().numpy(), draw.imag.flatten().numpy())
    assert correlation.pvalue > RARE


def test_complex_uniform_is_that_of_torch_rand(make_key: Keys) -> None:
    draw = init.uniform(make_key(), (2000,), dtype=torch.complex128)
    for part in (draw.real, draw.imag):
        assert stats.kstest(part.numpy(), stats.uniform(0, 1).cdf).pvalue > RARE


@pytest.mark.parametrize("name", ["linear", "sigmoid", "tanh", "relu", "selu", "leaky_relu"])
def test_gain_is_torchs(name: Any) -> None:
    assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)


@pytest.mark.parametrize(
    ("function", "name"),
    [(torch.tanh, "tanh"), (F.relu, "relu"), (torch.relu, "relu"), (torch.selu, "selu"), (F.leaky_relu, "leaky_relu")],
)
def test_gain_of_a_function_is_that_of_its_name(function: Callable[[Tensor], Tensor], name: Any) -> None:
    assert init.calculate_gain(function) == torch.nn.init.calculate_gain(name)


def test_gain_of_leaky_relu_depends_on_the_slope() -> None:
    assert init.calculate_gain("leaky_relu", 0.3) == torch.nn.init.calculate_gain("leaky_relu", 0.3)


def test_gain_of_unknown_activations() -> None:
    assert init.calculate_gain(F.gelu) == 1.0
    with pytest.raises(InputError, match="Did you mean 'relu'"):
        init.calculate_gain("rleu")


def test_unknown_mode(make_key: Keys) -> None:
    with pytest.raises(InputError, match="Did you mean 'fan_in'"):
        init.kaiming_normal(make_key(), (3, 4), mode="fanin")
