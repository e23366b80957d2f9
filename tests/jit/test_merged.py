"""Operators of a traced graph that do the same are one, and none that do nothing are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import luxtorch as lt


def operators(f, *args: Tensor) -> list[str]:
    graph = lt.jit(f, backend="replay").lower(*args).graph
    return [line for line in graph.splitlines() if "torch.ops." in line]


@pytest.mark.parametrize(
    "f, number",
    [
        (lambda x: x.sin() * x.sin() + x.sin(), 3),
        (lambda x: x.t().t().detach().sin(), 1),
        (lambda x: x.t().contiguous() + x.t() @ x.t(), 4),
        (lambda x: (x + 1) * (x + 1.5), 3),
        (lambda x: (x.sum(0, keepdim=True), x.sum(0, keepdim=True)), 2),  # results stay apart
        (lambda x: (x * 0.0).atan2(x * -0.0), 3),
    ],
    ids=["three sines", "back and forth", "transposes", "other numbers", "results", "signs of zero"],
)
def test_fewer_operators_with_the_same_results(f, number, rng):
    x = torch.randn(3, 3, generator=rng)
    assert len(operators(f, x)) == number
    result, expected = lt.jit(f, backend="replay")(x), f(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    if isinstance(result, tuple):
        assert result[0].data_ptr() != result[1].data_ptr()


def test_what_is_written_between_is_computed_again(rng):
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        first = y.sin()
        y.add_(1.0)
        return first + y.sin()

    x = torch.randn(3, generator=rng)
    torch.testing.assert_close(lt.jit(f, backend="replay")(x), f(x), rtol=0, atol=0)


def test_each_layer_has_few_transposes():
    def transposes(n: int) -> int:
        model = lt.Chain(*[lt.Dense(4, 4, "tanh") for _ in range(n)])
        ps, st = lt.setup(0, model)
        x = torch.ones(2, 4)

        def step(ps):
            gs = lt.gradient(lambda ps: model(x, ps, st)[0].sum(), ps)
            return tree_map(lambda p, g: p - 0.1 * g, ps, gs)

        found = operators(step, ps)
        return sum("aten.t." in line or "aten.detach." in line for line in found)

    assert transposes(6) - transposes(2) <= 8


def test_sparse_results_are_left_alone():
    torch.testing.assert_close(
        lt.jit(lambda x: (x.to_sparse(), x.sin()), backend="replay")(torch.eye(3)),
        (torch.eye(3).to_sparse(), torch.eye(3).sin()),
    )
