"""Draws: their distributions, and that they are the same under every transform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import luxtorch.random as lr
from luxtorch import DTypeError, InputError
from luxtorch.random import _philox

DRAWS = {
    "uniform": lambda key, shape: lr.uniform(key, shape, low=-1.0, high=3.0),
    "normal": lambda key, shape: lr.normal(key, shape, mean=1.0, std=2.0),
    "truncated_normal": lambda key, shape: lr.truncated_normal(key, shape, mean=0.5, low=-1.0, high=1.5),
    "bernoulli": lambda key, shape: lr.bernoulli(key, 0.3, shape),
    "randint": lambda key, shape: lr.randint(key, shape, -2, 9),
}
REFERENCES = {
    "uniform": stats.uniform(-1.0, 4.0),
    "normal": stats.norm(1.0, 2.0),
    "truncated_normal": stats.truncnorm(-1.5, 1.0, loc=0.5),
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_distribution_is_right(make_key, name):
    drawn = DRAWS[name](make_key(), (20_000,))
    assert stats.kstest(drawn.numpy(), REFERENCES[name].cdf).pvalue > 1e-3


def test_the_discrete_distributions_are_right(make_key):
    counts = torch.bincount(lr.randint(make_key(), (22_000,), -2, 9) + 2, minlength=11)
    assert len(counts) == 11 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    hits = int(lr.bernoulli(make_key(), 0.3, (20_000,)).sum())
    assert stats.binomtest(hits, 20_000, 0.3).pvalue > 1e-3
    assert lr.bernoulli(make_key(), torch.tensor([0.0, 1.0])).tolist() == [False, True]


@pytest.mark.parametrize("x", [0, 1, 50])
def test_a_permutation_has_each_number_once(make_key, x):
    order = lr.permutation(make_key(), x)
    assert order.sort().values.tolist() == list(range(x))


def test_a_permutation_of_rows_keeps_the_rows(make_key):
    rows = torch.arange(40).reshape(20, 2)
    shuffled = lr.permutation(make_key(), rows)
    assert not torch.equal(shuffled, rows) and torch.equal(shuffled.sort(0).values, rows)


@pytest.mark.skipif(not _philox.has_kernels("cpu"), reason="this torch has no stateless kernels on the CPU")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (128, 3)])
def test_the_bits_are_those_of_torch(make_key, dtype, shape):
    import torch.func._random as reference

    key = make_key()
    got = lr.uniform(key, shape, low=-1.0, high=3.0, dtype=dtype)
    assert torch.equal(got, reference.uniform(key, shape, low=-1.0, high=3.0, dtype=dtype))
    got = lr.normal(key, shape, mean=1.0, std=2.0, dtype=dtype)
    assert torch.equal(got, reference.normal(key, shape, mean=1.0, std=2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("draw", [lr.uniform, lr.normal, lr.truncated_normal])
def test_dtype_shape_and_device(make_key, device, draw, dtype):
    key = make_key().to(device)
    drawn = draw(key, (3, 2), dtype=dtype)
    assert (drawn.dtype, drawn.shape, drawn.device) == (dtype, (3, 2), key.device)
    nowhere = draw(key.to("meta"), (3, 2), dtype=dtype)
    assert (nowhere.dtype, nowhere.shape, nowhere.device.type) == (dtype, (3, 2), "meta")


@each_draw
def test_the_same_key_draws_the_same_and_another_key_not(make_key, draw):
    first, second = lr.split(make_key())
    assert torch.equal(draw(first, (64,)), draw(first, (64,)))
    assert not torch.equal(draw(first, (64,)), draw(second, (64,)))


@each_draw
def test_vmap_over_keys_is_a_loop_and_so_is_a_batch_of_keys(make_key, draw):
    keys = lr.split(make_key(), 6)
    expected = torch.stack([draw(key, (4, 2)) for key in keys])
    assert torch.equal(torch.vmap(lambda key: draw(key, (4, 2)))(keys), expected)
    assert torch.equal(draw(keys, (6, 4, 2)), expected)
    table = keys.reshape(2, 3, 2)
    got = torch.vmap(torch.vmap(lambda key: draw(key, (4, 2))))(table)
    assert torch.equal(got, expected.reshape(2, 3, 4, 2))
    assert torch.equal(torch.vmap(lambda key: draw(key, (4, 2)), in_dims=1)(keys.T), expected)


@each_draw
def test_compiled_is_eager_to_the_bit(make_key, draw):
    key = make_key()
    compiled = torch.compile(lambda key: draw(key, (7,)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key), draw(key, (7,)))


@pytest.mark.slow
def test_inductor_is_eager_to_the_bit(make_key):
    key = make_key()

    def everything(key):
        return [draw(key, (7,)) for draw in DRAWS.values()], lr.split(key), lr.fold_in(key, 3), lr.permutation(key, 5)

    got, expected = torch.compile(everything, fullgraph=True)(key), everything(key)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True):
        # The compiler may contract a multiplication and an addition of truncated_normal into one rounding.
        torch.testing.assert_close(
            a, b, rtol=1e-6 if a.is_floating_point() else 0, atol=1e-6 if a.is_floating_point() else 0
        )


def masked_loss(w, key, x):
    return ((x * w * lr.bernoulli(key, 0.5, x.shape)) ** 2).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_draws_inside_transforms(make_key, compiled):
    keys, w, x = lr.split(make_key(), 4), lr.normal(make_key(), (5,)), lr.normal(make_key(), (4, 5))

    def every(w, keys, x):
        per_sample = torch.vmap(torch.func.grad(masked_loss), (None, 0, 0))(w, keys, x)
        tangent = torch.func.jvp(lambda w: masked_loss(w, keys[0], x[0]), (w,), (w,))[1]
        hessian = torch.func.hessian(masked_loss)(w, keys[0], x[0])
        return per_sample, tangent, hessian

    run = torch.compile(every, fullgraph=True, backend="aot_eager") if compiled else every
    per_sample, tangent, hessian = run(w, keys, x)
    loop = torch.stack([torch.func.grad(masked_loss)(w, key, row) for key, row in zip(keys, x, strict=True)])
    torch.testing.assert_close(per_sample, loop)
    torch.testing.assert_close(tangent, loop[0] @ w)
    torch.testing.assert_close(hessian @ w, loop[0])


@each_draw
@pytest.mark.parametrize("compiled", [False, True])
def test_the_global_generator_is_neither_moved_nor_read(make_key, draw, compiled):
    key = make_key()
    run = torch.compile(draw, fullgraph=True, backend="aot_eager") if compiled else draw
    states, drawn = [], []
    for shift in range(2):
        torch.get_rng_state()
        generator = torch.random.default_generator
        generator.manual_seed(shift)
        before = generator.get_state()
        drawn.append(run(key, (8,)))
        states.append(torch.equal(generator.get_state(), before))
    assert states == [True, True]
    assert torch.equal(drawn[0], drawn[1])


@given(st.floats(-3, 3), st.floats(0.1, 2), st.floats(-2, 1), st.floats(0.01, 2), st.sampled_from(FLOATS))
def test_truncation_holds(mean, std, low, width, dtype):
    high = low + width
    drawn = lr.truncated_normal(lr.key(0), (200,), mean=mean, std=std, low=low, high=high, dtype=dtype)
    assert not drawn.isnan().any()
    slack = 2 * torch.finfo(dtype).eps * max(abs(low), abs(high))
    assert bool((drawn.double() >= low - slack).all()) and bool((drawn.double() <= high + slack).all())


@pytest.mark.parametrize(
    ("low", "high"), [(3.0, 4.0), (-4.0, -3.0), (7.0, 9.0), (-30.0, -29.0), (0.0, 1.0), (-40.0, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_drawn_accurately(make_key, low, high, dtype):
    drawn = lr.truncated_normal(make_key(), (5_000,), low=low, high=high, dtype=dtype).double()
    assert stats.kstest(drawn.numpy(), stats.truncnorm(low, high).cdf).pvalue > 1e-3


def test_senseless_draws_are_refused(make_key):
    key = make_key()
    with pytest.raises(InputError, match="low must be below high"):
        lr.truncated_normal(key, low=1.0, high=1.0)
    with pytest.raises(InputError, match="high - low must be at least 1 and at most 2"):
        lr.randint(key, (), 3, 3)
    with pytest.raises(InputError, match="Each size in shape must be at least 0"):
        lr.uniform(key, (-1,))
    with pytest.raises(InputError, match="must start with the batch[\\s\\S]*vmap"):
        lr.uniform(lr.split(key, 3), (2,))
    with pytest.raises(DTypeError, match="floating"):
        lr.uniform(key, (2,), dtype=torch.int64)


def test_a_wide_range_of_integers_is_drawn_to_its_ends(make_key):
    drawn = lr.randint(make_key(), (10_000,), 0, 2**53)
    assert math.log2(float(drawn.max())) > 52.9 and int(drawn.min()) < 2**43
