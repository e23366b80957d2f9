"""What runs after the call of a converted module: checkpoints, adjoints, functions that it has returned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import luxtorch as lt
from luxtorch.core import InputError, flatten_names, tree_map
from luxtorch.interop import from_torch

from .test_drop_in import filled


class Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module, *weights):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            slopes = torch.autograd.grad(ctx.module(x), (x, *ctx.module.parameters()), gradient)
        return slopes[0], None, *slopes[1:]


class Deep(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh()) for _ in range(3)
        )
        self.double()

    def forward(self, x):
        for part in self.parts:
            if self.how == "adjoint":
                x = Adjoint.apply(x, part[0], *part[0].parameters())
            elif self.how == "plain":
                x = F.dropout(part(x), 0.5, self.training)
            else:
                block = lambda x, part=part: F.dropout(part(x), 0.5, self.training)  # noqa: E731
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x


@pytest.mark.parametrize("transform", ["tape", "step", "grad", "vmap", "jvp", "jit"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", ["checkpoint", "reentrant"])
def test_checkpoints_compute_what_the_plain_code_does(rng, how, training, transform):
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    module, plain = Deep(how).train(training), Deep("plain").train(training)
    plain.load_state_dict(module.state_dict())
    found = []
    for each in (module, plain):
        layer, ps, st = from_torch(each)

        def loss(ps):
            return layer(x, ps, st)[0].sin().sum()  # noqa: B023

        leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
        if transform == "tape":
            loss(leaves).backward()
            result = {name: leaf.grad for name, leaf in flatten_names(leaves).items()}
        elif transform == "step":
            rule = lt.optim.Descent(0.1)
            ts = lt.training.TrainState(layer, ps, st, rule)
            ts = lt.training.single_train_step(lambda m, p, s, d: (m(d, p, s)[0].sin().sum(), s, {}), x, ts)[3]
            result = flatten_names(ts.parameters)
        elif transform == "grad":
            result = flatten_names(grad(loss)(ps))
        elif transform == "vmap":
            result = flatten_names(vmap(grad(loss))(tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), ps)))
        elif transform == "jvp":
            result = {"slope": jvp(loss, (ps,), (ps,))[1]}
        else:
            result = flatten_names(lt.jit(grad(loss), backend="replay")(ps))
        found.append(result)
    torch.testing.assert_close(*found)


def test_adjoints_call_the_module_with_the_values_of_the_call(rng):
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    module = Deep("adjoint")
    layer, ps, st = from_torch(module)
    trees = [tree_map(lambda leaf: (factor * leaf).requires_grad_(), ps) for factor in (1, 2, 3)]  # noqa: B023
    outputs = [layer(x, each, st)[0].sum() for each in trees]
    for each, y in reversed([*zip(trees, outputs, strict=True)]):  # long after the next call
        y.backward()
        filled(module, each).zero_grad()
        module(x).sum().backward()
        for name, leaf in flatten_names(each).items():
            torch.testing.assert_close(leaf.grad, module.get_parameter(name).grad)


def test_functions_that_a_call_returns_keep_its_values(rng):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return lambda: F.dropout(self.linear(x), 0.0)

    layer, ps, st = from_torch(Lazy())
    x = torch.randn(2, 3, generator=rng)
    twice = tree_map(lambda leaf: 2 * leaf, ps)
    one, two = layer(x, ps, st)[0], layer(x, twice, st)[0]
    torch.testing.assert_close(2 * one(), two())
    del one, two
    assert layer(x, ps, st)[0]() is not None


def test_copies_come_back(rng):
    layer, ps, st = from_torch(Deep("checkpoint"))
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    for _ in range(5):
        leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
        layer(x, leaves, st)[0].sum().backward()
    assert len(layer.skeleton._out) + len(layer.skeleton._idle) == 1


def tripled(module, gradients, *_):
    return tuple(None if gradient is None else 3 * gradient for gradient in gradients)


HOOKS = {
    "full backward": lambda part: part.register_full_backward_hook(tripled),
    "full backward, before": lambda part: part.register_full_backward_pre_hook(tripled),
    "forward": lambda part: part.register_forward_hook(lambda module, x, y: 2 * y),
    "forward with keywords": lambda part: part.register_forward_hook(
        lambda module, x, names, y: 2 * y, with_kwargs=True
    ),
    "before forward": lambda part: part.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run_on_a_tape_and_under_transforms_or_are_refused_by_name(rng, kind):
    x = torch.randn(4, 3, generator=rng)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    HOOKS[kind](module[2])
    layer, ps, st = from_torch(module)

    def loss(ps):
        return layer(x, ps, st)[0].sin().sum()

    module(x).sin().sum().backward()
    wanted = {name: value.grad for name, value in module.named_parameters()}
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
    loss(leaves).backward()
    torch.testing.assert_close({name: leaf.grad for name, leaf in flatten_names(leaves).items()}, wanted)
    if kind.startswith("full backward"):
        with pytest.raises(InputError, match="full backward hooks"):
            grad(loss)(ps)
    else:
        torch.testing.assert_close(flatten_names(grad(loss)(ps)), wanted)
