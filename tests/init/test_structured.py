"""Orthogonal, sparse, identity and constant weights, against torch.nn.init."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

import luxtorch.init as init
import luxtorch.random as lr
from luxtorch.core import InputError

Keys = Callable[[], Tensor]


@pytest.mark.parametrize("gain", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (1, 1), (2, 3, 4), (8, 2, 2), (6, 2, 3, 3)], ids=str)
def test_orthogonal(shape: tuple[int, ...], dtype: torch.dtype, gain: float, make_key: Keys) -> None:
    matrix = init.orthogonal(make_key(), shape, dtype=dtype, gain=gain).flatten(1) / gain
    rows, columns = matrix.shape
    gram = matrix @ matrix.mH if rows <= columns else matrix.mH @ matrix
    torch.testing.assert_close(gram, torch.eye(min(rows, columns), dtype=dtype), atol=1e-6, rtol=0)


def test_orthogonal_in_half_precision_is_the_rounded_one(make_key: Keys) -> None:
    key = make_key()
    assert torch.equal(init.orthogonal(key, (3, 4), dtype=torch.bfloat16), init.orthogonal(key, (3, 4)).bfloat16())


def test_orthogonal_is_evenly_distributed(make_key: Keys) -> None:
    # An entry of an evenly drawn 3 x 3 rotation or reflection is uniform in [-1, 1] (Archimedes).
    draws = torch.vmap(lambda key: init.orthogonal(key, (3, 3), dtype=torch.float64))(lr.split(make_key(), 1000))
    for entry in draws.flatten(1).unbind(1):
        assert stats.kstest(entry.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.99, 1])
@pytest.mark.parametrize("shape", [(10, 7), (3, 8), (1, 4)], ids=str)
def test_sparse_zeros_per_column_are_torchs(
    shape: tuple[int, int], sparsity: float, make_key: Keys, rng: torch.Generator
) -> None:
    draw = init.sparse_init(make_key(), shape, sparsity=sparsity)
    reference = torch.nn.init.sparse_(torch.empty(shape), sparsity, generator=rng)
    assert torch.equal((draw == 0).sum(0), (reference == 0).sum(0))


def test_sparse_values_are_normal(make_key: Keys) -> None:
    draw = init.sparse_init(make_key(), (100, 40), sparsity=0.5, std=0.3, dtype=torch.float64)
    assert stats.kstest(draw[draw != 0].numpy(), stats.norm(0, 0.3).cdf).pvalue > 1e-4


def test_sparse_places_are_even_and_differ_by_column(make_key: Keys) -> None:
    zero = init.sparse_init(make_key(), (8, 2000), sparsity=0.25) == 0
    assert stats.chisquare(zero.sum(1).numpy()).pvalue > 1e-4
    assert len({tuple(column) for column in zero.T.tolist()}) == math.comb(8, 2)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
def test_sparsity_is_a_share(sparsity: float, make_key: Keys) -> None:
    with pytest.raises(InputError, match="sparsity must be between 0 and 1"):
        init.sparse_init(make_key(), (3, 4), sparsity=sparsity)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)], ids=str)
def test_sparse_is_two_dimensional(shape: tuple[int, ...], make_key: Keys) -> None:
    with pytest.raises(InputError, match="two dimensions"):
        init.sparse_init(make_key(), shape, sparsity=0.5)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)], ids=str)
def test_identity_of_matrices_is_torchs_eye(shape: tuple[int, int], make_key: Keys) -> None:
    assert torch.equal(init.identity_init(make_key(), shape), torch.nn.init.eye_(torch.empty(shape)))


@pytest.mark.parametrize(
    "shape", [(4, 4, 3), (3, 5, 4), (5, 3, 3, 3), (2, 2, 2, 5), (2, 3, 3, 1, 2), (1, 1, 1)], ids=str
)
def test_identity_of_kernels_is_torchs_dirac(shape: tuple[int, ...], make_key: Keys) -> None:
    expected = torch.nn.init.dirac_(torch.empty(shape))
    assert torch.equal(init.identity_init(make_key(), shape), expected)
    assert torch.equal(init.identity_init(make_key(), shape, gain=1.5), 1.5 * expected)


def test_identity_kernel_returns_its_input(make_key: Keys, rng: torch.Generator) -> None:
    x = torch.randn(2, 3, 8, 8, generator=rng)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(x, init.identity_init(make_key(), (3, 3, 3, 3)), padding=1), x
    )


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (4, 4, 3)], ids=str)
@pytest.mark.parametrize("shift", [1, -1, 6])
def test_identity_shift_rolls_the_output(shape: tuple[int, ...], shift: int, make_key: Keys) -> None:
    identity = init.identity_init(make_key(), shape)
    assert torch.equal(init.identity_init(make_key(), shape, shift=shift), identity.roll(shift, 0))
    assert torch.equal(init.identity_init(make_key(), shape, shift=(0, shift)), identity.roll(shift, 1))


def test_identity_of_a_bias_is_zero(make_key: Keys) -> None:
    assert torch.equal(init.identity_init(make_key(), (3,)), torch.zeros(3))


@pytest.mark.parametrize("value", [0.5, -2, True, 1 + 2j])
def test_constant(value: complex, make_key: Keys) -> None:
    dtype = torch.complex64 if isinstance(value, complex) else torch.float32
    expected = torch.empty(2, 3, dtype=dtype).fill_(value)
    assert torch.equal(init.constant(value=value)(make_key(), (2, 3), dtype=dtype), expected)
