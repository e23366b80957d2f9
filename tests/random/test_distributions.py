"""More distributions: that they are what SciPy says, their derivatives, and that they are the same under transforms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

import luxtorch as lt
import luxtorch.random as lr
from luxtorch import DTypeError, InputError
from luxtorch.jit import jit

LOGITS = torch.tensor([0.1, 0.0, 0.2, 0.7]).log()
MEAN = torch.tensor([1.0, -2.0, 0.5])
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-1.0, 0.3, 0.1]])

# Each takes a key and a shape, and may have another shape itself.
DRAWS = {
    "exponential": lr.exponential,
    "gumbel": lr.gumbel,
    "categorical": lambda key, shape: lr.categorical(key, LOGITS, shape=shape),
    "gamma": lambda key, shape: lr.gamma(key, 0.7, shape),
    "beta": lambda key, shape: lr.beta(key, 0.5, 2.0, shape),
    "dirichlet": lambda key, shape: lr.dirichlet(key, torch.tensor([0.5, 1.0, 2.0]), shape),
    "poisson": lambda key, shape: lr.poisson(key, 3.5, shape),
    "poisson, many": lambda key, shape: lr.poisson(key, 1000.0, shape),
    "multivariate_normal": lambda key, shape: lr.multivariate_normal(key, MEAN, shape=shape, scale_tril=FACTOR),
    "orthogonal": lambda key, shape: lr.orthogonal(key, 3, shape),
}
# These take one key.
CHOICES = {
    "choice": lambda key, shape: lr.choice(key, 7, shape),
    "choice, weights": lambda key, shape: lr.choice(key, 7, shape, p=torch.arange(7)),
    "choice, all different": lambda key, shape: lr.choice(key, 60, shape, replace=False),
    "choice, all different, weights": lambda key, shape: lr.choice(
        key, 60, shape, replace=False, p=torch.linspace(0.1, 1, 60)
    ),
    "choice of rows": lambda key, shape: lr.choice(key, torch.eye(7), shape),
}
# Those with parameters: of each a value that is right, and one that is not.
PARAMETERS = {
    "gamma": (lr.gamma, [0.5, 3.0, 40.0], [0.0, -1.0, -0.5, math.nan]),
    "beta": (lambda key, a, *rest: lr.beta(key, a, 2.0, *rest), [0.5, 3.0, 40.0], [0.0, -1.0, math.nan]),
    "poisson": (lr.poisson, [0.0, 3.0, 40.0], [-1.0, math.nan, math.inf, 1e17]),
    "bernoulli": (lr.bernoulli, [0.0, 0.3, 1.0], [-0.1, 1.1, math.nan]),
}
VECTORS = {
    "categorical": (lr.categorical, torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, -math.inf]])),
    "dirichlet": (lr.dirichlet, torch.tensor([[0.5, 1.0, 2.0], [30.0, 0.01, 1.0]])),
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
each_of_all = pytest.mark.parametrize("draw", [*DRAWS.values(), *CHOICES.values()], ids=[*DRAWS, *CHOICES])
each_with_parameters = pytest.mark.parametrize("name", PARAMETERS)


def same(a, b):
    """Compare draws: a product of matrices may be rounded otherwise in a batch, and the rest not."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# The distributions.


def fits(drawn, distribution):
    assert stats.kstest(drawn.double().numpy(), distribution.cdf).pvalue > 1e-3


def fits_counts(drawn, mass):
    """Compare counts with their probabilities; the rare ones are taken together."""
    counts = np.bincount(drawn.numpy().ravel(), minlength=len(mass)).astype(float)
    expected = mass * counts.sum()
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    expected[-1] += counts.sum() - expected.sum()  # what lies beyond
    some = expected > 1e-6
    assert counts[~some].sum() == 0
    if some.sum() > 1:
        assert stats.chisquare(counts[some], expected[some]).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("draw", "reference"), [(lr.exponential, stats.expon()), (lr.gumbel, stats.gumbel_r())])
def test_exponential_and_gumbel_are_right(make_key, draw, reference, dtype):
    drawn = draw(make_key(), (200_000,), dtype=dtype)
    fits(drawn, reference)
    # Both tails go on where 24 bits would end.
    least = draw(make_key(), (2_000_000,), dtype=dtype).double().numpy()
    assert len(np.unique(np.sort(least)[-1000:])) > 990 and len(np.unique(np.sort(least)[:1000])) > 990


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentration", [0.05, 0.3, 0.99, 1.0, 1.5, 7.0, 1e3, 1e6])
def test_gamma_is_right(make_key, concentration, dtype):
    fits(lr.gamma(make_key(), concentration, (30_000,), dtype=dtype), stats.gamma(concentration))


