"""What tensordict has of the features of the comparison: parameters in a TensorDict, put into a module for a call."""

from __future__ import annotations

import os
import tempfile

import torch
import torchopt
import with_torch_func as plain
from probing import close, main
from tensordict import TensorDict, TensorDictParams, from_modules
from torch import nn

X = plain.X


def names():
    module = nn.Linear(3, 2)
    for wrong in (TensorDict({}, []), TensorDict({"wieght": torch.ones(2, 3), "bias": torch.ones(2)}, [])):
        try:
            with wrong.to_module(module):
                module(X)
        except (KeyError, RuntimeError, AttributeError):
            continue
        raise AssertionError("to_module takes the module's own parameters without a word")


def parameters(module):
    return TensorDict(TensorDict.from_module(module).data.to_dict(), [])


def call(module, ps, x):
    with ps.to_module(module):
        return module(x)


def batchnorm_grad():
    module = plain.normed()
    td = parameters(module)
    ps = {name: p.detach() for name, p in module.named_parameters()}

    def loss(ps):
        tree = td.clone()
        for name, p in ps.items():
            tree[tuple(name.split("."))] = p
        return call(module, tree, X).square().sum(), tree["1", "running_mean"]

    _, mean = torch.func.grad(loss, has_aux=True)(ps)
    assert not torch.equal(mean, torch.zeros(5))


def batchnorm_models():
    modules = [plain.normed() for _ in range(3)]
    stacked = from_modules(*modules, as_module=False, lazy_stack=False).data
    y = torch.vmap(lambda ps: call(modules[0], ps, X))(stacked)
    close(y[1], modules[1](X).detach())


def lstm_jvp():
    module = nn.LSTM(3, 4)
    ps = parameters(module)
    x = X[:, None]
    with torch.backends.mkldnn.flags(enabled=False):
        torch.func.jvp(lambda x: call(module, ps, x)[0], (x,), (torch.ones_like(x),))


def whole_step():
    module = nn.Linear(3, 2)
    rule = torchopt.adam(0.1)
    ps = parameters(module)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(ps, state):
        grads = torch.func.grad(lambda ps: call(module, ps, X).square().sum())(ps)
        updates, state = rule.update(dict(grads), state, inplace=False)
        return TensorDict(torchopt.apply_updates(dict(ps), updates, inplace=False), []), state

    step(ps, rule.init(dict(ps)))


def error_path():
    module = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(4, 1)))
    try:
        call(module, parameters(module), X)
    except RuntimeError as error:
        assert "1.0" in str(error), f"no name in: {error}"


def checkpoint():
    ps = TensorDictParams(TensorDict({"w": torch.ones(2)}, []))
    state = torchopt.adam(0.1).init(dict(ps.data))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "one")
        torch.save((ps.data.to_dict(), state), path)
        torch.load(path, weights_only=True)


def modules():
    module = nn.Linear(3, 4)
    close(call(module, parameters(module), X).detach(), module(X).detach())


MISSING = plain.MISSING | {
    "flat": "a TensorDict has names, but is no one vector",
}

if __name__ == "__main__":
    main(vars(plain) | globals())
