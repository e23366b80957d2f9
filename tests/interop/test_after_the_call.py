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
    assert len(layer.skeleton._in_use) + len(layer.skeleton._idle) == 1


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


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
def test_a_frozen_input_may_be_asked_for_a_gradient(how, rng):
    module, plain = Deep(how).eval(), Deep("plain").eval()
    plain.load_state_dict(module.state_dict())
    for each in (module, plain):
        each.parts[0].requires_grad_(False)
        each.parts[0].register_forward_hook(lambda module, args, y: y.requires_grad_(True))  # as transformers does it
    layer, ps, st = from_torch(module)
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)

    def loss(ps, x):
        return layer(x, ps, st)[0].sin().sum()

    plain(x).sin().sum().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    torch.testing.assert_close(flatten_names(grad(loss)(ps, x)), wanted)
    torch.testing.assert_close(flatten_names(lt.jit(grad(loss), backend="replay")(ps, x)), wanted)
    if how == "plain":
        torch.testing.assert_close(
            flatten_names(torch.compile(grad(loss), backend="eager", fullgraph=True)(ps, x)), wanted
        )
    each = vmap(grad(loss), in_dims=(None, 0))(ps, x[:, None])
    torch.testing.assert_close({name: leaf.sum(0) for name, leaf in flatten_names(each).items()}, wanted)


def test_derivatives_inside_of_a_forward_are_right_or_refused(rng):
    class Inner(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how, self.weight = how, nn.Parameter(torch.randn(3))

        def forward(self, x):
            f = lambda x: x.sin().sum()  # noqa: E731
            if self.how == "func":
                return grad(f)(x) * self.weight
            if self.how == "functional":
                return torch.autograd.functional.jacobian(f, x) * self.weight
            x = x.detach().requires_grad_()
            return torch.autograd.grad(f(x), x)[0] * self.weight

    x = torch.randn(3, generator=rng)
    for how in ("func", "functional", "autograd"):
        layer, ps, st = from_torch(Inner(how))
        loss = lambda ps: layer(x, ps, st)[0].sum()  # noqa: B023, E731
        leaf = ps["weight"].clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss({"weight": leaf}), leaf)[0], x.cos())
        if how == "func":
            torch.testing.assert_close(grad(loss)(ps)["weight"], x.cos())
        else:  # zeros would be an answer too
            with pytest.raises(lt.LuxtorchError):
                grad(loss)(ps)


# Adjoints of differential equations, whose backward pass solves another one.


class Flow(nn.Module):
    """A continuous normalizing flow of one hidden layer: points, and the logarithms of their densities."""

    def __init__(self, solve):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.solve = solve

    def slope(self, t, state):
        """Return the velocity of each point, and minus its divergence."""
        with torch.enable_grad():
            x = state[:, :2].detach().requires_grad_() if not state.requires_grad else state[:, :2]
            velocity = self.field(torch.cat([x, t.expand(len(x), 1)], 1))
            traces = [torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return torch.cat([velocity, -sum(traces)[:, None]], 1)

    def forward(self, x):
        return self.solve(self, torch.cat([x, torch.zeros_like(x[:, :1])], 1))


def steps(slope, state, start, end, count=20):
    """Solve by the classical Runge-Kutta method."""
    h = (end - start) / count
    for i in range(count):
        t = torch.as_tensor(start + i * h, dtype=torch.float64)
        k1 = slope(t, state)
        k2 = slope(t + h / 2, state + h / 2 * k1)
        k3 = slope(t + h / 2, state + h / 2 * k2)
        k4 = slope(t + h, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


class Backwards(torch.autograd.Function):
    """Solve the flow forward without a tape, and its adjoint equation backward in time."""

    @staticmethod
    def forward(ctx, flow, state, *weights):
        ctx.flow = flow
        with torch.no_grad():
            end = steps(flow.slope, state, 0.0, 1.0)
        ctx.save_for_backward(end)
        return end

    @staticmethod
    def backward(ctx, gradient):
        (end,), weights = ctx.saved_tensors, [*ctx.flow.parameters()]
        sizes = [end.numel(), end.numel(), *(weight.numel() for weight in weights)]

        def slope(t, everything):
            state, adjoint = (part.view_as(end) for part in everything.split(sizes)[:2])
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                velocity = ctx.flow.slope(t, state)
                along = torch.autograd.grad(velocity, (state, *weights), -adjoint, allow_unused=True)
            found = (torch.zeros_like(x) if y is None else y for x, y in zip((state, *weights), along, strict=True))
            return torch.cat([velocity.detach().flatten(), *(y.flatten() for y in found)])

        start = torch.cat([end.flatten(), gradient.flatten(), *(torch.zeros_like(w).flatten() for w in weights)])
        _, adjoint, *slopes = steps(slope, start, 1.0, 0.0).split(sizes)
        return None, adjoint.view_as(end), *(y.view_as(w) for y, w in zip(slopes, weights, strict=True))


def by_adjoint(flow, state):
    return Backwards.apply(flow, state, *flow.parameters())


def by_steps(flow, state):
    return steps(flow.slope, state, 0.0, 1.0)


def by_torchdiffeq(flow, state):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    precise = {"rtol": 1e-9, "atol": 1e-9}
    return torchdiffeq.odeint_adjoint(flow.slope, state, times, adjoint_params=tuple(flow.parameters()), **precise)[1]


@pytest.mark.parametrize("solve", [by_adjoint, by_torchdiffeq])
@pytest.mark.parametrize("way", ["tape", "step", "late"])
def test_adjoint_equations_give_the_gradients_of_the_solution(solve, way, rng):
    module, plain = Flow(solve), Flow(by_steps)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, generator=rng, dtype=torch.float64)
    layer, ps, st = from_torch(module)
    if way == "step":
        objective = lambda m, ps, st, x: (m(x, ps, st)[0].sin().sum(), st, {})  # noqa: E731
        ts = lt.training.TrainState(layer, ps, st, lt.optim.Descent(1.0))
        ours = flatten_names(lt.training.compute_gradients(objective, x, ts)[0])
    else:
        leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
        loss = layer(x, leaves, st)[0].sin().sum()
        if way == "late":  # another call, with other values, before the backward pass of this one
            layer(x, tree_map(torch.zeros_like, ps), st)
        loss.backward()
        ours = {name: leaf.grad for name, leaf in flatten_names(leaves).items()}
    plain(x).sin().sum().backward()
    theirs = {name: weight.grad for name, weight in plain.named_parameters()}
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functions_that_no_transform_takes_are_refused_with_a_way_out(transform, rng):
    module = Deep("adjoint")
    layer, ps, st = from_torch(module)
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)

    def loss(ps):
        return layer(x, ps, st)[0].sum()

    with pytest.raises(InputError, match="(?s)takes a ctx.*setup_context.*training steps"):
        if transform == "grad":
            grad(loss)(ps)
        elif transform == "vmap":
            vmap(loss)(tree_map(lambda leaf: torch.stack([leaf, leaf]), ps))
        else:
            jvp(loss, (ps,), (ps,))
