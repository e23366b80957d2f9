"""Recurrent layers in compiled functions: one operator for a sequence, with the numbers of the steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import luxtorch as lt
from luxtorch import BidirectionalRNN, GRUCell, LSTMCell, Recurrence, RNNCell, StackedCell, optim, training
from luxtorch.core import tree_map
from luxtorch.layers.recurrent._fused import stepwise
from luxtorch.layers.recurrent._kernels import fused, loop_backward, loop_forward, recurrent, recurrent_backward

replayed = partial(lt.jit, backend="replay")
compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
CELLS = {
    "tanh": RNNCell,
    "relu": lambda i, h, **o: RNNCell(i, h, "relu", **o),
    "lstm": LSTMCell,
    "gru": GRUCell,
}
TORCH = {
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
rare = partial(pytest.param, marks=pytest.mark.slow)
each_kind = pytest.mark.parametrize("kind", ["tanh", rare("relu"), "lstm", "gru"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
whole = {"return_sequence": True, "return_carry": True}


def close(got, expected, dtype=torch.float32):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def prepared(layer, make_key, device, dtype, *shape):
    """Return parameters, states and an input for a layer."""
    cast = lambda tree: tree_map(lambda leaf: leaf.to(device, dtype), tree)  # noqa: E731
    ps, st = lt.setup(make_key(), layer)
    noise = lambda leaf: leaf + 0.3 * lt.random.normal(make_key(), leaf.shape)  # noqa: E731
    return cast(tree_map(noise, ps)), st, cast(lt.random.normal(make_key(), shape))


def total(tree):
    """Return a scalar that tells all numbers in a tree apart."""
    leaves = []
    tree_map(leaves.append, tree)
    waves = [torch.cos(torch.arange(leaf.numel(), device=leaf.device)).view_as(leaf) for leaf in leaves]
    return sum((leaf * wave).sum() for leaf, wave in zip(leaves, waves, strict=True))


def by_steps(layer):
    """Return a layer that walks step by step, whatever looks on."""

    def call(x, ps, st):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("luxtorch.layers.recurrent._cells.scanned", stepwise)
            return layer(x, ps, st)

    return call


LAYERS = {
    "last": lambda cell: Recurrence(cell(3, 4)),
    "carry": lambda cell: Recurrence(cell(3, 4), return_carry=True),
    "all": lambda cell: Recurrence(cell(3, 4), **whole),
    "time first": lambda cell: Recurrence(cell(3, 4), batch_first=False, **whole),
    "no bias": lambda cell: Recurrence(cell(3, 4, bias=False), **whole),
    "learned": lambda cell: Recurrence(cell(3, 4, train_state=True), **whole),
    "stack": lambda cell: Recurrence(StackedCell(cell(3, 4), cell(4, 5), cell(5, 4)), **whole),
    "both ways": lambda cell: BidirectionalRNN(cell(3, 4), return_carry=True),
}


@pytest.mark.parametrize("batch", [rare(()), rare((1,)), (3,)])
@pytest.mark.parametrize("form", LAYERS)
@each_dtype
@each_kind
def test_values_and_gradients_are_those_of_the_steps(make_key, device, kind, dtype, form, batch):
    layer = LAYERS[form](CELLS[kind])
    shape = (6, *batch, 3) if form == "time first" else (*batch, 6, 3)
    ps, st, x = prepared(layer, make_key, device, dtype, *shape)
    value_and_grad = lambda call, ps, x: torch.func.grad_and_value(  # noqa: E731
        lambda ps, x: total(call(x, ps, st)[0]), argnums=(0, 1)
    )(ps, x)
    expected = value_and_grad(by_steps(layer), ps, x)
    jitted = replayed(lambda ps, x: value_and_grad(layer, ps, x))
    close(jitted(ps, x), expected, dtype)
    graph = jitted.lower(ps, x).graph
    count = {"stack": 3, "both ways": 2}.get(form, 1)
    assert graph.count("luxtorch.recurrent.default") == graph.count("luxtorch.recurrent_backward.default") == count


@each_dtype
@each_kind
def test_a_continued_sequence_is_that_of_torch(make_key, device, kind, dtype):
    layer = Recurrence(CELLS[kind](3, 4), **whole)
    ps, st, x = prepared(layer, make_key, device, dtype, 2, 5, 3)
    start = tuple(lt.random.normal(make_key(), (2, 4)).to(device, dtype) for _ in range(1 + (kind == "lstm")))
    module = TORCH[kind](3, 4, batch_first=True, device=device, dtype=dtype)
    module.load_state_dict({f"{name}_l0": value for name, value in ps.items()})
    hx = tuple(part[None] for part in start) if kind == "lstm" else start[0][None]
    ys, last = module(x, hx)
    expected = ys, tuple(part[0] for part in (last if kind == "lstm" else (last,)))
    close(replayed(lambda ps, x, start: layer((x, start), ps, st)[0])(ps, x, start), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_kind
def test_half_precision(make_key, device, kind, dtype):
    layer = Recurrence(CELLS[kind](3, 4), **whole)
    ps, st, x = prepared(layer, make_key, device, dtype, 2, 5, 3)
    grad = lambda call, ps, x: torch.func.grad(lambda ps: total(call(x, ps, st)[0]))(ps)  # noqa: E731
    got = replayed(lambda ps, x: grad(layer, ps, x))(ps, x)
    exact = grad(layer, tree_map(torch.Tensor.double, ps), x.double())
    for name, value in got.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact[name], rtol=0.05, atol=0.02 * float(exact[name].abs().max()))


@each_kind
def test_autocast_computes_in_its_precision(make_key, kind):
    layer = Recurrence(CELLS[kind](3, 4))
    ps, st, x = prepared(layer, make_key, "cpu", torch.float32, 2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = replayed(lambda ps, x: layer(x, ps, st)[0])(ps, x)
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, ps, st)[0], rtol=0.05, atol=0.05)


def transforms(layer, st, d):
    """Return functions of parameters and an input, each with a transform of its own."""
    func = torch.func
    f = lambda ps, x: layer(x, ps, st)[0].sin().sum()  # noqa: E731
    y = lambda ps, x: layer(x, ps, st)[0]  # noqa: E731
    square = lambda tree: sum(leaf.square().sum() for leaf in tree.values())  # noqa: E731
    pull = lambda f, ps, x: func.vjp(lambda x: f(ps, x), x)[1]  # noqa: E731
    one = lambda x: x.new_ones(())  # noqa: E731
    return {
        "value": f,
        "grad": lambda ps, x: func.grad(f, argnums=(0, 1))(ps, x),
        "grad of grad": lambda ps, x: func.grad(lambda x: square(func.grad(f)(ps, x)))(x),
        "jvp": lambda ps, x: func.jvp(lambda ps: f(ps, x), (ps,), (d,)),
        "hvp": lambda ps, x: func.jvp(lambda ps: func.grad(f)(ps, x), (ps,), (d,)),
        "jacrev": lambda ps, x: func.jacrev(lambda ps: y(ps, x))(ps),
        "jacfwd": lambda ps, x: func.jacfwd(lambda x: y(ps, x))(x),
        "hessian": lambda ps, x: func.hessian(lambda x: f(ps, x))(x),
        "vmap": lambda ps, x: func.vmap(lambda x: f(ps, x))(x),
        "vmap of grad": lambda ps, x: func.vmap(func.grad(f), (None, 0))(ps, x),
        "jvp of a pullback": lambda ps, x: func.jvp(pull(f, ps, x), (one(x),), (2 * one(x),)),
        "vmap of a pullback": lambda ps, x: func.vmap(pull(y, ps, x))(x.new_ones(3, 2, 4)),
        "grad of a function that is differentiated outside": lambda ps, x: square(func.grad(f)(ps, x)),
    }


NAMES = list(transforms(None, None, None))
OPERATOR = {"value", "grad", "jacrev", "jvp of a pullback", NAMES[-1]}
SLOWLY = [name if name in ("grad", "vmap of grad") else rare(name) for name in NAMES]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [rare("tanh"), rare("relu"), "lstm", rare("gru")])
def test_every_transform_gives_the_numbers_of_the_plain_function(make_key, device, kind, name):
    layer = Recurrence(CELLS[kind](3, 4))
    ps, st, x = prepared(layer, make_key, device, torch.float32, 2, 5, 3)
    f, steps = (transforms(call, st, tree_map(torch.cos, ps))[name] for call in (layer, by_steps(layer)))
    jitted, expected = replayed(f), steps(ps, x)
    close(jitted(ps, x), expected)
    close(f(ps, x), expected)
    assert ("luxtorch.recurrent.default" in jitted.lower(ps, x).graph) == (name in OPERATOR)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SLOWLY)
@pytest.mark.parametrize("kind", ["lstm", rare("gru")])
def test_torch_compile_too(make_key, kind, name):
    layer = Recurrence(CELLS[kind](3, 4))
    ps, st, x = prepared(layer, make_key, "cpu", torch.float32, 2, 5, 3)
    f, steps = (transforms(call, st, tree_map(torch.cos, ps))[name] for call in (layer, by_steps(layer)))
    close(compiled(f)(ps, x), steps(ps, x))


@pytest.mark.parametrize("way", [replayed, compiled, lambda f: f])
@pytest.mark.parametrize("name", ["value", NAMES[-1]])
@pytest.mark.parametrize("kind", [rare("tanh"), rare("relu"), "lstm", rare("gru")])
def test_a_tape_outside(make_key, kind, name, way):
    layer = Recurrence(CELLS[kind](3, 4))
    ps, st, x = prepared(layer, make_key, "cpu", torch.float32, 2, 5, 3)
    f, steps = (transforms(call, st, None)[name] for call in (layer, by_steps(layer)))
    expected = list(torch.func.grad(steps)(ps, x).values())
    ps = tree_map(lambda leaf: leaf.requires_grad_(), ps)
    close(list(torch.autograd.grad(way(f)(ps, x), list(ps.values()))), expected)


WAYS = {"jit": partial(replayed, dynamic="x"), "compile": partial(compiled, dynamic=True)}


@pytest.mark.parametrize("way", ["jit", rare("compile")])
@pytest.mark.parametrize("kind", ["lstm", rare("gru")])
def test_sizes_that_vary(make_key, kind, way):
    layer = Recurrence(CELLS[kind](3, 4))
    ps, st, x = prepared(layer, make_key, "cpu", torch.float32, 5, 6, 3)

    def grad(ps, x, layer=layer):
        return torch.func.grad(lambda ps: layer(x, ps, st)[0].sin().sum())(ps)

    run = WAYS[way](lambda ps, x: grad(ps, x))
    for size in (5, 3, 2):
        close(run(ps, x[:size]), grad(ps, x[:size], by_steps(layer)))
    if way == "jit":
        assert run.cache_info().misses == 1
        assert "luxtorch.recurrent.default" in run.lower(ps, x).graph


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["lstm", rare("gru")])
def test_lengths_that_vary(make_key, kind, masked, sequence):
    layer = Recurrence(CELLS[kind](3, 4), return_sequence=sequence)
    ps, st, x = prepared(layer, make_key, "cpu", torch.float32, 4, 9, 3)

    def last(ps, x, steps):
        return layer((x, None, steps), ps, st)[0]

    run = replayed(last, dynamic={"x": (0, 1), "steps": (0, 1) if masked else 0})
    for batch, time in ((4, 9), (3, 7), (2, 4)):
        lengths = torch.arange(time, time - batch, -1)
        steps = torch.arange(time) < lengths[:, None] if masked else lengths
        part = x[:batch, :time].contiguous()
        close(run(ps, part, steps), last(ps, part, steps))
    assert run.cache_info().misses == 1


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_a_long_sequence_is_not_unrolled(make_key, kind):
    layer = Recurrence(CELLS[kind](3, 4))
    ps, st, x = prepared(layer, make_key, "cpu", torch.float32, 2, 100, 3)
    step = replayed(lambda ps, x: lt.gradient(lambda ps: layer(x, ps, st)[0].sum(), ps))
    assert step.lower(ps, x).graph.count("torch.ops.") < 60
    ts = training.TrainState(layer, ps, st, optim.Descent(0.1))
    step = replayed(lambda ts, x: training.single_train_step(lt.MSELoss(), (x, x.new_zeros(2, 4)), ts)[3])
    assert step.lower(ts, x).graph.count("torch.ops.") < 60
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    grad = torch.compile(lambda ps, x: torch.func.grad(lambda ps: layer(x, ps, st)[0].sum())(ps), backend=count)
    grad(ps, x)
    assert sum(len(graph.graph.nodes) for graph in graphs) < 100


@pytest.mark.slow
def test_inductor_compiles_a_training_step(make_key):
    model = lt.Chain(Recurrence(LSTMCell(3, 4)), lt.Dense(4, 2))
    ps, st, x = prepared(model, make_key, "cpu", torch.float32, 5, 20, 3)
    y = torch.zeros(5, 2)
    step = lambda ts: training.single_train_step(lt.MSELoss(), (x, y), ts)[3]  # noqa: E731
    jitted = lt.jit(step, donate="ts")
    ts, other = (training.TrainState(model, ps, st, optim.Adam(0.01)) for _ in range(2))
    ts = training.TrainState(model, tree_map(torch.clone, ps), st, optim.Adam(0.01))
    for _ in range(3):
        ts, other = jitted(ts), step(other)
    close(ts.parameters, other.parameters)


def test_the_memory_that_is_kept_is_known_beforehand(make_key, device):
    # opcheck compares what the operator returns with what it says to a tracer, and looks for mutation and aliases.
    for kind in CELLS:
        for dtype in (torch.float32, torch.float64):
            ps, _, x = prepared(Recurrence(CELLS[kind](3, 4)), make_key, device, dtype, 5, 2, 3)
            h = torch.ones(2, 4, device=device, dtype=dtype)
            c = h.clone() if kind == "lstm" else None
            for unit in {kind, fused(kind, x)}:
                for train in (True, False):
                    args = (unit, train, x, h, c, *ps.values())
                    checks = ("test_schema", "test_faketensor")
                    torch.library.opcheck(recurrent, args, test_utils=checks)
                ys, last, memory, saved = recurrent(unit, True, x, h, c, *ps.values())
                grads = (torch.ones_like(ys), None, None if c is None else torch.ones_like(memory))
                args = (unit, *grads, x, h, c, *ps.values(), ys, memory, saved)
                # oneDNN takes what it kept for a place to work in; the test below looks at that.
                checks = checks[unit.startswith("mkldnn") :]
                torch.library.opcheck(recurrent_backward, args, test_utils=checks)
                close(last, ys[-1])


@each_kind
def test_what_is_kept_serves_many_times(make_key, device, kind):
    ps, _, x = prepared(Recurrence(CELLS[kind](3, 4)), make_key, device, torch.float32, 50, 5, 3)
    h = torch.ones(5, 4, device=device)
    given = (x, h, h if kind == "lstm" else None, *ps.values())
    ys, _, memory, saved = recurrent(fused(kind, x), True, *given)
    first, second, third = (
        recurrent_backward(fused(kind, x), factor * ys.sin(), None, None, *given, ys, memory, saved)
        for factor in (1.0, 1.0, 2.0)
    )
    assert all(map(torch.equal, first, second))
    close([2 * part for part in first], list(third))


@each_kind
def test_the_loops_are_differentiated_as_autograd_would(make_key, kind):
    # gradcheck's finite differences know nothing of the formulas.
    ps, _, x = prepared(Recurrence(CELLS[kind](3, 4)), make_key, "cpu", torch.float64, 4, 2, 3)
    h = lt.random.normal(make_key(), (2, 4)).double()
    c = h.sin() if kind == "lstm" else None
    weights = list(ps.values())
    start = [h] if c is None else [h, c]

    def f(x, h, *rest):
        memory = None if c is None else rest[0]
        return loop_forward(kind, True, x, h, memory, list(rest[c is not None :]))

    kept = f(x, *start, *weights)
    grads = tuple(lt.random.normal(make_key(), size).double() for size in ((4, 2, 4), (2, 4), (2, 4)))
    got = loop_backward(kind, grads, x, h, c, weights, kept)
    given = [x, *start, *weights]

    def scalar(*tensors):
        ys, memory, _ = f(*tensors)
        memory = (memory * grads[2]).sum() if c is not None else 0
        return (ys * grads[0]).sum() + (ys[-1] * grads[1]).sum() + memory

    found = [grad for grad, part in zip(got, (x, h, c, *weights), strict=True) if part is not None]
    for i, (tensor, grad) in enumerate(zip(given, found, strict=True)):
        direction = torch.cos(torch.arange(tensor.numel()).double()).view_as(tensor)
        at = lambda e: scalar(*given[:i], tensor + e * direction, *given[i + 1 :])  # noqa: B023, E731
        torch.testing.assert_close((grad * direction).sum(), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-6)
