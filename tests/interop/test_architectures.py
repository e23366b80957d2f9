"""Whole architectures in plain torch.nn: what their functions do equals what the modules do, where those can do it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import luxtorch as lt
from luxtorch.core import tree_map

from . import models

# A module with a probability of dropout, and the shape of an input, or the number of tokens in one.
MODELS = {
    "ResNet18": (lambda p: models.ResNet18(width=4, dropout=p), (4, 3, 32, 32)),
    "ViT": (lambda p: models.ViT(dropout=p), (4, 3, 16, 16)),
    "GPT": (lambda p: models.GPT(dropout=p, flash=False), (4, 10)),
    "GPT-sdpa": (lambda p: models.GPT(dropout=p, flash=True), (4, 10)),
    "UNet": (lambda p: no_dropout(models.UNet(), p), (4, 1, 16, 16)),
    "Generator": (lambda p: models.Generator(), (4, 6, 1, 1)),
    "Discriminator": (lambda p: models.Discriminator(), (4, 1, 16, 16)),
}
RANDOM = {"ResNet18", "ViT", "GPT", "GPT-sdpa", "UNet"}


def no_dropout(module, p):
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = p
    return module


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def make(name, make_key):
    """Return a function that makes a module in float64 and an input for it."""
    build, shape = MODELS[name]

    def make(p=0.0):
        module = filled(build(p).double(), make_key())
        if len(shape) == 2:
            return module, lt.random.randint(make_key(), shape, 0, 17)
        return module, lt.random.normal(make_key(), shape, dtype=torch.float64)

    return make


def filled(module, key):
    """Give a module parameters that are decided by a key."""
    with torch.no_grad():
        for i, value in enumerate(module.parameters()):
            noise = lt.random.normal(lt.random.fold_in(key, i), value.shape, dtype=value.dtype)
            value.copy_(value.mean() + noise * (0.05 if value.ndim < 2 else value[0].numel() ** -0.5))
    return module


def number(y):
    """Return one number that depends on all of an output."""
    y = y[0] if isinstance(y, tuple) else y
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).square().mean()


def loss_of(layer, x):
    def loss(ps, st):
        y, st = layer(x, ps, st)
        return number(y), st

    return loss


def flat(tree):
    return dict(lt.core.named_leaves(tree))


def close(ours, theirs):
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def buffers(module, st):
    """Return the buffers of a module, and the states of the same names."""
    theirs, ours = dict(module.named_buffers()), flat(st)
    return {name: ours[name] for name in theirs}, theirs


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_gradients_and_statistics(make, mode):
    module, x = make()
    module.train(mode == "train")
    before = copy.deepcopy(module.state_dict())
    layer, ps, st = lt.from_torch(module)
    assert list(flat(ps)) == [name for name, _ in module.named_parameters()]
    grads, new = grad(loss_of(layer, x), has_aux=True)(ps, st)
    y, again = layer(x, ps, st)
    close(flat(again), flat(new))
    close(dict(module.state_dict()), dict(before))
    theirs = module(x)
    torch.testing.assert_close(y, theirs, rtol=1e-10, atol=1e-12)
    number(theirs).backward()
    close(flat(grads), {name: value.grad for name, value in module.named_parameters()})
    close(*buffers(module, again))


def test_products_with_the_hessian(make):
    module, x = make()
    module.eval()
    layer, ps, st = lt.from_torch(module)
    direction = tree_map(lambda p: p.sin() + 0.1, ps)
    loss = loss_of(layer, x)
    _, forward = jvp(lambda ps: grad(loss, has_aux=True)(ps, st)[0], (ps,), (direction,))
    parameters = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        first = torch.autograd.grad(number(module(x)), parameters, create_graph=True)
    weights = flat(direction).values()
    second = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, weights, strict=True)), parameters)
    close(flat(forward), dict(zip(flat(ps), second, strict=True)))


def test_gradients_of_each_sample(make):
    module, x = make()
    module.eval()
    layer, ps, st = lt.from_torch(module)
    grads, _ = vmap(lambda x: grad(loss_of(layer, x[None]), has_aux=True)(ps, st))(x)
    loop = []
    for sample in x:
        module.zero_grad()
        number(module(sample[None])).backward()
        loop.append({name: value.grad.clone() for name, value in module.named_parameters()})
    close(flat(grads), {name: torch.stack([each[name] for each in loop]) for name in loop[0]})


def test_eight_models_train_at_once_like_eight_modules(make):
    modules = [make()[0] for _ in range(8)]
    _, x = make()
    rule, steps = lt.optim.Momentum(0.01), 3
    adapted = [lt.from_torch(module) for module in modules]
    layer = adapted[0].layer
    ps, st = lt.stack([(each.ps, each.st) for each in adapted])
    opt_state = vmap(lambda ps: lt.optim.setup(rule, ps))(ps)
    for _ in range(steps):
        grads, st = vmap(grad(loss_of(layer, x), has_aux=True))(ps, st)
        opt_state, ps = vmap(lt.optim.update)(opt_state, ps, grads)
    for i, module in enumerate(modules):
        optimizer = torch.optim.SGD(module.parameters(), 0.01, 0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            number(module(x)).backward()
            optimizer.step()
        own_ps, own_st = tree_map(lambda leaf, i=i: leaf[i], (ps, st))
        close(flat(own_ps), {name: value.detach() for name, value in module.named_parameters()})
        close(*buffers(module, own_st))


def test_models_that_drop_train_at_once_like_one_by_one(name, make, make_key):
    if name not in RANDOM:
        pytest.skip("it draws nothing")
    module, x = make(p=0.3)
    adapted = [lt.from_torch(module, rng=make_key()) for _ in range(3)]
    layer = adapted[0].layer
    loss = loss_of(layer, x)
    ps, st = lt.stack([(each.ps, each.st) for each in adapted])
    values, new = vmap(loss)(ps, st)
    alone = [loss(each.ps, each.st) for each in adapted]
    torch.testing.assert_close(values, torch.stack([value for value, _ in alone]), rtol=1e-9, atol=1e-11)
    close(flat(new), flat(lt.stack([st for _, st in alone])))
    assert len(set(values.tolist())) == 3, "each model drops something else"
    assert loss(adapted[0].ps, alone[0][1])[0] != values[0], "each call drops something else"


@pytest.mark.slow
def test_the_whole_step_compiles(make):
    module, x = make(p=0.2)
    layer, ps, st = lt.from_torch(module)
    step = grad(loss_of(layer, x), has_aux=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(ps, st), step(ps, st), strict=True):
        close(flat(ours), flat(theirs))


def test_a_generator_draws_its_own_noise_from_the_key(make_key):
    layer, ps, st = lt.from_torch(models.Generator(), rng=make_key())
    before = torch.get_rng_state()
    y, new = layer(lt.Inputs(batch=3), ps, st)
    assert y.shape == (3, 1, 16, 16)
    torch.testing.assert_close(layer(lt.Inputs(batch=3), ps, st)[0], y)
    assert not torch.equal(layer(lt.Inputs(batch=3), ps, new)[0], y)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_weight_stands_once_and_serves_twice(make_key):
    module = filled(models.GPT(dropout=0.0).double(), make_key())
    layer, ps, st = lt.from_torch(module)
    assert "lm_head" in ps and not ps["lm_head"]
    x = lt.random.randint(make_key(), (2, 6), 0, 17)
    (logits, loss), _ = layer(lt.Inputs(x, targets=x), ps, st)
    doubled = tree_map(lambda p: p, ps)
    doubled["transformer"]["wte"]["weight"] = 2 * ps["transformer"]["wte"]["weight"]
    twice = {"lm_head.weight": 2 * module.lm_head.weight}
    torch.testing.assert_close(layer(x, doubled, st)[0][0], functional_call(module, twice, (x,))[0])
    torch.testing.assert_close(loss, F.cross_entropy(module(x)[0].flatten(0, 1), x.flatten()))
    assert logits.shape == (2, 6, 17)
