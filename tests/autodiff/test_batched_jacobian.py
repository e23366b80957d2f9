"""The Jacobians of the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from torch.autograd import functional

from luxtorch.autodiff import batched_jacobian
from luxtorch.core import DTypeError, InputError

every_way = pytest.mark.parametrize(
    "way", [{"mode": mode, "chunk_size": size} for mode in ("reverse", "forward") for size in (None, 1, 2)], ids=str
)


@every_way
@given(
    batch=some.integers(0, 3),
    inner=some.lists(some.integers(0, 3), max_size=2),
    outer=some.lists(some.integers(0, 3), max_size=2),
)
def test_each_sample_against_autograd(way, batch: int, inner: list[int], outer: list[int]) -> None:
    n, m = torch.Size(inner).numel(), torch.Size(outer).numel()
    weight = torch.sin(torch.arange(m * n, dtype=torch.float64)).view(m, n)
    x = torch.cos(torch.arange(batch * n, dtype=torch.float64)).view(batch, *inner)

    def f(x: Tensor) -> Tensor:
        return torch.sin(x.reshape(len(x), n) @ weight.T).view(len(x), *outer)

    found = batched_jacobian(f, x, **way)
    assert found.shape == (batch, m, n)
    if m == 0:  # torch.autograd.functional cannot
        return
    for sample, matrix in zip(x, found, strict=True):
        expected = functional.jacobian(lambda sample: f(sample[None])[0], sample)
        torch.testing.assert_close(matrix, expected.reshape(m, n))


@every_way
def test_in_place_operations_inside_the_function(way) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 1
        y[:, 0] *= 3
        return y.mul_(2)

    expected = torch.diag(torch.tensor([6.0, 2.0])).expand(3, 2, 2)
    torch.testing.assert_close(batched_jacobian(f, torch.ones(3, 2), **way), expected)


@every_way
def test_mixed_samples_are_summed(way) -> None:
    # Batch normalization is the case to know: the documentation says what comes out, and nothing detects it.
    found = batched_jacobian(lambda x: x + x.sum(0), torch.ones(3, 2), **way)
    torch.testing.assert_close(found, (1 + 3) * torch.eye(2).expand(3, 2, 2))


@every_way
@pytest.mark.parametrize(
    ("f", "x", "got"),
    [
        (
            torch.sum,
            torch.ones(3, 2),
            r"float32 tensor of shape \(3, 2\) as x and a.* tensor of shape \(\) as f",
        ),
        (lambda x: x[:2], torch.ones(3, 2), r"shape \(2, 2\) as f\(x\)"),
        (lambda x: x[None], torch.tensor(1.0), r"shape \(\) as x"),
        (lambda x: {"y": x}, torch.ones(3), "names y as f"),
        (lambda x: x["a"], {"a": torch.ones(3)}, "a as x"),
    ],
)
def test_shapes_that_are_no_batch(way, f: Callable, x: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"must take a batch to a batch(.|\n)*{got}(.|\n)*jacobian"):
        batched_jacobian(f, x, **way)


@every_way
def test_dtypes(way) -> None:
    with pytest.raises(DTypeError, match="'x' must be a.*tensor(.|\n)*int64"):
        batched_jacobian(lambda x: x * 1.0, torch.ones(3, 2, dtype=torch.int64), **way)
    with pytest.raises(DTypeError, match="'f\\(x\\)' must be a.*tensor(.|\n)*bool"):
        batched_jacobian(lambda x: x > 0, torch.ones(3, 2), **way)
