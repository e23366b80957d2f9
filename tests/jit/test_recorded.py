"""Calls that autograd records can be differentiated."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from luxtorch.jit import jit

from .conftest import compiled


class Doubled(torch.autograd.Function):
    """A function whose gradient is not its derivative: it tells whether the user's own backward is used."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def no_grad(w, x):
    with torch.no_grad():
        scale = w.sum()
    return (x @ w * scale).sum()


FUNCTIONS = {
    "loss": lambda w, x: (x @ w).tanh().square().sum(),
    "detach": lambda w, x: (x @ w * w.detach().sum()).sum(),
    "no_grad": no_grad,
    "own backward": lambda w, x: (x @ Doubled.apply(w)).sum(),
    "inner gradient": lambda w, x: torch.func.grad(lambda w: (x @ w).sin().sum())(w).square().sum(),
    "argument": lambda w, x: (w * x.sum()).sum() + w.sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_backward(batch, rng, name, kind):
    function, x = FUNCTIONS[name], batch[0]
    jitted = jit(function, backend="replay")
    for _ in range(2):
        start, grads = torch.randn(3, 2, generator=rng), []
        for f in (jitted, function):
            w = torch.nn.Parameter(start) if kind is torch.nn.Parameter else start.clone().requires_grad_()
            value = f(w, x)
            value.backward()
            grads.append((value.detach(), w.grad))
        torch.testing.assert_close(*grads)
    assert jitted.cache_info()[:2] == (1, 1)


def test_several_results_and_constants(batch):
    x, w = batch[0].clone().requires_grad_(), torch.ones(3)
    out = jit(lambda x, w: {"y": x * w, "x": x, "n": 3, "w": w + 1}, backend="replay")(x, w)
    assert out["x"] is x and out["n"] == 3 and not out["w"].requires_grad
    out["y"].square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_a_second_derivative_is_refused(batch):
    x = batch[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(jit(lambda x: (x**3).sum(), backend="replay")(x), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_grad_mode_decides(batch):
    x = batch[0].clone().requires_grad_()
    jitted = jit(lambda x: x * 2, backend="replay")
    assert jitted(x).requires_grad
    with torch.no_grad():
        assert not jitted(x).requires_grad
    assert jitted.cache_info().misses == 2


def test_what_requires_grad_is_not_donated(batch):
    x = batch[0].clone().requires_grad_()
    jit(lambda x: x * 2, donate="x", backend="replay")(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_is_closed_over_may_be_read(requires_grad):
    rates = torch.tensor([1.0, 2.0])
    jitted = jit(lambda x: (x * 3).sum() if bool((rates > 0).all()) else x.sum(), backend="replay")
    assert jitted(torch.ones(2, requires_grad=requires_grad)) == 6


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "recorded", "exported", "in a loop"])
def test_it_may_be_the_first_that_a_process_compiles(tmp_path, way):
    # Decompositions, as that of max pooling, expect that modules of Inductor have been imported.
    calls = {
        "plain": "lt.jit(lambda x: pool(x), backend='inductor')(x)",
        "recorded": "lt.jit(lambda x: pool(x), backend='inductor')(x.requires_grad_()).sum().backward()",
        "exported": f"lt.jit(lambda x: pool(x)).export({str(tmp_path / 'pool.pt2')!r}, x)",
        "in a loop": "lt.jit(lambda x: lt.map(pool, x[None]), backend='inductor')(x)",
    }
    program = "import torch, luxtorch as lt\nx = torch.ones(1, 1, 4, 4)\npool = lambda x: torch.max_pool2d(x, 2)\n"
    done = subprocess.run([sys.executable, "-c", program + calls[way]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
