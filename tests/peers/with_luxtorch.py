"""What luxtorch has of the features of the comparison."""

from __future__ import annotations

import os
import tempfile

import torch
from probing import close, main

import luxtorch as lt
from luxtorch import optim, training

X = torch.linspace(-1, 1, 12).reshape(4, 3)
NORMED = lt.Chain(lt.Dense(3, 5), lt.BatchNorm(5), lt.Dense(5, 1))
DROPPING = lt.Chain(lt.Dense(3, 8, "tanh"), lt.Dropout(0.5), lt.Dense(8, 1))


def loss(model, ps, x, st):
    y, st = model(x, ps, st)
    return y.square().sum(), st


def names():
    model = lt.Dense(3, 2)
    ps, st = lt.setup(0, model)
    for wrong in ({}, {"wieght": ps["weight"], "bias": ps["bias"]}):
        try:
            model(X, wrong, st)
        except lt.core.KeyNameError:
            continue
        raise AssertionError("nobody noticed")


def batchnorm_grad():
    ps, st = lt.setup(0, NORMED)
    before = st["layer_2"]["running_mean"].clone()
    grads, new = torch.func.grad(loss, argnums=1, has_aux=True)(NORMED, ps, X, st)
    assert torch.equal(st["layer_2"]["running_mean"], before) and grads["layer_1"]["weight"].abs().sum() > 0
    assert not torch.equal(new["layer_2"]["running_mean"], before)


def batchnorm_models():
    many = [lt.setup(seed, NORMED) for seed in range(3)]
    ps, st = (lt.stack(list(trees)) for trees in zip(*many, strict=True))
    y, new = torch.vmap(lambda ps, st: NORMED(X, ps, st))(ps, st)
    close(y[1], NORMED(X, *many[1])[0])
    close(new["layer_2"]["running_mean"][1], NORMED(X, *many[1])[1]["layer_2"]["running_mean"])


def dropout_keys():
    ps, _ = lt.setup(0, DROPPING)
    many = [lt.setup(seed, DROPPING)[1] for seed in range(3)]
    y = torch.vmap(lambda st: DROPPING(X, ps, st)[0])(lt.stack(many))
    close(y[2], DROPPING(X, ps, many[2])[0])
    assert not torch.equal(y[0], y[1])


def per_sample():
    ps, st = lt.setup(0, DROPPING)
    states = [lt.update_state(st, "rng", lt.random.key(i)) for i in range(len(X))]
    one = torch.func.grad(lambda ps, x, st: DROPPING(x[None], ps, st)[0].sum())
    grads = torch.vmap(one, (None, 0, 0))(ps, X, lt.stack(states))
    close(grads["layer_1"]["weight"][2], one(ps, X[2], states[2])["layer_1"]["weight"])


def lstm_jvp():
    model = lt.Recurrence(lt.LSTMCell(3, 4))
    ps, st = lt.setup(0, model)
    x = X[None].repeat(2, 1, 1)

    def f(x):
        return model(x, ps, st)[0]

    _, slope = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    close(slope, (f(x + 1e-3) - f(x - 1e-3)) / 2e-3, 1e-3)


def attention_hessian():
    model = lt.MultiHeadAttention(4, num_heads=2)
    ps, st = lt.setup(0, model)
    x = torch.linspace(-1, 1, 8).reshape(1, 2, 4)
    hessian = torch.func.hessian(lambda x: loss(model, ps, x, st)[0])(x).reshape(8, 8)
    close(hessian, hessian.T)
    assert hessian.abs().sum() > 0


def setup_vmap():
    keys = torch.stack([lt.random.key(seed) for seed in range(3)])
    ps, _ = torch.vmap(lambda key: lt.setup(key, NORMED))(keys)
    close(ps["layer_1"]["weight"][1], lt.setup(lt.random.key(1), NORMED)[0]["layer_1"]["weight"])


def adam(rate, ps, x, steps=2):
    state = optim.adjust(optim.setup(optim.Adam(0.1), ps), lr=rate)
    for _ in range(steps):
        state, ps = optim.update(state, ps, torch.func.grad(lambda ps: (ps["w"] * x).square().sum())(ps))
    return ps


W = {"w": torch.tensor([1.0, -2.0])}


def rate_models():
    rates = torch.tensor([0.1, 0.01])
    many = torch.vmap(lambda rate: adam(rate, W, 1.0))(rates)
    close(many["w"][1], adam(rates[1], W, 1.0)["w"])


