"""What torch.func has of the features of the comparison, with torchopt for the optimizers."""

from __future__ import annotations

import copy
import os
import tempfile

import torch
import torchopt
from probing import close, main
from torch import nn
from torch.func import functional_call, stack_module_state

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def normed():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


def trees(module):
    return {name: p.detach() for name, p in module.named_parameters()}, dict(module.named_buffers())


def loss(module, ps, buffers, x):
    return functional_call(module, (ps, buffers), (x,)).square().sum()


def names():
    module = nn.Linear(3, 2)
    for wrong in ({}, {"wieght": torch.ones(2, 3), "bias": torch.ones(2)}):
        try:
            functional_call(module, wrong, (X,))
        except (KeyError, RuntimeError):
            continue
        raise AssertionError("functional_call takes the module's own parameters without a word")


def batchnorm_grad():
    module = normed()
    ps, buffers = trees(module)

    def loss_and_buffers(ps, buffers, x):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # or those that were given would change
        return loss(module, ps, buffers, x), buffers

    grads, new = torch.func.grad(loss_and_buffers, has_aux=True)(ps, buffers, X)
    assert not torch.equal(new["1.running_mean"], torch.zeros(5)) and grads


def batchnorm_models():
    modules = [normed() for _ in range(3)]
    ps, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    ps = {name: p.detach() for name, p in ps.items()}
    y = torch.vmap(lambda ps, buffers: functional_call(base, (ps, buffers), (X,)))(ps, buffers)
    close(y[1], modules[1](X).detach())


def attention_hessian():
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.linspace(-1, 1, 8).reshape(1, 2, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.func.hessian(lambda x: module(x, x, x, need_weights=False)[0].square().sum())(x).reshape(8, 8)
    close(hessian.detach(), hessian.detach().T)


def lstm_jvp():
    module = nn.LSTM(3, 4)
    x = X[:, None]
    ps, _ = trees(module)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.func.jvp(lambda x: functional_call(module, ps, (x,))[0], (x,), (torch.ones_like(x),))


def setup_vmap():
    def build(seed):
        generator = torch.Generator().manual_seed(seed)
        return nn.init.xavier_uniform_(torch.empty(5, 3), generator=generator)

    torch.vmap(build)(torch.arange(3))


W = {"w": torch.tensor([1.0, -2.0])}


def adam(rate, ps):
    rule = torchopt.adam(lambda count: rate)  # a rate by itself would be compared with 0
    state = rule.init(ps)
    for _ in range(2):
        grads = torch.func.grad(lambda ps: ps["w"].square().sum())(ps)
        updates, state = rule.update(grads, state, inplace=False)
        ps = torchopt.apply_updates(ps, updates, inplace=False)
    return ps


def rate_models():
    rates = torch.tensor([0.1, 0.01])
    close(torch.vmap(lambda rate: adam(rate, W)["w"])(rates)[1], adam(0.01, W)["w"])


def rate_gradient():
    def after(rate):
        return adam(rate, W)["w"].square().sum()

    found = torch.func.grad(after)(torch.tensor(0.1))
    close(found, (after(torch.tensor(0.101)) - after(torch.tensor(0.099))) / 0.002, 1e-2)


def whole_step():
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    ps, buffers = trees(module)
    rule = torchopt.adam(0.1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(ps, state, x):
        grads = torch.func.grad(lambda ps: loss(module, ps, buffers, x))(ps)
        updates, state = rule.update(grads, state, inplace=False)
        return torchopt.apply_updates(ps, updates, inplace=False), state

    step(ps, rule.init(ps), X)


def compiled_inside():
    f = torch.compile(lambda x: (x.sin() * x).sum(), backend="aot_eager", fullgraph=True)
    f(X[0])
    close(torch.vmap(torch.func.grad(f))(X), X.cos() * X + X.sin())


def error_path():
    module = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(4, 1)))
    try:
        functional_call(module, trees(module), (X,))
    except RuntimeError as error:
        assert "1.0" in str(error), f"no name in: {error}"


def checkpoint():
    rule = torchopt.adam(0.1)
    state = rule.init(W)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "one")
        torch.save((W, state), path)
        torch.load(path, weights_only=True)


def modules():
    module = nn.Linear(3, 4)
    close(functional_call(module, trees(module), (X,)), module(X).detach())


def loop():
    from torch._higher_order_ops import scan

    def total(x):
        return scan(lambda c, x: (c * 0.5 + x, c.clone()), torch.zeros(3), x)[0].sum()

    torch.func.jvp(torch.compile(total), (X,), (X,))


def condition():
    from torch._higher_order_ops import while_loop

    def f(x):
        return while_loop(lambda c: c.square().sum() < 99, lambda c: (c * 1.5,), (x,))[0].sum()

    torch.compile(torch.vmap(f), fullgraph=True)(torch.stack([X, 2 * X]))


def branch():
    def f(x):
        return torch.cond(x.sum() > -1, lambda x: x.square(), lambda x: 3 * x, (x,)).sum()

    torch.compile(lambda x: torch.func.jvp(f, (x,), (x,)), fullgraph=True)(X)


def ragged():
    module = nn.LSTM(3, 2, batch_first=True)

    def f(ps, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return functional_call(module, ps, (packed,))[1][0].square().sum()

    x, lengths = torch.stack([X, 2 * X])[:, None], torch.tensor([[4], [2]])
    torch.vmap(torch.func.grad(f), (None, 0, 0))(trees(module)[0], x, lengths)


MISSING = {
    "dropout_keys": "torch.vmap(randomness=...) draws from the global generator; nothing takes a key",
    "per_sample": "torch.vmap(randomness=...) draws from the global generator; nothing takes a key",
    "donation": "torch.compile has no donation: what a step returns is new memory",
    "flat": "parameters_to_vector has no names",
}

if __name__ == "__main__":
    main(globals())