def test_gamma_of_a_tiny_concentration_underflows_as_often_as_it_must(make_key):
    drawn = lr.gamma(make_key(), 1e-3, (20_000,), dtype=torch.float64)
    zeros = int((drawn < 1e-300).sum())
    assert stats.binomtest(zeros, 20_000, stats.gamma(1e-3).cdf(1e-300)).pvalue > 1e-3
    rest = drawn[drawn >= 1e-300].numpy()
    below = stats.gamma(1e-3).cdf(1e-300)
    assert stats.kstest((stats.gamma(1e-3).cdf(rest) - below) / (1 - below), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("a", "b"), [(0.5, 0.5), (1.0, 1.0), (2.0, 5.0), (0.1, 3.0), (1e3, 2e3), (1e6, 1e6), (0.3, 1e4)]
)
def test_beta_is_right(make_key, a, b, dtype):
    fits(lr.beta(make_key(), a, b, (30_000,), dtype=dtype), stats.beta(a, b))


def test_beta_of_tiny_parameters_is_near_0_or_1(make_key):
    drawn = lr.beta(make_key(), 1e-3, 3e-3, (20_000,))
    assert not drawn.isnan().any() and bool(((drawn >= 0) & (drawn <= 1)).all())
    assert stats.binomtest(int((drawn > 0.5).sum()), 20_000, stats.beta(1e-3, 3e-3).sf(0.5)).pvalue > 1e-3
    assert 0.9 < float(((drawn < 1e-6) | (drawn > 1 - 1e-6)).float().mean()) < 1


def test_dirichlet_is_right(make_key):
    concentration = torch.tensor([0.05, 1.0, 4.0, 30.0])
    drawn = lr.dirichlet(make_key(), concentration, (30_000,))
    torch.testing.assert_close(drawn.sum(-1), torch.ones(30_000))
    for i, one in enumerate(concentration.tolist()):
        fits(drawn[:, i], stats.beta(one, float(concentration.sum()) - one))
    expected = stats.dirichlet(concentration.double().numpy()).cov()
    np.testing.assert_allclose(np.cov(drawn.double().numpy().T), expected, atol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.5, 4.0, 9.99, 10.0, 12.0, 30.0, 300.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_poisson_is_right(make_key, rate, as_tensor):
    given = torch.tensor([rate, 9.0, 11.0], dtype=torch.float64) if as_tensor else rate
    drawn = lr.poisson(make_key(), given, (100_000, 3) if as_tensor else (100_000,))
    drawn = drawn[:, 0] if as_tensor else drawn
    fits_counts(drawn, stats.poisson(rate).pmf(np.arange(int(drawn.max()) + 2)))


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e9, 1e15])
def test_poisson_of_a_large_rate_is_right(make_key, rate):
    drawn = lr.poisson(make_key(), rate, (50_000,)).double()
    # Its steps are too many for classes; within one the distribution function is spread evenly.
    spread = lr.uniform(make_key(), drawn.shape, dtype=torch.float64)
    upper = stats.poisson(rate).cdf(drawn.numpy()) if rate < 1e9 else stats.norm(rate, rate**0.5).cdf(drawn.numpy())
    step = stats.poisson(rate).pmf(drawn.numpy()) if rate < 1e9 else 0.0
    assert stats.kstest(upper - spread.numpy() * step, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.01, 1.0, 9.5, 10.0, 11.0, 16.0, 25.0, 40.0, 100.0, 1e4])
def test_poisson_is_the_quantile_far_into_both_tails(rate):
    from luxtorch.random._distributions import _MANY, _expanded, _steps

    small = np.geomspace(2.0**-44, 0.5, 3001)[:-1]
    for u, quantile in ((small, stats.poisson(rate).ppf(small)), (1 - small, stats.poisson(rate).isf(small))):
        drawn = (_steps if rate < _MANY else _expanded)(*map(torch.tensor, (u, np.full_like(u, rate))))
        # The quantile itself is open where u is the distribution function, up to rounding.
        wrong = drawn.numpy() != quantile
        tail = stats.poisson(rate).cdf if u is small else stats.poisson(rate).sf
        edges = np.minimum(abs(tail(quantile) / small - 1), abs(tail(quantile - 1) / small - 1))
        assert (edges[wrong] < 1e-2).all() and wrong.mean() < 0.01


def test_categorical_is_right(make_key):
    fits_counts(lr.categorical(make_key(), LOGITS, shape=(50_000,)), LOGITS.exp().double().numpy())
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    drawn = lr.categorical(make_key(), rows.T + 100, dim=0, shape=(50_000, 2))
    for i in range(2):
        fits_counts(drawn[:, i].contiguous(), rows[i].exp().double().numpy())


@pytest.mark.parametrize("weights", [None, [0.1, 0.0, 0.4, 1.5]])
def test_choice_is_right(make_key, weights):
    p = None if weights is None else torch.tensor(weights)
    mass = np.full(4, 0.25) if weights is None else np.array(weights) / 2
    fits_counts(lr.choice(make_key(), 4, (20_000,), p=p), mass)
    pairs = torch.vmap(lambda key: lr.choice(key, 4, (2,), replace=False, p=p))(lr.split(make_key(), 20_000))
    assert bool((pairs[:, 0] != pairs[:, 1]).all())
    expected = [[mass[i] * mass[j] / (1 - mass[i]) * (i != j) for j in range(4)] for i in range(4)]
    fits_counts(pairs[:, 0] * 4 + pairs[:, 1], np.array(expected).ravel())


