"""Transposes of products: turned round where nothing else reads the product, with the same numbers."""

from __future__ import annotations

import pytest
import torch

from luxtorch.jit import jit
from luxtorch.jit._flatten import flatten
from luxtorch.jit._inductor import compiling, lowered, transpose_products
from luxtorch.jit._trace import trace

A, B = torch.arange(6.0).reshape(2, 3) - 2, torch.arange(12.0).reshape(3, 4) / 7
STACKED = torch.stack([A, 2 * A, A - 1]), torch.stack([B, B + 1, -B])

# A function of two factors, the factors, and how many transposes are left.
CASES = {
    "matrices": (lambda a, b: (a @ b).t() + 1, (A, B), 2),
    "stacks of matrices": (lambda a, b: torch.bmm(a, b).transpose(1, 2) + 1, STACKED, 2),
    "other name": (lambda a, b: torch.bmm(a, b).mT.sin(), STACKED, 2),
    "left factor transposed": (lambda a, b: (a.t() @ b).t() + 1, (A.t().contiguous(), B), 1),
    "both factors transposed": (lambda a, b: (a.t() @ b.t()).t() + 1, (A.t().contiguous(), B.t().contiguous()), 0),
    "result as it is": (lambda a, b: (a @ b).t(), (A, B), 2),
    "transposed twice": (lambda a, b: (a @ b).t().t() + 1, (A, B), 0),
    "a square": (lambda a, b: ((c := a.t()) @ c).t() + 1, (A[:, :2].contiguous(), B), 0),
    # These stay.
    "read twice": (lambda a, b: ((y := a @ b).t() + 1, y.sin()), (A, B), 1),
    "first dimensions": (lambda a, b: torch.bmm(a, b).transpose(0, 1) + 1, STACKED, 1),
    "all dimensions": (lambda a, b: torch.bmm(a, b).permute(2, 1, 0) + 1, STACKED, 1),
    "no transpose": (lambda a, b: a @ b + 1, (A, B), 0),
}


def _graph(function, factors):
    leaves, spec = flatten((factors, {}))
    traced = trace(lambda args, kwargs: function(*args), leaves, spec, {})
    graph = lowered(traced, [])
    with compiling(traced, {}):
        transpose_products(graph)
    graph.graph.lint()
    return graph


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name):
    function, factors, left = CASES[name]
    graph, expected = _graph(function, factors), function(*factors)
    got = graph(*factors)
    torch.testing.assert_close(tuple(got), expected if isinstance(expected, tuple) else (expected,))
    assert sum(node.target is torch.ops.aten.permute.default for node in graph.graph.nodes) == left
    torch.testing.assert_close(jit(function)(*factors), expected)


@pytest.mark.parametrize("rows", [2, 5])
def test_symbolic_sizes(rows):
    def function(a, b):
        return (a @ b).t() + 1

    jitted = jit(function, dynamic="a")
    for more in (0, 1, 4):
        a = torch.ones(rows + more, 3)
        torch.testing.assert_close(jitted(a, B), function(a, B))
    assert jitted.cache_info().misses == 1


def test_calls_that_autograd_records():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()

    def function(a, b):
        return ((a @ b).t() * 3).sin()

    def gradients(f):
        return torch.autograd.grad(f(a, b).sum(), (a, b))

    torch.testing.assert_close(gradients(jit(function)), gradients(function))
