"""Deep modules with a checkpoint around each block: the memory of torch's own, and the gradients of no checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad
from torch.utils.checkpoint import checkpoint

import luxtorch as lt
from luxtorch.core import flatten_names, tree_map
from luxtorch.interop import from_torch

benchmark = pytest.importorskip("benchmarks.checkpoint_memory")  # the wheel has no benchmarks


@pytest.mark.parametrize("name", benchmark.PROBLEMS)
def test_a_checkpointed_step_takes_the_memory_of_torchs_own(name):
    make, options, data = benchmark.PROBLEMS[name]
    found = benchmark.measured(lambda checkpointed: make(checkpointed, **{**options, "depth": 4}), data())
    plain, checkpointed = found["torch"]
    assert checkpointed < 0.6 * plain
    for way, (our_plain, our_checkpointed) in found.items():
        assert our_plain < 1.05 * plain and our_checkpointed < 1.05 * checkpointed, way


class Blocks(nn.Module):
    """Call layers that keep something for their derivative, each in a checkpoint."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Kernel(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class First(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


KEEPING = {
    "attention": lambda time, width: nn.Sequential(nn.Unflatten(1, (4, time // 4)), Kernel(), nn.Flatten(1, 2)),
    "layer norm": lambda time, width: nn.LayerNorm(width),
    "batch norm": lambda time, width: nn.BatchNorm1d(time),
    "lstm": lambda time, width: First(width, width),
    "rms norm": lambda time, width: nn.RMSNorm(width),
    "softmax": lambda time, width: nn.Softmax(-1),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_a_checkpoint_holds_no_more_than_in_torch(kind, rng):
    x = torch.randn(8, 64, 32, generator=rng).requires_grad_()
    module = Blocks(*(KEEPING[kind](64, 32) for _ in range(4)))
    layer, ps, st = from_torch(module)
    leaves = tree_map(lambda leaf: leaf.requires_grad_(), ps)
    kept = [module(x), layer(x, leaves, st)]
    theirs, _ = benchmark.held(lambda: kept.append(module(x)))
    ours, _ = benchmark.held(lambda: kept.append(layer(x, leaves, st)))
    copied = x.nbytes + sum(leaf.nbytes for leaf in flatten_names(st).values() if isinstance(leaf, torch.Tensor))
    assert ours < theirs + copied + 4096


@pytest.mark.parametrize("kind", KEEPING)
def test_second_derivatives_inside_of_a_checkpoint(kind, rng):
    layer, ps, st = from_torch(Blocks(KEEPING[kind](2, 4) if kind != "attention" else Kernel()).double())
    x = torch.randn(3, 2, 4, generator=rng, dtype=torch.float64).requires_grad_()
    names, leaves = zip(*flatten_names(ps).items(), strict=True) if flatten_names(ps) else ((), ())

    def of(x, *leaves):
        return layer(x, lt.unflatten_names(dict(zip(names, leaves, strict=True))) if names else ps, st)[0]

    assert torch.autograd.gradgradcheck(of, (x, *(leaf.requires_grad_() for leaf in leaves)))


# The gradients of checkpointed modules.

SMALL = {
    "Llama": (lambda checkpointed: benchmark.Llama(checkpointed, width=8, heads=2, depth=2, time=5, dropout=0.3)),
    "DenseNet": (lambda checkpointed: benchmark.DenseNet(checkpointed, growth=2, depth=2, dropout=0.3)),
}


@pytest.mark.parametrize("transform", ["tape", "step", "grad", "jit", "again"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SMALL)
def test_checkpoints_leave_the_gradients_of_deep_modules_alone(name, training, transform, rng):
    if name == "Llama":
        tokens = torch.randint(64, (2, 6), generator=rng)
        x, y = tokens[:, :-1], tokens[:, 1:]
    else:
        x, y = torch.randn(3, 3, 4, 4, generator=rng, dtype=torch.float64), torch.tensor([0, 4, 9])
    with_checkpoints, without = (SMALL[name](checkpointed).double().train(training) for checkpointed in (True, False))
    without.load_state_dict(with_checkpoints.state_dict())
    found = []
    for module in (with_checkpoints, without):
        layer, ps, st = from_torch(module)

        def loss(ps):
            return benchmark.loss_of(layer(x, ps, st)[0], y)  # noqa: B023

        if transform in ("tape", "again"):
            leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
            inputs = [*flatten_names(leaves).values()]
            slopes = torch.autograd.grad(loss(leaves), inputs, create_graph=transform == "again")
            if transform == "again":
                slopes = torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), inputs, allow_unused=True)
            result = dict(zip(flatten_names(leaves), slopes, strict=True))
        elif transform == "step":
            ts = lt.training.TrainState(layer, ps, st, lt.optim.Descent(1.0))
            ts = lt.training.single_train_step(objective, (x, y), ts)[3]
            result = flatten_names(ts.parameters) | flatten_names(lt.core.tree_map(lambda leaf: leaf, ts.states))
        elif transform == "grad":
            result = flatten_names(grad(loss)(ps))
        else:
            result = flatten_names(lt.jit(grad(loss), backend="replay")(ps))
        found.append({name: leaf for name, leaf in result.items() if isinstance(leaf, torch.Tensor)})
    torch.testing.assert_close(*found)
    if transform == "tape" and not training:  # torch's own, with nothing of luxtorch
        slopes = torch.autograd.grad(benchmark.loss_of(without(x), y), [*without.parameters()])
        theirs = dict(zip(dict(without.named_parameters()), slopes, strict=True))
        torch.testing.assert_close(found[0], theirs)


def objective(model, ps, st, data):
    y, st = model(data[0], ps, st)
    return benchmark.loss_of(y, data[1]), st, {}