def test_choice_of_rows_takes_whole_rows_and_their_derivative(make_key):
    key, rows = make_key(), lr.normal(make_key(), (5, 2))
    index = lr.choice(key, 5, (3, 2))
    assert torch.equal(lr.choice(key, rows, (3, 2)), rows[index])
    slopes = torch.func.grad(lambda rows: lr.choice(key, rows, (3, 2)).sum())(rows)
    assert torch.equal(slopes, torch.bincount(index.flatten(), minlength=5).float().unsqueeze(1).expand(5, 2))


@pytest.mark.parametrize("by", ["covariance", "scale_tril"])
def test_multivariate_normal_is_right(make_key, by):
    matrix = FACTOR @ FACTOR.T if by == "covariance" else FACTOR
    drawn = lr.multivariate_normal(make_key(), MEAN, shape=(40_000,), **{by: matrix}).double().numpy()
    centered = np.linalg.solve(FACTOR.double().numpy(), (drawn - MEAN.numpy()).T)
    for row in centered:
        assert stats.kstest(row, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(centered), np.eye(3), atol=0.02)
    flat = lr.multivariate_normal(make_key(), MEAN[:2], shape=(10,), scale_tril=torch.ones(2, 2))
    torch.testing.assert_close(flat[:, 0] - MEAN[0], flat[:, 1] - MEAN[1])  # a covariance without an inverse


def test_orthogonal_is_uniform(make_key):
    q = lr.orthogonal(make_key(), 3, (20_000,), dtype=torch.float64)
    torch.testing.assert_close(q @ q.mT, torch.eye(3, dtype=torch.float64).expand_as(q))
    # Each entry of a uniform direction in space is uniform; the trace is 1 + 2 cos of a turn that has 1 - cos.
    for i in range(3):
        for j in range(3):
            fits(q[:, i, j], stats.uniform(-1, 2))
    turned = torch.linalg.det(q)
    assert stats.binomtest(int((turned > 0).sum()), 20_000).pvalue > 1e-3
    angle = ((q.diagonal(dim1=1, dim2=2).sum(-1) * turned.sign() - 1) / 2).clamp(-1, 1).acos().numpy()
    assert stats.kstest(angle, lambda t: (t - np.sin(t)) / np.pi).pvalue > 1e-3


# What holds for all.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "draw",
    [
        lr.exponential,
        lr.gumbel,
        lambda key, shape, dtype: lr.gamma(key, 0.7, shape, dtype=dtype),
        lambda key, shape, dtype: lr.gamma(key, torch.tensor(0.7, dtype=dtype, device=key.device), shape),
        lambda key, shape, dtype: lr.beta(key, 0.7, 2, shape, dtype=dtype),
        lambda key, shape, dtype: lr.beta(key, torch.tensor(0.7, dtype=dtype, device=key.device), 2, shape),
        lambda key, shape, dtype: lr.dirichlet(key, torch.ones(2, dtype=dtype, device=key.device), shape[:-1]),
        lambda key, shape, dtype: lr.multivariate_normal(
            key,
            torch.zeros(2, dtype=dtype, device=key.device),
            torch.eye(2, dtype=dtype, device=key.device),
            shape[:-1],
        ),
        lambda key, shape, dtype: lr.orthogonal(key, 2, (3,), dtype=dtype)[:, 0],
    ],
)
def test_dtype_shape_and_device(make_key, device, draw, dtype):
    key = make_key().to(device)
    drawn = draw(key, (3, 2), dtype=dtype)
    assert (drawn.dtype, drawn.shape, drawn.device) == (dtype, (3, 2), key.device)
    assert bool(drawn.isfinite().all())
    nowhere = draw(key.to("meta"), (3, 2), dtype=dtype)
    assert (nowhere.dtype, nowhere.shape, nowhere.device.type) == (dtype, (3, 2), "meta")


@each_of_all
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (2, 3)])
def test_shapes(make_key, draw, shape):
    drawn = draw(make_key(), shape)
    assert drawn.shape[: len(shape)] == shape
    assert draw(make_key(), list(shape)).shape == drawn.shape


@each_of_all
def test_the_same_key_draws_the_same_and_another_key_not(make_key, draw):
    first, second = lr.split(make_key())
    assert torch.equal(draw(first, (32,)), draw(first, (32,)))
    assert not torch.equal(draw(first, (32,)), draw(second, (32,)))


@each_of_all
def test_vmap_over_keys_is_a_loop(make_key, draw):
    keys = lr.split(make_key(), 6)
    expected = torch.stack([draw(key, (4, 2)) for key in keys])
    same(torch.vmap(lambda key: draw(key, (4, 2)))(keys), expected)
    got = torch.vmap(torch.vmap(lambda key: draw(key, (4, 2))))(keys.reshape(2, 3, 2))
    same(got.flatten(0, 1), expected)
    same(torch.vmap(lambda key: draw(key, (4, 2)), in_dims=1)(keys.T), expected)