def rate_gradient():
    def after(rate):
        return adam(rate, W, 1.0)["w"].square().sum()

    close(
        torch.func.grad(after)(torch.tensor(0.1)),
        (after(torch.tensor(0.101)) - after(torch.tensor(0.099))) / 0.002,
        1e-2,
    )


def train(ts, x):
    _, value, _, ts = training.single_train_step(lambda model, ps, st, x: (*loss(model, ps, x, st), {}), x, ts)
    return value, ts


def whole_step():
    ts = training.TrainState(NORMED, *lt.setup(0, NORMED), optim.Adam(0.1))
    value, _ = torch.compile(train, fullgraph=True, backend="aot_eager")(ts, X)
    close(value, train(ts, X)[0])
    close(lt.jit(train, backend="replay")(ts, X)[0], value)


def compiled_inside():
    f = lt.jit(lambda x: (x.sin() * x).sum(), backend="replay")
    f(X[0])
    close(torch.vmap(torch.func.grad(f))(X), X.cos() * X + X.sin())


def donation():
    step = lt.jit(lambda ps: ps * 2, donate="ps")
    x = torch.ones(200, 200)
    address = x.data_ptr()
    assert step(x).data_ptr() == address


def flat():
    ps, _ = lt.setup(0, NORMED)
    vector = lt.ComponentVector(ps)
    grads = torch.func.grad(lambda v: v.layer_1.weight.square().sum())(vector)
    close(grads.layer_1.weight, 2 * ps["layer_1"]["weight"])
    assert vector.flat.shape == (36,) and grads.layer_3.bias.abs().sum() == 0


def error_path():
    model = lt.Chain(lt.Dense(3, 5), lt.Chain(lt.Dense(4, 1)))
    try:
        model(X, *lt.setup(0, model))
    except lt.core.LuxtorchError as error:
        assert "layer_2.layer_1" in str(error)
    else:
        raise AssertionError("nobody noticed")


def checkpoint():
    _, ts = train(training.TrainState(NORMED, *lt.setup(0, NORMED), optim.Adam(0.1)), X)
    fresh = training.TrainState(NORMED, *lt.setup(1, NORMED), optim.Adam(0.1))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "one")
        training.save_checkpoint(path, ts)
        back = training.load_checkpoint(path, fresh)
    close(train(back, X)[0], train(ts, X)[0], 0)


def modules():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    layer, ps, st = lt.from_torch(module)
    close(layer(X, ps, st)[0], module(X).detach())


def compiled(f):
    """Check a function of a sample under transforms that are compiled; by jvp and vmap, and by grad if it has one."""
    batch = torch.stack([X, 2 * X])
    close(lt.jit(torch.vmap(f), backend="replay")(batch), torch.stack([f(X), f(2 * X)]))
    forward = lt.jit(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], backend="replay")
    close(forward(X), (f(X + 1e-2) - f(X - 1e-2)) / 2e-2, 1e-2)
    return forward(X)


def loop():
    def total(x):
        return lt.scan(lambda c, x: (c * 0.5 + x, c), torch.zeros(3), x)[0].square().sum()

    slope = compiled(total)
    grad = lt.jit(torch.func.grad(total), backend="replay")
    close(grad(X).sum(), slope, 1e-3)
    long = torch.linspace(-1, 1, 3000).reshape(1000, 3)
    assert grad.lower(X).graph.count("torch.ops.") == grad.lower(long).graph.count("torch.ops.")


def condition():
    compiled(lambda x: lt.while_loop(lambda c: c.square().sum() < 99, lambda c: c * 1.5, x).sum())


def branch():
    def f(x):
        return lt.cond(x.sum() > -1, lambda x: x.square(), lambda x: 3 * x, x + 0.1).sum()

    close(lt.jit(torch.func.grad(f), backend="replay")(X).sum(), compiled(f), 1e-3)


def ragged():
    model = lt.Recurrence(lt.LSTMCell(3, 2))
    ps, st = lt.setup(0, model)

    def f(ps, x, lengths):
        return model((x, None, lengths), ps, st)[0].square().sum()

    x, lengths = torch.stack([X, 2 * X])[:, None], torch.tensor([[4], [2]])
    many = lt.jit(torch.vmap(torch.func.grad(f), (None, 0, 0)), backend="replay")(ps, x, lengths)
    close(many["weight_ih"][1], torch.func.grad(f)(ps, x[1, :, :2], torch.tensor([2]))["weight_ih"])


MISSING: dict[str, str] = {}

if __name__ == "__main__":
    main(globals())
