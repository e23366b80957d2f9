"""An empty batch gives what the plain call gives: means that are NaN, or errors where there is nothing to do."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import losses as L
from luxtorch.jit import jit

from .conftest import compiled, train

LAYERS = {
    "dense": lambda: lt.Dense(3, 2, "tanh"),
    "layernorm": lambda: lt.Chain(lt.Dense(3, 4), lt.LayerNorm((4,)), lt.Dense(4, 2)),
    "batchnorm": lambda: lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4), lt.Dense(4, 2)),
    "dropout": lambda: lt.Chain(lt.Dense(3, 4), lt.Dropout(0.5), lt.Dense(4, 2)),
    "lstm": lambda: lt.Chain(lt.WrappedFunction(_steps), lt.Recurrence(lt.LSTMCell(3, 4)), lt.Dense(4, 2)),
}

# Means, with derivatives of their own in torch.
MEANS = {
    "mse": F.mse_loss,
    "mse, broadcast": lambda x, y: F.mse_loss(x, y[:, :1].expand_as(x)),
    "huber": F.huber_loss,
    "smooth l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "binary cross-entropy": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y),
    "with logits": F.binary_cross_entropy_with_logits,
    "soft margin": F.soft_margin_loss,
    "poisson": F.poisson_nll_loss,
    "kl": lambda x, y: F.kl_div(x, y, reduction="sum"),
    "mean": lambda x, y: x.mean(),
    "mean of columns": lambda x, y: x.mean(0).sum(),
    "norm": lambda x, y: x.norm() * y.norm(),
    "softmax": lambda x, y: x.softmax(1).logsumexp(1).mean(),
    "layer norm": lambda x, y: F.layer_norm(x, (3,)).mean(),
    "sum": lambda x, y: (x * y).sum(),
    "product": lambda x, y: x.prod() + y.cumsum(0).sum(),
    "MSELoss": L.MSELoss(),
    "HuberLoss": L.HuberLoss(),
    "SmoothL1Loss": L.SmoothL1Loss(),
    "MAELoss": L.MAELoss(),
    "BinaryCrossEntropyLoss": L.BinaryCrossEntropyLoss(),
}


def _steps(x):
    return x[:, None].expand(-1, 4, -1)


def _check(got, expected):
    got, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (got, expected))
    torch.testing.assert_close(got, expected, equal_nan=True)


# Each layer by inductor once, with one fixed size or any: compiling takes seconds.
INDUCTOR = {"dense": "batch", "layernorm": False, "dropout": "batch", "lstm": False}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "dynamic", "backend"),
    [
        *(
            pytest.param(*c, marks=[pytest.mark.slow] * (c[0] == "lstm"))
            for c in product(LAYERS, (False, "batch"), ("replay",))
        ),
        *(pytest.param(*c, "inductor", marks=[pytest.mark.slow, compiled]) for c in INDUCTOR.items()),
    ],
)
def test_training_steps(name, dynamic, backend, make_state):
    ts = make_state(LAYERS[name]())
    jitted = jit(train, dynamic=dynamic, backend=backend)
    for rows in (0, 4, 0):
        batch = torch.ones(rows, 3), torch.zeros(rows, 2)
        _check(jitted(ts, batch), train(ts, batch))


@pytest.mark.parametrize("how", ["tape inside", "gradient inside", "recorded"])
@pytest.mark.parametrize("name", MEANS)
def test_means(name, how):
    function, empty = MEANS[name], torch.zeros(0, 3)

    def on_a_tape(function, x, y):
        value = function(x := x.detach().requires_grad_(), y)
        return value.detach(), *torch.autograd.grad(value, x)

    if how == "recorded":
        got = on_a_tape(jit(function, backend="replay"), empty, empty)
        expected = on_a_tape(function, empty, empty)
    else:
        gradient = torch.func.grad_and_value(function) if how == "gradient inside" else None
        whole = gradient or (lambda x, y: on_a_tape(function, x, y))
        got, expected = jit(whole, backend="replay")(empty, empty), whole(empty, empty)
    _check(got, expected)


@pytest.mark.parametrize("jitted", [False, True])
def test_errors_are_the_same(jitted, make_state):
    step = jit(train, backend="replay") if jitted else train
    with pytest.raises(lt.InputError, match="more than one value per feature"):
        step(make_state(lt.BatchNorm(3)), (torch.zeros(1, 3), torch.zeros(1, 3)))
    loss = L.CTCLoss()
    loss = jit(loss, backend="replay") if jitted else loss
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(lt.InputError, match="at least one sequence"):
        loss(torch.zeros(5, 0, 3), (torch.zeros(0, 2, dtype=torch.int64), none, none))