@each_draw
def test_a_batch_of_keys_is_a_loop(make_key, draw):
    keys = lr.split(make_key(), 6)
    expected = torch.stack([draw(key, (4, 2)) for key in keys])
    same(draw(keys, (6, 4, 2)), expected)
    same(draw(keys.reshape(2, 3, 2), (2, 3, 4, 2)).flatten(0, 1), expected)
    with pytest.raises(InputError, match="must start with the batch"):
        draw(keys, (4, 2))


@each_of_all
@pytest.mark.parametrize("vmapped", [False, True])
def test_jitted_is_eager(make_key, draw, vmapped):
    def run(keys):
        return torch.vmap(lambda key: draw(key, (7,)))(keys) if vmapped else draw(keys[0], (7,))

    jitted, keys = jit(run, backend="replay"), lr.split(make_key(), 3)
    same(jitted(keys), run(keys))
    same(jitted(keys.flip(0)), run(keys.flip(0)))


@pytest.mark.slow
@each_of_all
def test_compiled_is_eager(make_key, draw):
    key = make_key()
    compiled = torch.compile(lambda key: draw(key, (7,)), fullgraph=True, backend="aot_eager")
    same(compiled(key), draw(key, (7,)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch._prims_common:FutureWarning")  # of Inductor about itself
def test_inductor_is_eager(make_key):
    key = make_key()

    def everything(key):
        return [draw(key, (7,)) for draw in (DRAWS | CHOICES).values()]

    for got, expected in zip(jit(everything)(key), everything(key), strict=True):
        same(got, expected)


@each_of_all
def test_the_global_generator_is_neither_moved_nor_read(make_key, draw):
    key, generator = make_key(), torch.random.default_generator
    drawn = []
    for shift in range(2):
        generator.manual_seed(shift)
        before = generator.get_state()
        drawn.append(draw(key, (8,)))
        assert torch.equal(generator.get_state(), before)
    assert torch.equal(*drawn)


# Parameters.


@each_with_parameters
def test_tensors_of_parameters_broadcast(make_key, name):
    key, (draw, allowed, _) = make_key(), PARAMETERS[name]
    row = torch.tensor(allowed)
    assert draw(key, row).shape == (3,) and draw(key, row[:0]).shape == (0,)
    assert torch.equal(draw(key, row, (4, 3)), draw(key, row.expand(4, 3)))
    assert torch.equal(draw(key, row[:, None], (3, 4)), draw(key, row[:, None].expand(3, 4), (3, 4)))
    for i, one in enumerate(allowed):  # one number is a tensor full of it
        assert torch.equal(draw(key, one, (3,))[i], draw(key, row)[i])


@each_with_parameters
def test_vmap_over_parameters_is_a_loop(make_key, name):
    draw, allowed, _ = PARAMETERS[name]
    keys, row = lr.split(make_key(), 3), torch.tensor(allowed)
    got = torch.vmap(lambda value: draw(keys[0], value, (4,)))(row)
    assert torch.equal(got, torch.stack([draw(keys[0], value, (4,)) for value in row]))
    got = torch.vmap(lambda key, value: draw(key, value, (4,)))(keys, row)
    assert torch.equal(got, torch.stack([draw(key, value, (4,)) for key, value in zip(keys, row, strict=True)]))
    got = torch.vmap(lambda key: draw(key, row))(keys)
    assert torch.equal(got, torch.stack([draw(key, row) for key in keys]))


@pytest.mark.parametrize("name", VECTORS)
def test_vmap_over_vectors_of_parameters_is_a_loop(make_key, name):
    draw, rows = VECTORS[name]
    keys = lr.split(make_key(), 2)
    assert torch.equal(draw(keys[0], rows, shape=(5, 2)), draw(keys[0], rows.expand(5, 2, 3)))
    got = torch.vmap(lambda row: draw(keys[0], row, shape=(4,)))(rows)
    assert torch.equal(got, torch.stack([draw(keys[0], row, shape=(4,)) for row in rows]))
    got = torch.vmap(lambda key, row: draw(key, row, shape=(4,)))(keys, rows)
    assert torch.equal(got, torch.stack([draw(key, row, shape=(4,)) for key, row in zip(keys, rows, strict=True)]))


@pytest.mark.parametrize("replace", [False, True])
def test_vmap_over_weights_and_rows_is_a_loop(make_key, replace):
    keys, weights = lr.split(make_key(), 3), lr.uniform(make_key(), (3, 6))
    rows = lr.normal(make_key(), (3, 6, 2))

    def draw(key, rows, p):
        return lr.choice(key, rows, (2, 2), replace=replace, p=p)

    expected = torch.stack([draw(*one) for one in zip(keys, rows, weights, strict=True)])
    assert torch.equal(torch.vmap(draw)(keys, rows, weights), expected)


@pytest.mark.parametrize("by", ["covariance", "scale_tril"])
def test_vmap_over_means_and_covariances_is_a_loop(make_key, by):
    keys, means = lr.split(make_key(), 3), lr.normal(make_key(), (3, 4))
    factors = lr.normal(make_key(), (3, 4, 4))
    matrices = factors @ factors.mT + torch.eye(4) if by == "covariance" else factors

    def draw(key, mean, matrix):
        return lr.multivariate_normal(key, mean, shape=(5,), **{by: matrix})

    expected = torch.stack([draw(*one) for one in zip(keys, means, matrices, strict=True)])
    same(torch.vmap(draw)(keys, means, matrices), expected)
    same(lr.multivariate_normal(keys, means[:, None], shape=(3, 5), **{by: matrices[:, None]}), expected)


@each_with_parameters
def test_wrong_parameters_are_refused_where_they_are_seen(make_key, name):
    draw, allowed, wrong = PARAMETERS[name]
    for one in wrong:
        with pytest.raises(InputError, match="must be (positive|from 0|a prob|a number)"):
            draw(make_key(), one)
        with pytest.raises(InputError, match="must be (positive|from 0|a prob)[\\s\\S]*got"):
            draw(make_key(), torch.tensor([allowed[1], one]))
    for one in (True, "1", None, torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(DTypeError, match="must be a number"):
            draw(make_key(), one)
    with pytest.raises(InputError, match=r"broadcasts to \(2, 1\)"):
        draw(make_key(), torch.tensor(allowed), (2, 1))


@pytest.mark.parametrize("name", ["gamma", "beta", "poisson"])
def test_wrong_parameters_that_are_not_seen_give_nan(make_key, name):
    key, (draw, allowed, wrong) = make_key(), PARAMETERS[name]
    values = torch.tensor([allowed[1], *wrong], dtype=torch.float64)
    for run in (torch.vmap(lambda value: draw(key, value)), jit(lambda values: draw(key, values), backend="replay")):
        drawn = run(values)
        assert bool(drawn[0] >= 0) and bool((drawn[1:].isnan() | (drawn[1:] == -1)).all())


def test_wrong_weights_that_are_not_seen_give_minus_one(make_key):
    key = make_key()
    good, nothing = torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3)
    for wrong in (nothing, nothing - 1, torch.tensor([1.0, 1.0, math.nan]), torch.tensor([1.0, math.inf, 1.0])):
        for replace in (True, False):
            pick = torch.vmap(lambda p, replace=replace: lr.choice(key, 3, (2,), replace=replace, p=p))
            assert bool((pick(torch.stack([good, wrong]))[0] > 0).all())
            assert pick(torch.stack([good, wrong]))[1].tolist() == [-1, -1]
        logits = torch.stack([good, wrong]).log()
        if not bool((wrong == math.inf).any()):
            assert (torch.vmap(lambda row: lr.categorical(key, row))(logits) < 0).tolist() == [False, True]


@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=pytest.mark.slow)])
def test_wrong_weights_of_rows_that_are_not_seen_are_an_error(make_key, backend):
    key, rows, weights = make_key(), torch.eye(3), torch.stack([torch.ones(3), torch.zeros(3)])

    def pick(p):
        return lr.choice(key, rows, (2,), p=p)

    jitted = jit(pick, backend=backend)
    assert torch.equal(jitted(weights[0]), pick(weights[0]))
    for run in (torch.vmap(pick), lambda weights: jitted(weights[1])):
        with pytest.raises((RuntimeError, IndexError), match="out of (bounds|range)"):
            run(weights)


def test_a_covariance_that_is_none_gives_nan_where_it_is_not_seen(make_key):
    matrices = torch.stack([torch.eye(2), -torch.eye(2)])
    drawn = torch.vmap(lambda c: lr.multivariate_normal(make_key(), torch.zeros(2), c))(matrices)
    assert drawn.isnan().any(1).tolist() == [False, True]


MISTAKES = {
    "randint, a fraction": (lambda key: lr.randint(key, (), high=2.5), DTypeError, "high must be an int"),
    "randint, a float": (lambda key: lr.randint(key, (), low=0.0), DTypeError, "low must be an int"),
    "randint, a bool": (lambda key: lr.randint(key, (), 0, True), DTypeError, "high must be an int"),
    "randint, dtype": (lambda key: lr.randint(key, (), dtype=torch.float32), DTypeError, "an integer dtype"),
    "randint, range": (lambda key: lr.randint(key, (), 0, 300, dtype=torch.uint8), InputError, "range of torch.uint8"),
    "size": (lambda key: lr.uniform(key, (2.5,)), DTypeError, "Each size in shape must be an int"),
    "shape": (lambda key: lr.gamma(key, 1.0, torch.tensor(3)), DTypeError, "shape must be a sequence of ints"),
    "size, a bool": (lambda key: lr.normal(key, (True,)), DTypeError, "Each size in shape must be an int"),
    "uniform, NaN": (lambda key: lr.uniform(key, low=math.nan), InputError, "low must be a number"),
    "uniform, inf": (lambda key: lr.uniform(key, high=math.inf), InputError, "high must be finite"),
    "uniform, order": (lambda key: lr.uniform(key, low=2), InputError, "low must be at most high, which is 1.0"),
    "uniform, a tensor": (lambda key: lr.uniform(key, low=torch.zeros(2)), DTypeError, "low must be a number"),
    "normal, negative": (lambda key: lr.normal(key, std=-1.0), InputError, "std must be at least 0"),
    "normal, a bool": (lambda key: lr.normal(key, std=True), DTypeError, "std must be a number"),
    "truncated_normal, std": (lambda key: lr.truncated_normal(key, std=0.0), InputError, "std must be positive"),
    "permutation, a fraction": (lambda key: lr.permutation(key, 2.5), DTypeError, "x must be an int or a tensor"),
    "permutation, negative": (lambda key: lr.permutation(key, -1), InputError, "x must be at least 0"),
    "permutation, a scalar": (lambda key: lr.permutation(key, torch.tensor(3)), InputError, "x has the wrong shape"),
    "permutation, keys": (
        lambda key: lr.permutation(lr.split(key, 5), 5),
        InputError,
        "the wrong shape[\\s\\S]*vmap",
    ),
    "split, a float": (lambda key: lr.split(key, 2.0), DTypeError, "number must be an int"),
    "fold_in, a float": (lambda key: lr.fold_in(key, 1.5), DTypeError, "data must be an integer, a string"),
    "categorical, integers": (lambda key: lr.categorical(key, torch.arange(3)), DTypeError, "logits must be a float"),
    "categorical, a list": (lambda key: lr.categorical(key, [0.0, 1.0]), DTypeError, "logits must be a floating"),
    "categorical, a scalar": (
        lambda key: lr.categorical(key, torch.tensor(1.0)),
        InputError,
        "dim must be a dim",
    ),
    "categorical, dim": (lambda key: lr.categorical(key, torch.zeros(2), 1), InputError, "dim must be a dim"),
    "categorical, none": (lambda key: lr.categorical(key, torch.zeros(2, 0)), InputError, "logits has the wrong shape"),
    "categorical, shape": (lambda key: lr.categorical(key, torch.zeros(2, 3), shape=(3,)), InputError, "broadcasts"),
    "categorical, NaN": (lambda key: lr.categorical(key, torch.tensor([0.0, math.nan])), InputError, "logits must be"),
    "categorical, never": (lambda key: lr.categorical(key, torch.zeros(2).log()), InputError, "logits must be below"),
    "choice, a fraction": (lambda key: lr.choice(key, 2.5), DTypeError, "x must be an int or a tensor"),
    "choice, nothing": (lambda key: lr.choice(key, 0), InputError, "x must be at least 1, to draw 1"),
    "choice, too many": (
        lambda key: lr.choice(key, 3, (2, 2), replace=False),
        InputError,
        "x must be at least 4, to draw 4[\\s\\S]*replace=True",
    ),
    "choice, p": (lambda key: lr.choice(key, 3, p=torch.ones(4)), InputError, "p has the wrong shape"),
    "choice, a list": (lambda key: lr.choice(key, 2, p=[0.5, 0.5]), DTypeError, "p must be a tensor of weights"),
    "choice, negative": (lambda key: lr.choice(key, 2, p=torch.tensor([2.0, -1])), InputError, "p must be weights"),
    "choice, zeros": (lambda key: lr.choice(key, 2, p=torch.zeros(2)), InputError, "p must be weights of which one"),
    "choice, few weights": (
        lambda key: lr.choice(key, 3, (2,), replace=False, p=torch.tensor([1.0, 0.0, 0.0])),
        InputError,
        "p must be weights of which 2 are positive",
    ),
    "choice, a sum of inf": (
        lambda key: lr.choice(key, 2, p=torch.full((2,), 1e308, dtype=torch.float64)),
        InputError,
        "p must be weights",
    ),
    "choice, keys": (lambda key: lr.choice(lr.split(key, 5), 5, (5,)), InputError, "the wrong shape[\\s\\S]*vmap"),
    "gamma, dtype": (lambda key: lr.gamma(key, 1.0, dtype=torch.int64), DTypeError, "dtype must be a real floating"),
    "beta, shapes": (lambda key: lr.beta(key, torch.ones(2), torch.ones(3)), InputError, "must broadcast[\\s\\S]*of a"),
    "dirichlet, a number": (lambda key: lr.dirichlet(key, 1.0), DTypeError, "concentration must be a tensor"),
    "dirichlet, a scalar": (lambda key: lr.dirichlet(key, torch.tensor(1.0)), InputError, "wrong shape"),
    "dirichlet, none": (lambda key: lr.dirichlet(key, torch.ones(2, 0)), InputError, "concentration has the wrong"),
    "orthogonal, a fraction": (lambda key: lr.orthogonal(key, 2.5), DTypeError, "n must be an int"),
    "orthogonal, negative": (lambda key: lr.orthogonal(key, -1), InputError, "n must be at least 0"),
    "multivariate_normal, neither": (lambda key: lr.multivariate_normal(key, MEAN), InputError, "One of covariance"),
    "multivariate_normal, both": (
        lambda key: lr.multivariate_normal(key, MEAN, FACTOR, scale_tril=FACTOR),
        InputError,
        "One of covariance and scale_tril",
    ),
    "multivariate_normal, a matrix": (
        lambda key: lr.multivariate_normal(key, MEAN, torch.eye(2)),
        InputError,
        "covariance has the wrong shape[\\s\\S]*3 entries",
    ),
    "multivariate_normal, a number": (
        lambda key: lr.multivariate_normal(key, 0.0, torch.eye(2)),
        DTypeError,
        "mean must be a floating",
    ),
    "multivariate_normal, not positive": (
        lambda key: lr.multivariate_normal(key, MEAN, torch.ones(3, 3)),
        InputError,
        "positive definite[\\s\\S]*scale_tril",
    ),
    "multivariate_normal, shape": (
        lambda key: lr.multivariate_normal(key, MEAN.expand(2, 3), FACTOR @ FACTOR.T, ()),
        InputError,
        "mean has the wrong shape",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(make_key, mistake):
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        run(make_key())


@pytest.mark.parametrize("draw", [*DRAWS.values(), *CHOICES.values()], ids=[*DRAWS, *CHOICES])
def test_what_is_no_key_is_refused(draw):
    with pytest.raises(DTypeError, match="A key must be a uint64 tensor"):
        draw(0, (2,))


# Derivatives.


def gamma_slope(a, x):
    """Return the derivative of a gamma variable with its quantile fixed, by finite differences of SciPy's inverse."""
    h = 1e-5 * a
    up, low = special.gammaincc(a, x), special.gammainc(a, x)

    def inverse(a):
        return np.where(low < 0.5, special.gammaincinv(a, low), special.gammainccinv(a, up))

    return (inverse(a + h) - inverse(a - h)) / (2 * h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentration", [1e-2, 0.2, 1.0, 3.0, 20.0, 1e3, 1e6])
def test_the_derivative_of_gamma_is_that_of_its_quantile(make_key, concentration, dtype):
    key, a = make_key(), torch.full((300,), concentration, dtype=dtype)
    x, forward = torch.func.jvp(lambda a: lr.gamma(key, a), (a,), (torch.ones_like(a),))
    backward = torch.func.grad(lambda a: lr.gamma(key, a).sum())(a)
    torch.testing.assert_close(forward, backward)
    assert torch.equal(x, lr.gamma(key, a))
    kept = x.double().numpy() > 1e-30
    expected = gamma_slope(a.double().numpy(), x.double().numpy())
    np.testing.assert_allclose(forward.double().numpy()[kept], expected[kept], rtol=2e-3)
    taped = a.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(lr.gamma(key, taped).sum(), taped)[0], backward)


def test_derivatives_of_means_are_right(make_key):
    a, b = torch.tensor(0.6, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    keys = lr.split(make_key(), 40_000)

    def moments(a, b):
        x = torch.vmap(lambda key: lr.beta(key, a, b))(keys)
        return torch.stack([x.mean(), x.square().mean()])

    def exact(a, b):
        mean = a / (a + b)
        return torch.stack([mean, mean * (a + 1) / (a + b + 1)])

    got, expected = (torch.stack(torch.func.jacfwd(f, (0, 1))(a, b)) for f in (moments, exact))
    torch.testing.assert_close(got, expected, rtol=0.03, atol=3e-3)
    torch.testing.assert_close(torch.stack(torch.func.jacrev(moments, (0, 1))(a, b)), got)


def test_the_derivative_of_dirichlet_is_that_of_gammas(make_key):
    key, a = make_key(), torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    got = torch.func.jacrev(lambda a: lr.dirichlet(key, a))(a)
    # At a fixed key the shares are those of three gamma variables.
    gammas = lr.gamma(key, a)
    slopes = torch.tensor(gamma_slope(a.numpy(), gammas.numpy()))
    total = gammas.sum()
    expected = (torch.eye(3) * slopes) / total - torch.outer(gammas, slopes) / total**2
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(got.sum(0), torch.zeros(3, dtype=torch.float64))  # the shares add up to 1


@pytest.mark.parametrize("by", ["covariance", "scale_tril"])
def test_derivatives_of_multivariate_normal_are_finite_differences(make_key, by):
    key, mean = make_key(), MEAN.double()
    matrix = FACTOR.double() if by == "scale_tril" else FACTOR.double() @ FACTOR.double().T + torch.eye(3)
    turned = lr.normal(make_key(), (3, 3), dtype=torch.float64)
    direction = (turned + turned.T, lr.normal(make_key(), (3,), dtype=torch.float64))

    def loss(t):
        draw = lr.multivariate_normal(key, mean + t * direction[1], shape=(4,), **{by: matrix + t * direction[0]})
        return (draw.sin() * torch.arange(12.0).reshape(4, 3)).sum()

    at, h = torch.zeros((), dtype=torch.float64), 1e-4
    difference = (loss(at + h) - loss(at - h)) / (2 * h)
    second = (loss(at + h) - 2 * loss(at) + loss(at - h)) / h**2
    grad, ones = torch.func.grad, torch.ones_like(at)
    torch.testing.assert_close(grad(loss)(at), difference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.jvp(loss, (at,), (ones,))[1], difference, rtol=1e-5, atol=1e-5)
    twice = [
        grad(grad(loss))(at),
        torch.func.jvp(grad(loss), (at,), (ones,))[1],
        grad(lambda t: torch.func.jvp(loss, (t,), (ones,))[1])(at),
        torch.func.jvp(lambda t: torch.func.jvp(loss, (t,), (ones,))[1], (at,), (ones,))[1],
    ]
    for one in twice:
        torch.testing.assert_close(one, second, rtol=1e-4, atol=1e-4)


GAMMAS = {
    "gamma": lambda key, a: lr.gamma(key, a, (4,)),
    "beta": lambda key, a: lr.beta(key, a, 2.0, (4,)),
    "dirichlet": lambda key, a: lr.dirichlet(key, torch.stack([a, a * a, a + 1]), (4,))[:, 0],
}
each_gamma = pytest.mark.parametrize("draw", GAMMAS.values(), ids=GAMMAS)


@each_gamma
def test_derivatives_under_vmap_and_jit(make_key, draw):
    keys, values = lr.split(make_key(), 3), torch.tensor([0.5, 2.0, 30.0])

    def loss(key, a):
        return draw(key, a).square().sum()

    grad = torch.func.grad(loss, argnums=1)
    expected = torch.stack([grad(key, a) for key, a in zip(keys, values, strict=True)])

    def pushed(key, a):
        return torch.func.jvp(lambda a: loss(key, a), (a,), (torch.ones_like(a),))[1]

    for each in (torch.vmap(grad), torch.vmap(pushed)):
        torch.testing.assert_close(each(keys, values), expected)
        torch.testing.assert_close(jit(each, backend="replay")(keys, values), expected)

    def total(values):
        return torch.vmap(loss)(keys, values).sum()

    torch.testing.assert_close(torch.func.grad(total)(values), expected)
    tangent = torch.func.jvp(total, (values,), (torch.ones_like(values),))[1]
    torch.testing.assert_close(tangent, expected.sum())
    taped = values.clone().requires_grad_()
    for run in (total, jit(total, backend="replay")):
        torch.testing.assert_close(torch.autograd.grad(run(taped), taped)[0], expected)


@pytest.mark.slow
@each_gamma
def test_derivatives_outside_of_torch_compile(make_key, draw):
    keys, taped = lr.split(make_key(), 3), torch.tensor([0.5, 2.0, 30.0]).requires_grad_()

    def total(values):
        return torch.vmap(lambda key, a: draw(key, a).square().sum())(keys, values).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    (got,), (expected,) = (torch.autograd.grad(run(taped), taped) for run in (compiled, total))
    torch.testing.assert_close(got, expected)


@each_gamma
def test_a_second_derivative_is_refused(make_key, draw):
    key, a = make_key(), torch.tensor(0.7)

    def loss(a):
        return draw(key, a).square().sum()

    def pushed(a):
        return torch.func.jvp(loss, (a,), (torch.ones_like(a),))[1]

    def twice_on_the_tape():
        taped = a.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(taped), taped, create_graph=True)
        return torch.autograd.grad(slope, taped)

    def tape_around(inner):
        taped = a.clone().requires_grad_()
        return torch.autograd.grad(inner(taped), taped)

    grad, jvp = torch.func.grad, torch.func.jvp
    ways = [
        lambda: grad(grad(loss))(a),
        lambda: jvp(grad(loss), (a,), (a,)),
        lambda: grad(pushed)(a),
        lambda: jvp(pushed, (a,), (a,)),
        lambda: torch.vmap(grad(grad(loss)))(a.expand(2)),
        lambda: torch.vmap(lambda a: jvp(pushed, (a,), (a,))[1])(a.expand(2)),
        lambda: lt.hessian(loss, a),
        twice_on_the_tape,
        lambda: tape_around(grad(loss)),
        lambda: tape_around(pushed),
    ]
    for way in ways:
        with pytest.raises(InputError, match="have one derivative by their concentration, and no second"):
            way()


@each_gamma
def test_other_second_derivatives_are_right(make_key, draw):
    key, a, w = make_key(), torch.tensor(0.7), torch.tensor(1.3)
    x = draw(key, a)

    def loss(w):
        return (draw(key, a) * w**3).sum()

    torch.testing.assert_close(torch.func.grad(torch.func.grad(loss))(w), 6 * w * x.sum())
    mixed = torch.func.grad(lambda a: torch.func.grad(lambda w: (draw(key, a) * w**3).sum())(w))(a)
    slope = torch.func.grad(lambda a: draw(key, a).sum())(a)
    torch.testing.assert_close(mixed, 3 * w**2 * slope)


def test_torch_func_inside_of_torch_compile_is_refused(make_key):
    key, a = make_key(), torch.ones(3)
    slope = torch.func.grad(lambda a: lr.gamma(key, a).sum())
    with pytest.raises(Exception, match="torch.compile cannot trace derivatives of gamma"):
        torch.compile(slope, fullgraph=True, backend="aot_eager")(a)


@pytest.mark.parametrize("name", ["poisson", "bernoulli"])
def test_integers_have_no_derivative(make_key, name):
    draw, allowed, _ = PARAMETERS[name]
    taped = torch.tensor(allowed).requires_grad_()
    assert not draw(make_key(), taped).requires_grad
    assert not lr.categorical(make_key(), taped).requires_grad
    tangent = torch.func.jvp(lambda p: draw(make_key(), p).float(), (taped.detach(),), (taped.detach(),))[1]
    assert not tangent.any()
